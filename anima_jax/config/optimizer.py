"""`[optimizer]`: how weights are updated."""

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

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

NOT_AVAILABLE: Mapping[str, str] = {
    "adamw": "AdaBound AdaGC AdaHessian Adai Adalite AdamC AdamG AdamMini AdaMod AdamP AdamS AdaNorm AdaPNM AdaShift "
    "AdaSmooth AdaTAM Aida Amos Ano AvaGrad BCOS DiffGrad DualAdam EXAdam FAdam FlashAdamW Grams GrokFastAdamW Kate "
    "LaProp PAdam QHAdam Ranger Ranger21 ROSE SWATS",
    "sgd": "A2Grad AccSGD AggMo AliG ASGD FTRL Gravity MSVAG Nero PID PNM QHM SGDP SGDSaI SGDW SRMM TAM VSGD",
    "muon": "AdaGO DistributedMuon MuonClip SCION SCIONLight SpectralSphere",
    "soap": "Conda DASH Kron ScalableShampoo Shampoo SPlus",
    "genericoptim": "AdamWSN Alice APOLLO ApolloDQN Fira LoRARite RACS SaRA SPAM StableSPAM",
    "AdaFactor": "AdaLOMO EmoFact LOMO",
    "lion": "EmoLynx EmoNavi FOCUS",
    "prodigy": "DAdaptAdaGrad DAdaptAdam DAdaptAdan DAdaptLion DAdaptSGD",
    "schedule_free_adamw": "Lookahead ScheduleFreeWrapper TRAC",
    "stableadamw": "BSAM DeMo FriendlySAM GSAM LBFGS LookSAM Magma OrthoGrad PCGrad SafeFP16Optimizer SAM SophiaH WSAM",
}
"""The nearest optimizer that there is → names in pytorch_optimizer 4.1 of some that there are not."""

Epsilon = Annotated[
    Positive | Annotated[tuple[Positive, ...], Listed, NotEmpty],
    expecting("more than 0, or a list of such numbers"),
    documented_as("number > 0, or a list of them"),
]


def _lower(name: str) -> str:
    if not name.strip():
        raise invalid("found an empty string, expected the optimizer's name, as 'adamw'")
    return name.lower()


class Schedule(NamedTuple):
    """The learning rate over time: the keys `lr_scheduler`, `warmup_steps` and `lr_scheduler_*`."""

    shape: str
    warmup_steps: int
    num_cycles: int = 1
    power: float = 1.0
    min_lr: float | None = None


class OptimizerConfig(Section):
    """The optimizer. Moments are float32 for every `[model] dtype`, except those of the 8-bit types and of AdaFactor.

    All other keys are optimizer-specific arguments, in `options`. They are checked where the optimizer is built.
    """

    model_config = ConfigDict(extra="allow")

    type: Annotated[str, AfterValidator(_lower)] = Field(
        description="the name in any case, as 'adamw'. diffusion-pipe's: 'adamw', 'adamw_optimi', 'stableadamw', "
        "'adamw8bit', 'AdamW8bitKahan', 'offload' (moments in the host's memory), 'sgd', 'automagic', 'genericoptim' "
        "('muon', 'adamuon' and 'normuon' are genericoptim with that option). pytorch_optimizer's, with its arguments "
        "and defaults: 'AdaBelief', 'AdaDelta', 'AdaFactor' (its relative_step sets the rate instead of lr, unless it "
        "is false), 'Adam', 'AdaMax', 'Adan', 'AdEMAMix', 'ADOPT', 'CAME', 'Fromage', 'Lamb', 'LARS', 'Lion', "
        "'MADGRAD', 'MARS', 'NAdam', 'NovoGrad', 'Prodigy', 'RAdam', 'RMSprop', 'ScheduleFreeAdamW', "
        "'ScheduleFreeRAdam', 'ScheduleFreeSGD', 'SignSGD', 'SimplifiedAdEMAMix', 'SM3', 'SOAP', 'Tiger', 'Yogi'. Also "
        "'lion8bit', 'prodigy_plus_schedule_free', and any transformation of optax or optax.contrib. Not there, "
        "although diffusion-pipe has them from pytorch_optimizer: "
        + ", ".join(sorted(" ".join(NOT_AVAILABLE.values()).split(), key=str.lower))
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
