"""The optimizers by name: one table, and every transformation of optax and optax.contrib beside it.

A row makes the transformation of one parameter (or of all, where they share an estimate) from named arguments, with
the defaults of the library that diffusion-pipe takes that optimizer from.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from anima_jax.checkpoints.names import FileTensor
from anima_jax.checkpoints.names.groups import is_decayed
from anima_jax.errors import UserError, did_you_mean
from anima_jax.training.optimizers import adam
from anima_jax.training.optimizers.layers import transformation

MUON_SMALLEST_SIDE = 32
"""Matrices with a smaller side are left to AdamW (diffusion-pipe's `GenericOptim.step`)."""

EIGHT_BIT_SMALLEST = 4096
"""Tensors with fewer values keep float32 moments (bitsandbytes' `min_8bit_size`)."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What an optimizer is told of one parameter: its learning rate, weight decay and (first) tensor in the file."""

    rate: Any
    weight_decay: float
    tensor: FileTensor


Make = Callable[..., optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Row:
    """How to make an optimizer.

    `make(parameter, **options)`, or with `shared` `make({path: parameter}, rate, **options)` for all parameters.
    `elementwise`: it looks at no tensor's shape or norm. `fixed_rate`: its rate cannot follow a schedule.
    `options` are its arguments and their defaults, `renamed` other libraries' names for them.
    """

    make: Make
    options: Mapping[str, Any]
    weight_decay: float = 0.0
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    elementwise: bool = False
    shared: bool = False
    fixed_rate: bool = False
    on_host: bool = False


def _decoupled(transform: optax.GradientTransformation, parameter: Parameter) -> optax.GradientTransformation:
    """`transform`, after which the weights shrink by rate · weight decay."""
    decay = optax.chain(optax.add_decayed_weights(parameter.weight_decay), optax.scale_by_learning_rate(parameter.rate))

    def update(grad, state, value):
        step, first = transform.update(grad, state[0], value)
        shrink, second = decay.update(jax.tree.map(jnp.zeros_like, grad), state[1], value)
        return jax.tree.map(jnp.add, step, shrink), (first, second)

    return transformation(lambda value: (transform.init(value), decay.init(value)), update)


def _adamw(p: Parameter, *, b1=0.9, b2=0.999, eps=1e-8, nesterov=False) -> optax.GradientTransformation:
    return optax.adamw(p.rate, b1, b2, eps, weight_decay=p.weight_decay, nesterov=nesterov)


def _adamw_optimi(p: Parameter, *, b1=0.9, b2=0.99, eps=1e-6) -> optax.GradientTransformation:
    return _adamw(p, b1=b1, b2=b2, eps=eps)


def _stable_adamw(p: Parameter, *, b1=0.9, b2=0.99, eps=1e-6) -> optax.GradientTransformation:
    return adam.adamw(p.rate, b1=b1, b2=b2, eps=eps, weight_decay=p.weight_decay, stabilize=True)


def _adamw_8bit(
    p: Parameter, *, b1=0.9, b2=0.999, eps=1e-8, min_8bit_size=EIGHT_BIT_SMALLEST, stabilize=False
) -> optax.GradientTransformation:
    large = math.prod(p.tensor.shape) >= min_8bit_size
    return adam.adamw(p.rate, b1=b1, b2=b2, eps=eps, weight_decay=p.weight_decay, stabilize=stabilize, in_8_bits=large)


def _adamw_8bit_kahan(
    p: Parameter, *, b1=0.9, b2=0.999, eps=1e-8, min_8bit_size=EIGHT_BIT_SMALLEST, stabilize=True
) -> optax.GradientTransformation:
    return _adamw_8bit(p, b1=b1, b2=b2, eps=eps, min_8bit_size=min_8bit_size, stabilize=stabilize)


def _adafactor(
    p: Parameter,
    *,
    min_dim_size_to_factor=128,
    decay_rate=0.8,
    decay_offset=0,
    multiply_by_parameter_scale=True,
    clipping_threshold=1.0,
    momentum=0.0,
    eps=1e-30,
    factored=True,
) -> optax.GradientTransformation:
    transform = optax.adafactor(
        p.rate,
        min_dim_size_to_factor,
        abs(decay_rate),  # torch and transformers give it as the exponent itself, -0.8
        decay_offset,
        multiply_by_parameter_scale,
        clipping_threshold or None,
        momentum or None,
        eps=eps,
        factored=factored,
    )
    return _decoupled(transform, p)


def _lion(p: Parameter, *, b1=0.9, b2=0.99) -> optax.GradientTransformation:
    return optax.lion(p.rate, b1, b2, weight_decay=p.weight_decay)


def _sgd(p: Parameter, *, momentum=0.0, nesterov=False) -> optax.GradientTransformation:
    """As torch's: the weight decay is part of the gradient."""
    if nesterov and not momentum:
        raise UserError("[optimizer] nesterov = true needs a momentum above 0")
    return optax.chain(optax.add_decayed_weights(p.weight_decay), optax.sgd(p.rate, momentum or None, nesterov))


def _muon(
    p: Parameter,
    *,
    beta=0.95,
    nesterov=True,
    ns_steps=5,
    preconditioning: Any = "frobenius",
    consistent_rms=0.2,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
) -> optax.GradientTransformation:
    """The matrices' momentum made orthogonal; AdamW for the rest.

    A matrix's update is scaled to the RMS `consistent_rms`, near AdamW's, so that both share a rate (arXiv 2502.16982,
    and diffusion-pipe's muon); 0 is the original scaling, √max(1, out / in).
    """
    if not is_decayed(p.tensor) or min(p.tensor.shape) < MUON_SMALLEST_SIDE:
        return _adamw(p, b1=b1, b2=b2, eps=eps)
    out, into = p.tensor.shape
    scale = consistent_rms * math.sqrt(max(out, into)) if consistent_rms else math.sqrt(max(1.0, out / into))
    return optax.chain(
        optax.contrib.scale_by_muon(
            ns_steps=ns_steps,
            beta=beta,
            eps=eps,
            nesterov=nesterov,
            preconditioning=preconditioning,
            weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(),
        ),
        optax.scale(scale),
        optax.add_decayed_weights(p.weight_decay),
        optax.scale_by_learning_rate(p.rate),
    )


def _schedule_free(base: optax.GradientTransformation, p: Parameter, b1: float, weight_lr_power: float):
    if not b1:
        raise UserError("[optimizer] schedule-free averaging needs a first beta above 0")
    # optax's counter begins at 1; the weight of a step is that of the rate it was made with (arXiv 2405.15682).
    rate = p.rate
    return optax.contrib.schedule_free(
        optax.chain(base, optax.add_decayed_weights(p.weight_decay), optax.scale_by_learning_rate(rate)),
        lambda step: rate(step - 1),
        b1,
        weight_lr_power,
    )


def _schedule_free_adamw(p: Parameter, *, b1=0.9, b2=0.999, eps=1e-8, weight_lr_power=2.0):
    base = optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True)
    return _schedule_free(base, p, b1, weight_lr_power)


def _schedule_free_sgd(p: Parameter, *, b1=0.9, weight_lr_power=2.0):
    return _schedule_free(optax.identity(), p, b1, weight_lr_power)


def _prodigy(
    ps: Mapping[str, Parameter],
    rate: Any,
    *,
    betas=(0.9, 0.999),
    beta3=None,
    eps=1e-8,
    d0=1e-6,
    d_coef=1.0,
    safeguard_warmup=False,
    use_bias_correction=False,
) -> optax.GradientTransformation:
    """optax's, whose estimate counts on Adam's bias correction, which is off unless it is asked for."""
    shaped = rate if use_bias_correction else lambda step: rate(step) / _bias_correction(step + 1, betas)
    return optax.contrib.prodigy(shaped, betas, beta3, eps, d0, d_coef, safeguard_warmup=safeguard_warmup)


def _bias_correction(step: Any, betas: tuple[float, float]) -> Any:
    """What Adam's update without bias correction is multiplied by in this step, from 1."""
    return jnp.sqrt(1.0 - betas[1] ** step) / (1.0 - betas[0] ** step)


def _options(function: Callable) -> dict[str, Any]:
    """Arguments with a plain default, which a TOML can give."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if isinstance(parameter.default, bool | int | float | str | tuple | type(None))
        and name not in ("learning_rate", "weight_decay", "weight_decay_rate")
        and not name.endswith(("mask", "dtype", "dtype_momentum", "optimizer", "numbers", "key", "linesearch"))
    }


def _row(make: Make, weight_decay: float = 0.0, **more: Any) -> Row:
    return Row(make, _options(make), weight_decay, **more)


ROWS: dict[str, Row] = {
    "adamw": _row(_adamw, 0.01, elementwise=True),
    "adamw_optimi": _row(_adamw_optimi, 0.01, elementwise=True),
    "stableadamw": _row(_stable_adamw, 0.01),
    "adamw8bit": _row(_adamw_8bit, 0.01),
    "adamw8bitkahan": _row(_adamw_8bit_kahan, 0.01),
    "offload": _row(_adamw, 0.01, elementwise=True, on_host=True),
    "adafactor": _row(
        _adafactor,
        renamed={
            "d": "clipping_threshold",
            "clip_threshold": "clipping_threshold",
            "beta2_decay": "decay_rate",
            "beta1": "momentum",
            "scale_parameter": "multiply_by_parameter_scale",
        },
    ),
    "lion": _row(_lion, elementwise=True),
    "sgd": _row(_sgd, elementwise=True),
    "muon": _row(_muon, renamed={"momentum": "beta"}),
    "prodigy": _row(
        _prodigy,
        shared=True,
        renamed={"bias_correction": "use_bias_correction", "estim_lr0": "d0", "estim_lr_coef": "d_coef"},
    ),
    "schedule_free_adamw": _row(_schedule_free_adamw, elementwise=True),
    "schedule_free_sgd": _row(_schedule_free_sgd, elementwise=True),
}

SHARED = ("dadapt_adamw", "dog", "dowg", "noisy_sgd")
"""Transformations of optax that have one estimate (or source of noise) for all parameters."""

FIXED_RATE = ("rprop", "scale_by_rprop", "sm3", "optimistic_adam")
"""Those whose learning rate is a number."""

RENAMED = {
    "dadapt_adamw": {"d0": "estim_lr0"},
    "rmsprop": {"alpha": "decay"},
}
"""Other libraries' names for the arguments of optax's functions."""

NEEDS_MORE = "needs more than gradients in each step; 'prodigy' or 'schedule_free_adamw' want no rate or schedule tuned"

REFUSED = {
    "automagic": "is not in this program; the nearest is 'prodigy', which finds its learning rate too",
    "genericoptim": "is not in this program; 'muon' is its muon = true, 'adafactor' and 'adamw8bit' save memory",
    "scale_by_muon": "is for matrices alone; 'muon' leaves the rest to AdamW",
    "came": "is not in this program; the nearest is 'adafactor'",
    **dict.fromkeys(("lbfgs", "scale_by_lbfgs", "momo", "momo_adam", "sophia", "scale_by_polyak"), NEEDS_MORE),
    **dict.fromkeys(("polyak_sgd", "mechanize", "reduce_on_plateau", "sam", "schedule_free", "dpsgd"), NEEDS_MORE),
}
"""Names that a user may have, and what to take instead."""


def _from_optax(name: str) -> Row | None:
    """The row of one of optax's functions; None if it is none, or needs what a configuration cannot give."""
    function = getattr(optax, name, None) or getattr(optax.contrib, name, None)
    if name.startswith("_") or not callable(function) or isinstance(function, type):
        return None
    parameters = inspect.signature(function).parameters
    takes_rate = "learning_rate" in parameters
    required = {key for key, one in parameters.items() if one.default is one.empty} - {"learning_rate"}
    if required or not (takes_rate or name.startswith("scale_by_")) or name == "scale_by_learning_rate":
        return None
    shared = name in SHARED
    return Row(
        functools.partial(_make_shared if shared else _make_optax, function),
        _options(function),
        parameters["weight_decay"].default or 0.0 if "weight_decay" in parameters else 0.0,
        RENAMED.get(name, {}),
        shared=shared,
        fixed_rate=name in FIXED_RATE,
    )


def _make_optax(function: Callable, p: Parameter, **options: Any) -> optax.GradientTransformation:
    """One of optax's functions for one parameter."""
    parameters = inspect.signature(function).parameters
    if "learning_rate" not in parameters:
        return optax.chain(
            function(**options),
            optax.add_decayed_weights(p.weight_decay),
            optax.scale_by_learning_rate(p.rate),
        )
    if "weight_decay" in parameters:
        return function(learning_rate=p.rate, weight_decay=p.weight_decay, **options)
    transform = function(learning_rate=p.rate, **options)
    return _decoupled(transform, p) if p.weight_decay else transform


def _make_shared(function: Callable, ps: Mapping[str, Parameter], rate: Any, **options: Any):
    """One of optax's functions for all parameters; weight decay goes by a mask, or by `decay_strength`."""
    parameters = inspect.signature(function).parameters
    if "key" in parameters:
        options["key"] = 0
    if "mask" in parameters:
        decay = max(p.weight_decay for p in ps.values())
        mask = {path: bool(p.weight_decay) for path, p in ps.items()}
        return function(learning_rate=rate, weight_decay=decay, mask=mask, **options)
    if "weight_decay" not in parameters and any(p.weight_decay for p in ps.values()):
        raise UserError(f"[optimizer] weight_decay: '{function.__name__}' has none")
    return function(learning_rate=rate, **options)


def decay_strength(name: str, rate: Any, options: Mapping[str, Any]) -> Callable[[Any], Any] | None:
    """For Prodigy and D-Adaptation: what multiplies the weight decay, from the state before the update (in the papers
    d · rate, times the bias correction if there is one). None for the rest."""
    if name not in ("prodigy", "dadapt_adamw"):
        return None
    betas = options.get("betas", (0.9, 0.999))
    corrected = name != "prodigy" or options.get("use_bias_correction", False)

    def strength(state):
        correction = _bias_correction(state.count + 1, betas) if corrected else 1.0
        return state.estim_lr * rate(state.count) * correction

    return strength


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


@functools.cache
def names() -> tuple[str, ...]:
    """Every name that can be trained with, the table's first."""
    others = sorted({*dir(optax), *dir(optax.contrib)} - {*ROWS, *REFUSED})
    return (*ROWS, *(name for name in others if name.islower() and _from_optax(name) is not None))


def find(name: str) -> tuple[str, Row]:
    """The name as it stands in the table, and its row; case, `_` and `-` do not matter. Raises UserError."""
    for refused, why in REFUSED.items():
        if _plain(refused) == _plain(name):
            raise UserError(f"[optimizer] type = '{name}' {why}")
    for known in names():
        if _plain(known) == _plain(name):
            row = ROWS.get(known) or _from_optax(known)
            assert row is not None
            return known, row
    near = did_you_mean(name.lower(), [*names(), *(other for other, why in REFUSED.items() if why != NEEDS_MORE)])
    raise UserError(f"[optimizer] type = '{name}' is not known{near}; there are {', '.join(ROWS)} and all of optax's")
