"""`[model] config = {…}`: the sizes of a transformer that is trained from scratch.

The keys are those of `models.dit.DiTConfig` and of its adapter. What is left out follows from what is given, in the
released model's proportions.
"""

from typing import Annotated, Any, Literal

import annotated_types
from pydantic import Field, ValidationInfo, field_validator

from anima_jax.config.schema import Count, Section, fault

HEAD_SIZES = (128, 64, 32, 16)
ADAPTER_HEAD_SIZES = (64, 32, 16)
"""Sizes of a head that are tried in turn where `heads` is left out; the first is the released model's."""

MIN_HEAD_SIZE = 6
"""Rotary positions have three axes, and each needs a pair."""

EvenCount = Annotated[int, annotated_types.Ge(2), annotated_types.MultipleOf(2)]


def _heads_of(sizes: tuple[int, ...]):
    """Default number of heads: of the first of `sizes` that divides the width, else one."""
    return lambda table: next((table["width"] // size for size in sizes if table["width"] % size == 0), 1)


def _check_heads(heads: int, info: ValidationInfo, *, smallest: int) -> int:
    width = info.data.get("width")
    if width is None:
        return heads
    if width % heads:
        raise fault(f"found {heads}, expected a divisor of width = {width}")
    size = width // heads
    if size % 2 or size < smallest:
        raise fault(f"{heads} heads of width = {width} are {size} wide each, expected an even size, {smallest} or more")
    return heads


class AdapterSizes(Section):
    """The LLM adapter, which turns T5 token ids and Qwen3 states into the transformer's context."""

    target_width: Count = Field(1024, description="width of the T5 token table and of the result: context_width")
    width: Count = Field(default_factory=lambda table: table["target_width"], description="width inside the blocks")
    blocks: Count = Field(6, description="number of blocks")
    heads: Count = Field(
        default_factory=_heads_of(ADAPTER_HEAD_SIZES),
        validate_default=True,
        description="attention heads; width / heads is even",
    )
    mlp_width: Count = Field(default_factory=lambda table: 4 * table["width"], description="hidden width of the MLP")
    source_width: Count = Field(1024, description="width of the text encoder's states (1024: Qwen3-0.6B)")
    vocabulary: Count = Field(32128, description="rows of the T5 token table")

    @field_validator("heads")
    @classmethod
    def _heads_fit(cls, heads: int, info: ValidationInfo) -> int:
        return _check_heads(heads, info, smallest=2)


class NetworkSizes(Section):
    """The diffusion transformer. Unset sizes follow the released model's proportions."""

    width: EvenCount = Field(2048, description="width of the model")
    blocks: Count = Field(28, description="number of blocks")
    heads: Count = Field(
        default_factory=_heads_of(HEAD_SIZES),
        validate_default=True,
        description=f"attention heads; width / heads is even, {MIN_HEAD_SIZE} or more; unset: heads of 128, or the "
        "first of 64, 32, 16 that divides the width",
    )
    mlp_width: Count = Field(default_factory=lambda table: 4 * table["width"], description="hidden width of the MLP")
    context_width: Count = Field(1024, description="width of the context rows that cross-attention reads")
    adaln_rank: Count = Field(256, description="rank of the per-block modulation (AdaLN-LoRA)")
    latent_channels: Literal[16] = Field(16, description="channels of the VAE's latents")
    adapter: AdapterSizes = Field(
        default_factory=lambda table: AdapterSizes.model_validate({"target_width": table["context_width"]}),
        description="sizes of the LLM adapter",
    )

    @field_validator("heads")
    @classmethod
    def _heads_fit(cls, heads: int, info: ValidationInfo) -> int:
        return _check_heads(heads, info, smallest=MIN_HEAD_SIZE)

    @field_validator("adapter", mode="before")
    @classmethod
    def _adapter_follows_the_context(cls, adapter: Any, info: ValidationInfo) -> Any:
        if isinstance(adapter, dict) and "context_width" in info.data:
            return {"target_width": info.data["context_width"], **adapter}
        return adapter

    @field_validator("adapter")
    @classmethod
    def _adapter_feeds_the_context(cls, adapter: AdapterSizes, info: ValidationInfo) -> AdapterSizes:
        wanted = info.data.get("context_width", adapter.target_width)
        if adapter.target_width != wanted:
            raise fault(f"found {adapter.target_width}, expected context_width = {wanted}", key="target_width")
        return adapter
