"""`[adapter]`: which weights get a trained low-rank update, and how."""

import os
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from anima_jax.adapters.kinds import TRAINABLE
from anima_jax.config.schema import (
    Count,
    Dtype,
    FromFloat,
    Listed,
    NotNegative,
    Positive,
    Probability,
    TypedSection,
    Whole,
    documented_as,
    existing,
    invalid,
)


def _patterns(found: Any) -> Any:
    """Return one or more regular expressions as a tuple without empty ones. Raises an error for an invalid one."""
    patterns = [found] if isinstance(found, str) else found
    if not isinstance(patterns, list | tuple) or not all(isinstance(one, str) for one in patterns):
        raise invalid(f"found {found!r}, expected a regular expression for module names, or a list of them")
    for pattern in patterns:
        _compiled(pattern)
    return tuple(pattern for pattern in patterns if pattern)


def _compiled(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise invalid(f"'{pattern}' is not a valid regular expression: {error}") from error


def _pattern_keys(found: dict[str, Any]) -> dict[str, Any]:
    for pattern in found:
        _compiled(pattern)
    return found


AdapterPath = Annotated[
    str,
    existing("an adapter's .safetensors file, or the folder that contains it", os.path.exists),
    documented_as("file or folder"),
]
Patterns = Annotated[tuple[str, ...], BeforeValidator(_patterns), Listed, documented_as("regex or [regex, …]")]


if TYPE_CHECKING:
    AdapterType = str
else:
    AdapterType = Literal[TRAINABLE]


class AdapterConfig(TypedSection):
    """Trained low-rank updates of the blocks' linear layers. Without this table every weight is trained.

    Patterns are regular expressions that match a module's name, or a part of it between dots: `self_attn`,
    `mlp.layer1`, `blocks\\.[0-9]`. Names are those of the original files (`blocks.0.self_attn.q_proj`,
    `llm_adapter.blocks.0.mlp.0`), with `text_encoder.` before the text encoder's
    (`text_encoder.layers.0.mlp.up_proj`).
    """

    type: AdapterType = Field(description="the kind of adapter; diffusion-pipe has 'lora' and 'lokr'")
    rank: Count = Field(description="rank of the factors")
    alpha: Positive | None = Field(None, description="ours; the update is scaled by alpha / rank; unset: alpha = rank")
    dropout: Probability = Field(0.0, description="fraction of an adapter's inputs that are dropped")
    rank_dropout: Probability = Field(
        0.0, description="fraction of an adapter's ranks ('lora', 'dora') or outputs (other types) that are dropped"
    )
    decompose_factor: Annotated[int, Field(ge=-1), FromFloat] = Field(
        -1,
        description="'lokr': the smaller of the two factors of a layer's width; -1: the one nearest to its square root",
    )
    dtype: Dtype | None = Field(None, description="dtype of the saved file; unset: [model] dtype")
    target_modules: Patterns = Field(
        (), description="ours; modules with an adapter; unset: every linear layer of the blocks"
    )
    exclude_modules: Patterns = Field((), description="modules without an adapter")
    rank_pattern: Annotated[dict[str, Whole], AfterValidator(_pattern_keys), documented_as("{regex = rank, …}")] = (
        Field({}, description="ours; another rank for some modules, 0 for no adapter; the first match applies")
    )
    lr_pattern: Annotated[dict[str, NotNegative], AfterValidator(_pattern_keys), documented_as("{regex = rate, …}")] = (
        Field(
            {},
            description="ours; another learning rate for some modules, 0 for no adapter; the first match applies; "
            "the others use the rates of [model] and [optimizer]",
        )
    )
    text_encoder_lr: NotNegative = Field(
        0.0,
        description="ours; learning rate of an adapter on the text encoder, which needs cache_text_embeddings = false; "
        "0: it has none",
    )
    init_from_existing: AdapterPath | None = Field(
        None, description="a saved adapter to start from: its file, or the folder that contains it"
    )

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank
