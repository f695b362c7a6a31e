"""`[optimizer]`: how weights are updated."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from anima_jax.config.schema import (
    Fraction,
    Listed,
    NotEmpty,
    NotNegative,
    Positive,
    Section,
    documented_as,
    expecting,
    invalid,
)

OWN_RATE: Mapping[str, float] = {"automagic": 1e-6}
"""Optimizer → its learning rate if `lr` is unset. diffusion-pipe's example sets none for it."""

Epsilon = Annotated[
    Positive | Annotated[tuple[Positive, ...], Listed, NotEmpty],
    expecting("more than 0, or a list of such numbers"),
    documented_as("number > 0, or a list of them"),
]


def _lower(name: str) -> str:
    if not name.strip():
        raise invalid("found an empty string, expected the optimizer's name, as 'adamw'")
    return name.lower()


class OptimizerConfig(Section):
    """The optimizer. Moments are float32 for every `[model] dtype`, except those of the 8-bit types and of AdaFactor.

    All other keys are optimizer-specific arguments, in `options`. They are checked where the optimizer is built.
    """

    model_config = ConfigDict(extra="allow")

    type: Annotated[str, AfterValidator(_lower)] = Field(
        description="in any case: 'adamw', 'adamw_optimi', 'stableadamw', 'adamw8bit', 'AdamW8bitKahan', 'offload' "
        "(moments in the host's memory), 'sgd', 'automagic', 'genericoptim' ('muon', 'adamuon' and 'normuon' are "
        "genericoptim with that option), 'lion', 'AdaFactor', 'CAME', 'prodigy', 'schedule_free_adamw', or any "
        "transformation of optax or optax.contrib"
    )
    lr: NotNegative = Field(
        description="learning rate of every group without its own in [model]; only 'automagic' has one of its own, 1e-6"
    )
    betas: Annotated[tuple[Fraction, ...], Listed, NotEmpty] | None = Field(
        None,
        description="decay rates of the first and the second moment; unset: the optimizer's own, [0.9, 0.999] for "
        "'adamw' and [0.9, 0.99] for 'adamw_optimi'",
    )
    beta2_half_life: Positive | None = Field(
        None,
        description="examples after which a gradient's weight in the second moment is halved: "
        "β₂ = 0.5^(global batch / this), instead of the second of betas",
    )
    weight_decay: NotNegative | None = Field(
        None,
        description="decoupled weight decay; 1-D parameters and the adapter's token table have none; unset: the "
        "optimizer's own, 0.01 for 'adamw' and 'adamw_optimi'",
    )
    eps: Epsilon | None = Field(
        None,
        description="added to the square root of the second moment; unset: the optimizer's own, 1e-8 for 'adamw' and "
        "1e-6 for 'adamw_optimi'",
    )

    @model_validator(mode="before")
    @classmethod
    def _own_rate(cls, table: Any) -> Any:
        name = table.get("type") if isinstance(table, Mapping) else None
        return {"lr": OWN_RATE[name.lower()], **table} if isinstance(name, str) and name.lower() in OWN_RATE else table

    @property
    def options(self) -> dict[str, Any]:
        """Optimizer-specific arguments: the keys that are not fields."""
        return dict(self.model_extra or {})
