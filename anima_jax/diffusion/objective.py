"""The flow-matching objective that Anima is trained with: a straight line from data to noise.

x_t = (1 − t)·x0 + t·ε, the network predicts v = ε − x0 (rectified flow, arXiv 2209.03003). Times and losses follow
diffusion-pipe's `CosmosPredict2Pipeline` (models/cosmos_predict2.py).
Axes: b batch, l image tokens, c the 64 values of a token (4 latent pixels p × 16 channels, channel fastest).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from anima_jax.models.dit import PATCH

PIXELS = PATCH * PATCH

FLUX_SHIFT_LINE = ((256.0, 0.5), (4096.0, 1.15))
"""`flux_shift`: mu is linear in the number of tokens per frame, through these two points (tokens, mu)."""

MULTISCALE_MIN_SIDE = 0.9 * 1024.0 / 8.0
"""Latent side, sqrt(height · width), from which the multiscale term applies."""

TIME_METHODS = ("logit_normal", "uniform")


@dataclasses.dataclass(frozen=True)
class TimeDistribution:
    """The distribution of training times. `shift` overrides `flux_shift`; None and False turn them off."""

    method: str = "logit_normal"
    sigmoid_scale: float = 1.0
    shift: float | None = None
    flux_shift: bool = False

    def __post_init__(self):
        if self.method not in TIME_METHODS:
            raise ValueError(f"time distribution '{self.method}', expected one of {', '.join(TIME_METHODS)}")

    def times(self, uniform_b: Array, grid_b3: Array) -> Array:
        """Return the times in [0, 1], (b,), at quantiles `uniform_b` in (0, 1). `grid_b3` is in patches."""
        if self.method == "uniform":
            return self.shifted(uniform_b, grid_b3)
        return self.times_of_normal(jax.scipy.special.ndtri(uniform_b), grid_b3)

    def times_of_normal(self, normal_b: Array, grid_b3: Array) -> Array:
        """Return the times of `logit_normal` for standard normal values."""
        return self.shifted(jax.nn.sigmoid(self.sigmoid_scale * normal_b), grid_b3)

    def shifted(self, times_b: Array, grid_b3: Array) -> Array:
        """Return the times shifted by `shift`, or by `flux_shift` according to each example's size."""
        if self.shift is not None:
            return self.shift * times_b / (1.0 + (self.shift - 1.0) * times_b)
        if self.flux_shift:
            (x1, y1), (x2, y2) = FLUX_SHIFT_LINE
            tokens_b = (grid_b3[:, 1] * grid_b3[:, 2]).astype(jnp.float32)
            e_mu = jnp.exp(y1 + (y2 - y1) / (x2 - x1) * (tokens_b - x1))
            return e_mu / (e_mu + 1.0 / times_b - 1.0)
        return times_b


def interpolate(x0_blc: Array, noise_blc: Array, times_b: Array) -> Array:
    """Return the point at time `times_b` in [0, 1] (0 data, 1 noise) on the line from data to noise, in float32."""
    t_b11 = times_b[:, None, None]
    return (1.0 - t_b11) * x0_blc + t_b11 * noise_blc


def _huber(error: Array, delta: float) -> Array:
    size = jnp.abs(error)
    return jnp.where(size <= delta, 0.5 * error**2, delta * (size - 0.5 * delta))


def _smooth_l1(error: Array, beta: float) -> Array:
    size = jnp.abs(error)
    return jnp.where(size < beta, 0.5 * error**2 / beta, size - 0.5 * beta)


ELEMENT_LOSSES: dict[str, Callable[[Array, float], Array]] = {
    "mse": lambda error, _: error**2,
    "huber_delta": _huber,
    "smooth_l1_beta": _smooth_l1,
    "pseudo_huber_c": lambda error, c: jnp.sqrt(error**2 + c**2) - c,
}
"""Configuration key → elementwise loss. If none of these keys is set, the loss is "mse"."""


@dataclasses.dataclass(frozen=True)
class Loss:
    """The training loss.

    `kind` is a key of `ELEMENT_LOSSES`, `parameter` the number that it is set to. A `multiscale_weight` of 0 turns the
    multiscale term off.
    """

    kind: str = "mse"
    parameter: float = 0.0
    multiscale_weight: float = 0.0

    def __call__(self, out_blc: Array, target_blc: Array, grid_b3: Array, mask_blp: Array | None = None) -> Array:
        """Return the loss of each example, (b,), float32: the mean over its real elements.

        Tokens beyond an example's grid do not count. The loss of each latent pixel is multiplied by `mask_blp`, and the
        mean is not divided by the mask's area. The multiscale term applies to large images only; it compares 2×2
        averages and ignores the mask.
        """
        batch, length, features = out_blc.shape
        error_blpc = (out_blc.astype(jnp.float32) - target_blc.astype(jnp.float32)).reshape(batch, length, PIXELS, -1)
        real_b = jnp.prod(grid_b3, axis=-1)
        real_bl = (jnp.arange(length) < real_b[:, None]).astype(jnp.float32)
        element_blpc = ELEMENT_LOSSES[self.kind](error_blpc, self.parameter)
        if mask_blp is not None:
            element_blpc = element_blpc * mask_blp[..., None]
        loss_b = jnp.sum(jnp.sum(element_blpc, (2, 3)) * real_bl, 1) / (real_b * features)
        if not self.multiscale_weight:
            return loss_b
        pooled_blc = jnp.mean(error_blpc, axis=2)
        pooled_b = jnp.sum(jnp.sum(pooled_blc**2, 2) * real_bl, 1) / (real_b * features / PIXELS)
        latent_area_b = grid_b3[:, 1] * grid_b3[:, 2] * PIXELS
        weight_b = jnp.where(latent_area_b >= MULTISCALE_MIN_SIDE**2, self.multiscale_weight, 0.0)
        return (loss_b + weight_b * pooled_b) / (1.0 + weight_b)


def batch_mean(losses_b: Array, weights_b: Array | None = None) -> Array:
    """Return the mean over the examples, weighted by `weights_b` if given; filler examples have weight 0."""
    if weights_b is None:
        return jnp.mean(losses_b)
    return jnp.sum(losses_b * weights_b) / jnp.maximum(jnp.sum(weights_b), 1e-20)
