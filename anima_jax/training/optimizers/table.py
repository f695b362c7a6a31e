"""Table of optimizers by name: our rows, then the optimizers of optax and optax.contrib under their own names.

The defaults of our rows are those of the library that diffusion-pipe uses for that name.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from anima_jax.config.optimizer import NOT_AVAILABLE
from anima_jax.errors import UserError, did_you_mean
from anima_jax.training.optimizers import adam, factored, family, generic, prodigy_plus, schedule_free, soap
from anima_jax.training.optimizers.layers import transformation
from anima_jax.training.optimizers.row import Parameter, Row

EIGHT_BIT_SMALLEST = 4096
"""Tensors with fewer values keep float32 moments (bitsandbytes' `min_8bit_size`)."""


def _adamw(p: Parameter, *, b1: float, b2: float, eps: float, nesterov: bool = False) -> optax.GradientTransformation:
    return optax.adamw(p.rate, b1, b2, eps, weight_decay=p.weight_decay, nesterov=nesterov)


def _our_adamw(
    p: Parameter, *, b1: float, b2: float, eps: float, stabilize: bool, min_8bit_size: float = math.inf
) -> optax.GradientTransformation:
    in_8_bits = math.prod(p.tensor.shape) >= min_8bit_size
    options = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": p.weight_decay, "stabilize": stabilize}
    return adam.adamw(p.rate, **options, in_8_bits=in_8_bits, seed=p.seed)


def _decoupled(transform: optax.GradientTransformation, p: Parameter) -> optax.GradientTransformation:
    """Return `transform` with decoupled weight decay: the weights also shrink by rate · weight decay."""
    decay = optax.chain(optax.add_decayed_weights(p.weight_decay), optax.scale_by_learning_rate(p.rate))

    def update(grad: Any, state: Any, value: Any) -> tuple[Any, Any]:
        step, first = transform.update(grad, state[0], value)
        shrink, second = decay.update(jax.tree.map(jnp.zeros_like, grad), state[1], value)
        return jax.tree.map(jnp.add, step, shrink), (first, second)

    return transformation(lambda value: (transform.init(value), decay.init(value)), update)


def _sgd(p: Parameter, *, momentum: float, nesterov: bool) -> optax.GradientTransformation:
    """Return SGD as in torch: the weight decay is part of the gradient."""
    if nesterov and not momentum:
        raise UserError("[optimizer] nesterov = true needs a momentum above 0")
    return optax.chain(optax.add_decayed_weights(p.weight_decay), optax.sgd(p.rate, momentum or None, nesterov))


def _prodigy(
    ps: Mapping[str, Parameter],
    rate: Any,
    *,
    betas: tuple[float, float],
    beta3: float | None,
    eps: float,
    d0: float,
    d_coef: float,
    safeguard_warmup: bool,
    use_bias_correction: bool,
) -> optax.GradientTransformation:
    """Return optax's Prodigy. It always corrects Adam's bias; without `use_bias_correction`, the rate undoes that."""
    shaped = rate if use_bias_correction else lambda step: rate(step) / _bias_correction(step + 1, betas)
    return optax.contrib.prodigy(shaped, betas, beta3, eps, d0, d_coef, safeguard_warmup=safeguard_warmup)


def _bias_correction(step: Any, betas: tuple[float, float]) -> Any:
    """Return the factor by which Adam's bias correction changes the update of this step (from 1)."""
    return jnp.sqrt(1.0 - betas[1] ** step) / (1.0 - betas[0] ** step)


def _estimated_rate(state: Any, rate: Any, options: Mapping[str, Any]) -> Any:
    """Return the papers' factor of the weight decay: d · rate, times the bias correction if there is one."""
    corrected = options.get("use_bias_correction", True)
    correction = _bias_correction(state.count + 1, options["betas"]) if corrected else 1.0
    return state.estim_lr * rate(state.count) * correction


_ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
_OPTIMI = {"b1": 0.9, "b2": 0.99, "eps": 1e-6}
_EIGHT_BIT = {**_ADAM, "min_8bit_size": EIGHT_BIT_SMALLEST}

ROWS = (
    Row("adamw", _adamw, {**_ADAM, "nesterov": False}, 0.01, elementwise=True),
    Row("adamw_optimi", _adamw, _OPTIMI, 0.01, elementwise=True),
    Row("stableadamw", functools.partial(_our_adamw, stabilize=True), _OPTIMI, 0.01),
    Row("adamw8bit", _our_adamw, {**_EIGHT_BIT, "stabilize": False}, 0.01),
    Row("adamw8bitkahan", _our_adamw, {**_EIGHT_BIT, "stabilize": True}, 0.01),
    Row("offload", _adamw, {**_ADAM, "nesterov": False}, 0.01, elementwise=True, on_host=True),
    Row("lion", adam.lion, {"b1": 0.9, "b2": 0.99, "use_cautious": False}, aliases={"cautious": "use_cautious"}),
    Row("lion8bit", adam.lion, {"b1": 0.9, "b2": 0.99, "min_8bit_size": EIGHT_BIT_SMALLEST}),
    Row("sgd", _sgd, {"momentum": 0.0, "nesterov": False}, elementwise=True, decay_in_gradient=True),
    Row(
        "prodigy",
        _prodigy,
        {
            "betas": (0.9, 0.999),
            "beta3": None,
            "eps": 1e-8,
            "d0": 1e-6,
            "d_coef": 1.0,
            "safeguard_warmup": False,
            "use_bias_correction": False,
        },
        aliases={"bias_correction": "use_bias_correction", "estim_lr0": "d0", "estim_lr_coef": "d_coef"},
        shared=True,
        decay_factor=_estimated_rate,
    ),
    *factored.ROWS,
    *generic.ROWS,
    *soap.ROWS,
    *schedule_free.ROWS,
    *prodigy_plus.ROWS,
    *family.ROWS,
)

# optax's own ------------------------------------------------------------------------------------------------------

FROM_OPTAX: Mapping[str, Mapping[str, Any]] = {
    "dadapt_adamw": {"shared": True, "aliases": {"d0": "estim_lr0"}, "decay_factor": _estimated_rate},
    "dog": {"shared": True},
    "dowg": {"shared": True},
    "noisy_sgd": {"shared": True},
    "rprop": {"fixed_rate": True},
    "scale_by_rprop": {"fixed_rate": True},
    "optimistic_adam": {"fixed_rate": True},
}
"""Name of a function in optax → fields of its row that do not follow from its signature."""

NUMBERS_OR_NONE = ("momentum", "seed", "optimism", "init_estim_sq_dist")
"""Arguments of optax's functions that are numbers although their default is None."""

SET_HERE = ("learning_rate", "weight_decay", "weight_decay_mask", "trust_ratio_mask")
"""Arguments of optax's functions that are set here, from the learning rates and the parameters."""

NEEDS_MORE = "needs more than gradients; 'prodigy' needs no learning rate tuned, 'schedule_free_adamw' no schedule"

OTHER_NAMES = {
    "adamwschedulefree": "schedule_free_adamw",
    "radamschedulefree": "schedule_free_radam",
    "sgdschedulefree": "schedule_free_sgd",
}
"""Name in another library, without `_` → our name."""

REFUSED = {
    **{
        name.lower(): f"is not available; the nearest is '{near}'"
        for near, names in NOT_AVAILABLE.items()
        for name in names.split()
    },
    "scale_by_muon": "is for matrices alone; 'muon' uses AdamW for the rest",
    **dict.fromkeys(("lbfgs", "scale_by_lbfgs", "momo", "momo_adam", "sophia", "scale_by_polyak"), NEEDS_MORE),
    **dict.fromkeys(("polyak_sgd", "mechanize", "reduce_on_plateau", "sam", "schedule_free", "dpsgd"), NEEDS_MORE),
}
"""Name of an optimizer that is not available → why, or what to use instead."""


def _optax_row(name: str) -> Row | None:
    """Return the row of a function in optax; None if it is not an optimizer or a TOML cannot express its arguments."""
    function = getattr(optax, name, None) or getattr(optax.contrib, name, None)
    if name.startswith("_") or not callable(function) or isinstance(function, type):
        return None
    parameters = inspect.signature(function).parameters
    if not _makes_optimizer(name, parameters):
        return None
    options = {
        key: parameter.default
        for key, parameter in parameters.items()
        if (isinstance(parameter.default, bool | int | float | str | tuple) or key in NUMBERS_OR_NONE)
        and key not in SET_HERE
    }
    decay = parameters["weight_decay"].default or 0.0 if "weight_decay" in parameters else 0.0
    more = FROM_OPTAX.get(name, {})
    make = functools.partial(_shared_optax if more.get("shared") else _optax, function)
    return Row(name, make, options, decay, **more)


def _makes_optimizer(name: str, parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Return whether a function in optax makes an optimizer and requires no argument but the learning rate."""
    required = {key for key, parameter in parameters.items() if parameter.default is parameter.empty}
    updates = "learning_rate" in parameters or name.startswith("scale_by_")
    return updates and required <= {"learning_rate"} and name != "scale_by_learning_rate"


def _optax(function: Callable[..., Any], p: Parameter, **options: Any) -> optax.GradientTransformation:
    """Return the transformation that a function in optax makes for one parameter."""
    parameters = inspect.signature(function).parameters
    if "learning_rate" not in parameters:
        return optax.chain(
            function(**options), optax.add_decayed_weights(p.weight_decay), optax.scale_by_learning_rate(p.rate)
        )
    if "weight_decay" in parameters:
        return function(learning_rate=p.rate, weight_decay=p.weight_decay, **options)
    transform = function(learning_rate=p.rate, **options)
    return _decoupled(transform, p) if p.weight_decay else transform


def _shared_optax(function: Callable[..., Any], ps: Mapping[str, Parameter], rate: Any, **options: Any) -> Any:
    """Return the transformation that a function in optax makes for all parameters.

    A mask selects the parameters with weight decay if the function has one; else the row's `decay_factor` applies it.
    Raises UserError if weight decay is set and the function has none.
    """
    parameters = inspect.signature(function).parameters
    if "key" in parameters:
        options["key"] = next(iter(ps.values())).seed
    if "mask" in parameters:
        decay = max(p.weight_decay for p in ps.values())
        mask = {path: bool(p.weight_decay) for path, p in ps.items()}
        return function(learning_rate=rate, weight_decay=decay, mask=mask, **options)
    if "weight_decay" not in parameters and any(p.weight_decay for p in ps.values()):
        raise UserError(f"[optimizer] weight_decay: not an argument of '{function.__name__}'")
    return function(learning_rate=rate, **options)


@functools.cache
def rows() -> Mapping[str, Row]:
    """Return all optimizers by name, those of `ROWS` first."""
    own = {row.name: row for row in ROWS}
    others = sorted({*dir(optax), *dir(optax.contrib)} - {*own, *REFUSED})
    return own | {name: row for name in others if name.islower() and (row := _optax_row(name))}


def find(name: str) -> Row:
    """Return the row of the optimizer `name`; case, `_` and `-` are ignored.

    Raises UserError, with the nearest valid name, if it is unknown or not available.
    """
    plain = _plain(OTHER_NAMES.get(_plain(name), name))
    for refused, why in REFUSED.items():
        if _plain(refused) == plain:
            raise UserError(f"[optimizer] type = '{name}' {why}")
    for known, row in rows().items():
        if _plain(known) == plain:
            return row
    near = did_you_mean(name.lower(), [*rows(), *(other for other, why in REFUSED.items() if why != NEEDS_MORE)])
    names = ", ".join(row.name for row in ROWS)
    raise UserError(f"[optimizer] type = '{name}' is not known{near}; expected one of {names} or a name of optax's")


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
