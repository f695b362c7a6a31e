"""`[optimizer]` and `[adapter]`: how weights move, and which ones if not all of them."""

from typing import Annotated, Any, Literal

import annotated_types
from pydantic import AfterValidator, Field

from anima_jax.config.schema import Count, Dtype, Listed, NotNegative, Positive, TypedSection, fault, not_yet

Beta = Annotated[float, annotated_types.Ge(0), annotated_types.Lt(1)]

DEFAULTS: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.9, 0.999), "weight_decay": 0.01, "eps": 1e-8},
    "adamw_optimi": {"betas": (0.9, 0.99), "weight_decay": 0.0, "eps": 1e-6},
}
"""What diffusion-pipe gets from each type's own library (torch, optimi) where the TOML says nothing."""


def _default(key: str):
    return lambda table: DEFAULTS[table["type"]][key]


class OptimizerConfig(TypedSection):
    """The optimizer. Trained weights and moments are float32, whatever `[model] dtype` says."""

    TYPES = tuple(DEFAULTS)
    NOT_YET_TYPES = (
        "adamw8bit",
        "adamw8bitkahan",
        "stableadamw",
        "sgd",
        "offload",
        "automagic",
        "genericoptim",
        "prodigy",
        "lion",
        "came",
        "adafactor",
    )

    type: Literal["adamw", "adamw_optimi"] = Field(
        description="'adamw' or 'adamw_optimi': both AdamW in float32, with the defaults of the library that they name"
    )
    lr: NotNegative = Field(description="learning rate of every group that has none of its own in [model]")
    betas: Annotated[tuple[Beta, Beta], Listed] = Field(
        default_factory=_default("betas"), description="decay of the first and of the second moment"
    )
    weight_decay: NotNegative = Field(
        default_factory=_default("weight_decay"),
        description="decoupled weight decay; 1-D parameters and the adapter's token table have none",
    )
    eps: Positive = Field(default_factory=_default("eps"), description="added to the root of the second moment")


def _no_dropout(dropout: float) -> float:
    if dropout:
        raise fault(not_yet(f"dropout = {dropout}", "leave it at 0.0"))
    return dropout


class AdapterConfig(TypedSection):
    """A low-rank adapter on the linear layers of the blocks. Without this table every weight is trained."""

    TYPES = ("lora",)
    NOT_YET_TYPES = ("lokr",)

    type: Literal["lora"] = Field(description="'lora'")
    rank: Count = Field(description="rank of the two factors")
    alpha: Positive | None = Field(None, description="ours; the update is scaled by alpha / rank; unset: alpha = rank")
    dropout: Annotated[NotNegative, AfterValidator(_no_dropout)] = Field(0.0, description="only 0.0")
    dtype: Dtype | None = Field(None, description="dtype of the saved file; unset: [model] dtype")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank
