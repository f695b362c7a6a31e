"""`[optimizer]` and `[adapter]`: how weights move, and which ones if not all of them."""

from typing import Annotated, Any, ClassVar, Literal

import annotated_types
from pydantic import AfterValidator, ConfigDict, Field

from anima_jax.config.schema import (
    Count,
    Dtype,
    Listed,
    NotEmpty,
    NotNegative,
    Positive,
    Section,
    TypedSection,
    fault,
    not_yet,
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
