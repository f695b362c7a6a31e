"""`[optimizer]` and `[adapter]`: how weights move, and which ones if not all of them."""

import os
import re
from typing import Annotated, Any, ClassVar, Literal

import annotated_types
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationInfo

from anima_jax.config.schema import (
    Count,
    Dtype,
    Listed,
    NotEmpty,
    NotNegative,
    Positive,
    Section,
    TypedSection,
    Whole,
    Words,
    existing,
    fault,
)

Beta = Annotated[float, annotated_types.Ge(0), annotated_types.Lt(1)]


def _lower(name: str) -> str:
    if not name.strip():
        raise fault("found an empty string, expected the optimizer's name, as 'adamw'")
    return name.lower()


class OptimizerConfig(Section):
    """The optimizer. Moments are float32 (except those of the 8-bit types), whatever `[model] dtype` says.

    Every other key is an argument of the optimizer's own and is kept in `options`; whether it has such an argument is
    known where the optimizer is built.
    """

    model_config = ConfigDict(extra="allow")

    ANY_KEY: ClassVar[str] = "an argument of the optimizer's own, by its name in torch or optax"
    """What keys that are not listed mean."""

    type: Annotated[str, AfterValidator(_lower)] = Field(
        description="in any case: 'adamw', 'adamw_optimi', 'stableadamw', 'adamw8bit', 'AdamW8bitKahan', 'offload' "
        "(moments in the host's memory), 'adafactor', 'lion', 'sgd', 'muon', 'prodigy', 'schedule_free_adamw', or any "
        "transformation of optax or optax.contrib"
    )
    lr: NotNegative = Field(description="learning rate of every group that has none of its own in [model]")
    betas: Annotated[tuple[Beta, ...], Listed, NotEmpty] | None = Field(
        None,
        description="decay of the first and of the second moment; unset: the optimizer's own, [0.9, 0.999] for 'adamw' "
        "and [0.9, 0.99] for 'adamw_optimi'",
    )
    beta2_half_life: Positive | None = Field(
        None,
        description="examples after which a gradient counts half in the second moment: β₂ = 0.5^(global batch / this), "
        "instead of the second of betas",
    )
    weight_decay: NotNegative | None = Field(
        None,
        description="decoupled weight decay; 1-D parameters and the adapter's token table have none; unset: the "
        "optimizer's own, 0.01 for 'adamw' and 'adamw_optimi'",
    )
    eps: Positive | None = Field(
        None,
        description="added to the root of the second moment; unset: the optimizer's own, 1e-8 for 'adamw' and 1e-6 for "
        "'adamw_optimi'",
    )

    @property
    def options(self) -> dict[str, Any]:
        """The keys that are not listed here: arguments of the optimizer's own."""
        return dict(self.model_extra or {})


def _patterns(found: Any) -> Any:
    """One regular expression or several, each of them valid."""
    patterns = [found] if isinstance(found, str) else found
    if not isinstance(patterns, list | tuple) or not all(isinstance(one, str) for one in patterns):
        raise fault(f"found {found!r}, expected a regular expression on names of modules, or a list of them")
    for pattern in patterns:
        _compiled(pattern)
    return tuple(pattern for pattern in patterns if pattern)


def _compiled(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise fault(f"'{pattern}' is no regular expression: {error}") from error


def _pattern_keys(found: dict[str, Any]) -> dict[str, Any]:
    for pattern in found:
        _compiled(pattern)
    return found


def _adapter_path(path: str, info: ValidationInfo) -> str:
    return existing(path, info, os.path.exists, "an adapter's .safetensors file, or the folder that holds it")


AdapterPath = Annotated[str, AfterValidator(_adapter_path), Words("file or folder")]
Patterns = Annotated[tuple[str, ...], BeforeValidator(_patterns), Listed, Words("regex or [regex, …]")]
Rate = Annotated[float, annotated_types.Ge(0), annotated_types.Lt(1)]


class AdapterConfig(TypedSection):
    """A few trained numbers beside the linear layers of the blocks. Without this table every weight is trained.

    Patterns are regular expressions that fit a module's name, or a part of it from one dot to another: `self_attn`,
    `mlp.layer1`, `blocks\\.[0-9]`. Names are those of the original files (`blocks.0.self_attn.q_proj`,
    `llm_adapter.blocks.0.mlp.0`), of the text encoder behind `text_encoder.` (`text_encoder.layers.0.mlp.up_proj`).
    """

    TYPES = ("lora", "lokr", "loha", "dora")

    type: Literal["lora", "lokr", "loha", "dora"] = Field(description="'lora' or 'lokr'; ours: 'loha', 'dora'")
    rank: Count = Field(description="rank of the factors")
    alpha: Positive | None = Field(None, description="ours; the update is scaled by alpha / rank; unset: alpha = rank")
    dropout: Rate = Field(0.0, description="fraction of its inputs that an adapter does not see")
    rank_dropout: Rate = Field(
        0.0, description="fraction of its ranks ('lora', 'dora') or of its outputs ('lokr', 'loha') that it leaves out"
    )
    decompose_factor: Annotated[int, annotated_types.Ge(-1)] = Field(
        -1, description="'lokr': the smaller of the two factors of a layer's width; -1: the nearest to its root"
    )
    dtype: Dtype | None = Field(None, description="dtype of the saved file; unset: [model] dtype")
    target_modules: Patterns = Field(
        (), description="ours; modules that get an adapter; unset: every linear layer of the blocks"
    )
    exclude_modules: Patterns = Field((), description="modules that get none")
    rank_pattern: Annotated[dict[str, Whole], AfterValidator(_pattern_keys), Words("{regex = rank, …}")] = Field(
        {}, description="ours; another rank for some modules, 0 for none; the first pattern that fits counts"
    )
    lr_pattern: Annotated[dict[str, NotNegative], AfterValidator(_pattern_keys), Words("{regex = rate, …}")] = Field(
        {},
        description="ours; another learning rate for some modules, 0 to leave them out; the first pattern that fits "
        "counts; the rates of [model] and [optimizer] are for the others",
    )
    text_encoder_lr: NotNegative = Field(
        0.0,
        description="ours; learning rate of an adapter on the text encoder, which needs cache_text_embeddings = false; "
        "0: it gets none",
    )
    init_from_existing: AdapterPath | None = Field(
        None, description="a saved adapter to go on from: its file, or the folder that holds it"
    )

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank
