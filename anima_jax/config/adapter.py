"""`[adapter]`: which weights get a trained low-rank update, and how, or which control network is trained."""

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)

from anima_jax.adapters.kinds import TRAINABLE
from anima_jax.checkpoints.names.control import ATOMICS, DILATION_LIMIT, LLLITE
from anima_jax.config.schema import (
    Count,
    Dtype,
    FromFloat,
    Listed,
    NotEmpty,
    NotNegative,
    Positive,
    Probability,
    TypedSection,
    Whole,
    choices,
    documented_as,
    existing,
    invalid,
)
from anima_jax.errors import did_you_mean


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


PRESETS: Mapping[str, tuple[str, ...]] = {
    "self_attn_q": tuple(ATOMICS)[:1],
    "self_attn_qkv": tuple(ATOMICS)[:2],
    "self_attn_qkv_cross_q": tuple(ATOMICS)[:3],
}
"""Names in sd-scripts of several of `ATOMICS`."""


def _target_names(found: Any) -> Any:
    """Return one name, several joined by commas, or a list of names as a tuple of names."""
    names = found.split(",") if isinstance(found, str) else found
    if not isinstance(names, list | tuple) or not all(isinstance(one, str) for one in names):
        raise invalid(f"found {found!r}, expected {choices((*PRESETS, *ATOMICS))}, or a list of these")
    names = tuple(filter(None, (one.strip() for one in names)))
    for name in names:
        if name not in PRESETS and name not in ATOMICS:
            known = (*PRESETS, *ATOMICS)
            raise invalid(f"found '{name}', expected {choices(known)}, or a list of these{did_you_mean(name, known)}")
    return names


def _rank(found: Any, validate: ValidatorFunctionWrapHandler, info: ValidationInfo) -> int:
    if found is not None:
        return validate(found)
    if info.data.get("type", LLLITE) != LLLITE:
        raise invalid("missing, expected rank of the factors")
    return 0


def _even(found: int) -> int:
    if found % 2:
        raise invalid(f"found {found}, expected an even number: the first half of the trunk has half as many channels")
    return found


if TYPE_CHECKING:
    AdapterType = str
else:
    AdapterType = Literal[(*TRAINABLE, LLLITE)]


_SHARED = ("type", "dropout", "dtype", "lr_pattern", "init_from_existing")
_LOW_RANK = (
    *("rank", "alpha", "rank_dropout", "decompose_factor", "target_modules", "exclude_modules", "rank_pattern"),
    "text_encoder_lr",
)
"""Keys of every type, and of all types but 'lllite'; the others are only for that."""


class AdapterConfig(TypedSection):
    """Trained low-rank updates of the blocks' linear layers, or with `type = 'lllite'` a trained control network, with
    keys and defaults of its own. Without this table every weight is trained.

    Patterns are regular expressions that match a module's name, or a part of it between dots: `self_attn`,
    `mlp.layer1`, `blocks\\.[0-9]`. Names are those of the original files (`blocks.0.self_attn.q_proj`,
    `llm_adapter.blocks.0.mlp.0`), with `text_encoder.` before the text encoder's
    (`text_encoder.layers.0.mlp.up_proj`).
    """

    type: AdapterType = Field(description="the kind of adapter; diffusion-pipe has 'lora' and 'lokr'")
    rank: Annotated[Count, WrapValidator(_rank)] = Field(
        default_factory=lambda: cast(int, None),
        validate_default=True,
        description="rank of the factors; required, except with 'lllite'",
    )
    alpha: Positive | None = Field(None, description="ours; the update is scaled by alpha / rank; unset: alpha = rank")
    dropout: Probability = Field(
        0.0, description="fraction of an adapter's inputs that are dropped; 'lllite': of the features before `up`"
    )
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
    cond_emb_dim: Count = Field(32, description="ours; 'lllite': features of the control picture's embedding")
    cond_dim: Annotated[Count, AfterValidator(_even)] = Field(
        64, description="ours; 'lllite': channels of the trunk, which embeds the control picture; even"
    )
    cond_resblocks: Whole = Field(1, description="ours; 'lllite': residual blocks of the trunk")
    use_aspp: bool = Field(
        False, description="ours; 'lllite': whether the trunk ends in dilated convolutions (ASPP), which see further"
    )
    aspp_dilations: Annotated[tuple[Annotated[Count, Field(lt=DILATION_LIMIT)], ...], Listed, NotEmpty] = Field(
        (1, 2, 4, 8), description="ours; 'lllite': their dilations; needs use_aspp = true"
    )
    mlp_dim: Count = Field(64, description="ours; 'lllite': features inside a module")
    target_layers: Annotated[
        tuple[str, ...], BeforeValidator(_target_names), Listed, NotEmpty, documented_as("name or [name, …]")
    ] = Field(
        ("self_attn_q",),
        description="ours; 'lllite': the linear layers with a module: "
        f"{', '.join(f'{name!r}' for name in PRESETS)}, or some of {', '.join(f'{name!r}' for name in ATOMICS)}",
    )
    multiplier: Positive = Field(
        1.0, description="ours; 'lllite': strength of the control network in training and in samples"
    )
    cond_in_channels: Literal[3, 4] = Field(
        3, description="ours; 'lllite': channels of a control picture; 4: colours and a mask, for inpainting"
    )
    inpaint_masked_input: bool = Field(
        False, description="ours; 'lllite': hide the control picture's masked part (grey); needs cond_in_channels = 4"
    )

    @classmethod
    def check_keys(cls, of_type: str, table: Mapping[str, Any]) -> None:
        """Raise an error for a key that belongs to another type, unless its value is the default."""
        control, low_rank = cls.model_fields.keys() - {*_SHARED, *_LOW_RANK}, {*_LOW_RANK}
        foreign, own = (low_rank, control) if of_type == LLLITE else (control, low_rank)
        for key in filter(foreign.__contains__, table):
            default = cls.model_fields[key].get_default()
            if table[key] not in (default, list(default) if isinstance(default, tuple) else default):
                types = "'lllite'" if key in control else f"the types {choices(TRAINABLE)}"
                keys = ", ".join(name for name in cls.model_fields if name in own or name in _SHARED)
                raise invalid(f"belongs to {types}; the keys of '{of_type}' are {keys}", key=key)

    @field_validator("aspp_dilations", "inpaint_masked_input")
    @classmethod
    def _needs_another_key(cls, found: Any, info: ValidationInfo) -> Any:
        key, value = {"aspp_dilations": ("use_aspp", True)}.get(info.field_name or "", ("cond_in_channels", 4))
        if found and info.data.get(key, value) != value:
            raise invalid(f"has no effect without {key} = {str(value).lower()}")
        return found

    @property
    def is_control(self) -> bool:
        """Whether it is a control network instead of an adapter on linear layers."""
        return self.type == LLLITE

    @property
    def target_atomics(self) -> tuple[str, ...]:
        """The names of `ATOMICS` that `target_layers` mean, in their order."""
        found = {atomic for name in self.target_layers for atomic in PRESETS.get(name, (name,))}
        return tuple(atomic for atomic in ATOMICS if atomic in found)

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank
