"""`[model] config = {…}`: the sizes of a transformer that is trained from scratch.

The keys become the fields of `models.dit.DiTConfig` and `models.llm_adapter.LLMAdapterConfig`. Unset sizes are derived
from those that are set, in the proportions of the released model.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, GetCoreSchemaHandler, ValidationInfo, field_validator
from pydantic_core import CoreSchema, core_schema

from anima_jax.config.schema import Count, FromFloat, Section, invalid
from anima_jax.models.dit import DiTConfig
from anima_jax.models.llm_adapter import LLMAdapterConfig

HEAD_SIZES = (128, 64, 32, 16)
ADAPTER_HEAD_SIZES = (64, 32, 16)
"""Head sizes to try in order if `heads` is unset; the first is that of the released model."""

MIN_HEAD_SIZE = 6
"""Rotary positions have three axes, and each needs a pair of features."""

EvenCount = Annotated[int, Field(ge=2, multiple_of=2), FromFloat]


@dataclasses.dataclass(frozen=True)
class BuiltFrom:
    """Annotation of a dataclass that is a table in TOML: the keys of `section` are the fields of the dataclass."""

    section: type[BaseModel]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(
            lambda table: source(**dict(table)),
            handler.generate_schema(self.section),
            serialization=core_schema.plain_serializer_function_ser_schema(dataclasses.asdict),
        )


def _heads_of(sizes: tuple[int, ...]) -> Callable[[dict[str, Any]], int]:
    """Return a default factory for `heads`: the width over the first of `sizes` that divides it, or 1."""
    return lambda table: next((table["width"] // size for size in sizes if table["width"] % size == 0), 1)


def _heads_of_at_least(smallest: int) -> AfterValidator:
    def check(heads: int, info: ValidationInfo) -> int:
        width = info.data.get("width", heads * smallest)
        if width % heads:
            raise invalid(f"found {heads}, expected a divisor of width = {width}")
        size = width // heads
        if size % 2 or size < smallest:
            raise invalid(
                f"{heads} heads of width = {width} have size {size}, expected an even size of at least {smallest}"
            )
        return heads

    return AfterValidator(check)


class LLMAdapterKeys(Section):
    """The LLM adapter, which turns T5 token ids and Qwen3 states into the transformer's context."""

    target_width: Count = Field(
        LLMAdapterConfig.target_width, description="width of the T5 token table and of the result: context_width"
    )
    width: Count = Field(default_factory=lambda table: table["target_width"], description="width inside the blocks")
    blocks: Count = Field(LLMAdapterConfig.blocks, description="number of blocks")
    heads: Annotated[Count, _heads_of_at_least(2)] = Field(
        default_factory=_heads_of(ADAPTER_HEAD_SIZES),
        validate_default=True,
        description="attention heads; width / heads is even",
    )
    mlp_width: Count = Field(default_factory=lambda table: 4 * table["width"], description="hidden width of the MLP")
    source_width: Count = Field(
        LLMAdapterConfig.source_width, description="width of the text encoder's states (1024: Qwen3-0.6B)"
    )
    vocabulary: Count = Field(LLMAdapterConfig.vocabulary, description="rows of the T5 token table")


class DiTKeys(Section):
    """The diffusion transformer. Unset sizes follow the released model's proportions."""

    width: EvenCount = Field(DiTConfig.width, description="width of the model")
    blocks: Count = Field(DiTConfig.blocks, description="number of blocks")
    heads: Annotated[Count, _heads_of_at_least(MIN_HEAD_SIZE)] = Field(
        default_factory=_heads_of(HEAD_SIZES),
        validate_default=True,
        description=f"attention heads; width / heads is even, at least {MIN_HEAD_SIZE}; unset: heads of size 128, or "
        "of the first of 64, 32, 16 that divides the width",
    )
    mlp_width: Count = Field(default_factory=lambda table: 4 * table["width"], description="hidden width of the MLP")
    context_width: Count = Field(
        DiTConfig.context_width, description="width of the context rows that cross-attention reads"
    )
    adaln_rank: Count = Field(DiTConfig.adaln_rank, description="rank of the per-block modulation (AdaLN-LoRA)")
    latent_channels: Literal[16] = Field(16, description="channels of the VAE's latents")
    adapter: Annotated[LLMAdapterConfig, BuiltFrom(LLMAdapterKeys)] = Field(
        default_factory=dict, validate_default=True, description="sizes of the LLM adapter"
    )

    @field_validator("adapter", mode="before")
    @classmethod
    def _adapter_feeds_the_context(cls, adapter: Any, info: ValidationInfo) -> Any:
        width = info.data.get("context_width")
        if width is None or not isinstance(adapter, dict):
            return adapter
        if adapter.get("target_width", width) != width:
            raise invalid(f"found {adapter['target_width']}, expected context_width = {width}", key="target_width")
        return {"target_width": width, **adapter}


TransformerSizes = Annotated[DiTConfig, BuiltFrom(DiTKeys)]
