"""Optimizers whose second moment is factored: AdaFactor and CAME as in pytorch_optimizer, and diffusion-pipe's
automagic (its optimizers/automagic.py).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from anima_jax.training.optimizers.row import (
    Factored,
    Parameter,
    Row,
    clip_rms,
    ema,
    from_rule,
    inverse_root,
    rms,
    second_moment,
)


def _adafactor(
    p: Parameter,
    *,
    betas: tuple[float, float],
    decay_rate: float,
    clip_threshold: float,
    ams_bound: bool,
    scale_parameter: bool,
    relative_step: bool,
    warmup_init: bool,
    eps1: float,
    eps2: float,
    momentum_dtype: str,
    weight_decouple: bool,
    fixed_decay: bool,
) -> optax.GradientTransformation:
    """Return AdaFactor (arXiv 1804.04235). Its first moment is that of the update, in bfloat16 by default."""
    dtype = jnp.dtype(momentum_dtype)

    def init(value: Array) -> Any:
        return jnp.zeros(value.shape, dtype), second_moment(value), jnp.zeros_like(value) if ams_bound else None

    def step(grad: Array, own: Any, value: Array, t: Array, rate: Array) -> tuple[Array, Any]:
        mean, moment, most = own
        if relative_step:
            rate = jnp.minimum(1e-6 * t if warmup_init else 0.01, 1.0 / jnp.sqrt(t))
        if scale_parameter:
            rate = rate * jnp.maximum(eps2, rms(value))
        decay = p.weight_decay * (1.0 if fixed_decay else rate)
        if not weight_decouple:
            grad, decay = grad + p.weight_decay * value, 0.0
        share = jnp.maximum(1.0 - betas[1], t ** -abs(decay_rate))  # 1 - β2, without cancellation
        root, moment = inverse_root(moment, jnp.square(grad) + eps1, 1.0 - share)
        root, most = _bound(root, most, share)
        update = (clip_rms(grad * root, clip_threshold) * rate).astype(dtype).astype(jnp.float32)
        old = mean.astype(jnp.float32)
        mean = (old + (1.0 - betas[0]) * (update - old)).astype(dtype)
        return -mean.astype(jnp.float32) - decay * value, (mean, moment, most)

    return from_rule(p, init, step, own_decay=True)


def _bound(root: Array, most: Array | None, divisor: Any) -> tuple[Array, Array | None]:
    """Return the factor of the gradient under `ams_bound`, if there is a state for it."""
    if most is None:
        return root, None
    most = jnp.maximum(most, 1.0 / root)
    return 1.0 / jnp.sqrt(most / divisor), most


def _came(
    p: Parameter,
    *,
    betas: tuple[float, float, float],
    clip_threshold: float,
    ams_bound: bool,
    eps1: float,
    eps2: float,
    **decay: bool,
) -> optax.GradientTransformation:
    """Return CAME (arXiv 2307.02047): Adafactor whose momentum is divided by its own instability."""

    def init(value: Array) -> Any:
        doubt = Factored.zeros(value) if value.ndim > 1 else None
        return jnp.zeros_like(value), second_moment(value), doubt, jnp.zeros_like(value) if ams_bound else None

    def step(grad: Array, own: Any, value: Array, t: Array, rate: Array) -> tuple[Array, Any]:
        mean, moment, doubt, most = own
        root, moment = inverse_root(moment, jnp.square(grad) + eps1, betas[1])
        root, most = _bound(root, most, betas[1])
        update = clip_rms(grad * root, clip_threshold)
        mean = ema(mean, update, betas[0])
        change = mean
        if doubt is not None:
            doubt = doubt.updated(jnp.square(update - mean) + eps2, betas[2])
            change = mean * doubt.inverse_root
        return -rate * change, (mean, moment, doubt, most)

    return from_rule(p, init, step, **decay)


class Rates(NamedTuple):
    """A rate per value in 8 bits: `codes` 0 to 127, and the rate of code 1."""

    codes: Array
    unit: Array

    @classmethod
    def of(cls, rates: Array) -> "Rates":
        """Return positive `rates`, rounded to multiples of 1/127 of the largest."""
        # Rates are often half way between two codes: the barrier keeps XLA from multiplying by 1/127 instead.
        unit = jnp.max(rates) / jax.lax.optimization_barrier(jnp.float32(127.0))
        return cls(jnp.round(rates / unit).astype(jnp.int8), unit)


def _automagic(
    p: Parameter,
    *,
    min_lr: float,
    max_lr: float,
    lr_bump: float,
    eps: float | tuple[float, ...],
    clip_threshold: float,
    beta2: float,
) -> optax.GradientTransformation:
    """Return automagic: each value has a rate, which rises where two updates have the same sign and falls elsewhere.

    The rates begin at `[optimizer] lr`, at 1e-6 if that is above 1e-3, and follow no schedule.
    """
    first = p.lr if p.lr <= 1e-3 else 1e-6
    floor = eps[0] if isinstance(eps, tuple) else eps

    def init(value: Array) -> Any:
        rates = Rates.of(jnp.full_like(value, first))
        return second_moment(value), jnp.zeros(value.shape, bool), rates

    def step(grad: Array, own: Any, value: Array, t: Array, rate: Array) -> tuple[Array, Any]:
        moment, was_positive, rates = own
        root, moment = inverse_root(moment, jnp.square(grad) + floor, beta2)
        update = clip_rms(grad * root, clip_threshold)
        positive = update > 0
        old = jnp.abs(rates.codes.astype(jnp.float32) * rates.unit)  # not to be fused with the sum below
        new = jnp.clip(old + jnp.where(positive == was_positive, lr_bump, -lr_bump), min_lr, max_lr)
        return -new * (update + p.weight_decay * value), (moment, positive, Rates.of(new))

    return from_rule(p, init, step, own_decay=True)


_DECAY = {"weight_decouple": True, "fixed_decay": False}

ROWS = (
    Row(
        "adafactor",
        _adafactor,
        {
            "betas": (0.9, 0.999),
            "decay_rate": -0.8,
            "clip_threshold": 1.0,
            "ams_bound": False,
            "scale_parameter": True,
            "relative_step": True,
            "warmup_init": False,
            "eps1": 1e-30,
            "eps2": 1e-3,
            "momentum_dtype": "bfloat16",
            **_DECAY,
        },
        aliases={
            "d": "clip_threshold",
            "clipping_threshold": "clip_threshold",
            "beta2_decay": "decay_rate",
            "multiply_by_parameter_scale": "scale_parameter",
        },
        choices={"momentum_dtype": ("bfloat16", "float32")},
    ),
    Row(
        "came",
        _came,
        {
            "betas": (0.9, 0.999, 0.9999),
            "clip_threshold": 1.0,
            "ams_bound": False,
            "eps1": 1e-30,
            "eps2": 1e-16,
            **_DECAY,
        },
    ),
    Row(
        "automagic",
        _automagic,
        {
            "min_lr": 1e-7,
            "max_lr": 1e-3,
            "lr_bump": 1e-6,
            "eps": (1e-30, 1e-3),
            "clip_threshold": 1.0,
            "beta2": 0.999,
        },
    ),
)
