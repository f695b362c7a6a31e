"""Guidance: combines the estimates with the prompt and with the negative prompt into one.

Source: ComfyUI comfy/samplers.py (`cfg_function`, timestep ranges) and its nodes APG, RescaleCFG, CFGZeroStar and
CFGNorm. If several variants are on, they run in this order, as ComfyUI's hooks do: APG changes the prompt's estimate,
RescaleCFG combines the estimates, CFGZeroStar and CFGNorm change the result. Statistics are over the axes that these
nodes take of an image model's latents (b, c, t, y, x).
Axes: b batch, l tokens, m and n a patch's rows and columns, k channels; n alone is evaluations of the network.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from anima_jax.diffusion.schedules import percent_to_sigma


class Variants(NamedTuple):
    """Variants of guidance, with the defaults of ComfyUI's nodes, off unless set. Changing them compiles nothing."""

    zero_star: Any = False
    """Whether CFG-Zero* (arXiv 2503.18886) is on."""

    rescale: Any = 0.0
    """RescaleCFG's multiplier, 0 to 1 (arXiv 2305.08891): how much of the prompt's own contrast is restored."""

    norm: Any = 0.0
    """CFGNorm's strength, 0 for off: the factor of an estimate that is no longer than the prompt's at any pixel."""

    apg: Any = False
    """Whether adaptive projected guidance (arXiv 2410.02416) is on."""

    apg_eta: Any = 1.0
    """Share that is kept of the guidance along the prompt's estimate."""

    apg_norm_threshold: Any = 5.0
    """Largest norm of the guidance in each channel; 0 for no limit."""

    apg_momentum: Any = 0.0
    """Share of the guidance of earlier evaluations that is added to the next."""

    def are_on(self) -> Any:
        """Return whether any of them is on."""
        return self.zero_star | (self.rescale != 0) | (self.norm != 0) | self.apg


class Estimates(NamedTuple):
    """The point at one evaluation, the clean estimates with each prompt, all 0 at padding, and the noise level."""

    x: Array
    positive: Array
    negative: Array
    sigma: Array


def guided(estimates: Estimates, scale: Array) -> Array:
    """Return classifier-free guidance: negative + scale · (positive − negative)."""
    return estimates.negative + scale * (estimates.positive - estimates.negative)


def guided_by_variants(
    estimates: Estimates, scale: Array, variants: Variants, momentum: Array, columns_bl: Array, real: Array
) -> tuple[Array, Array]:
    """Return the guided estimate with `variants`, and the guidance that APG remembers.

    Arrays are (b, l, m, n, k). `momentum` is what APG remembers of earlier evaluations, `columns_bl` each token's
    column in patches, and `real` is false at padding.
    """
    projected, guidance = _projected(estimates, scale, variants, momentum)
    estimates = estimates._replace(positive=jnp.where(variants.apg, projected, estimates.positive))
    momentum = jnp.where(variants.apg, guidance, momentum)
    rescaled = _rescaled(estimates, scale, variants.rescale, columns_bl, real)
    out = jnp.where(variants.rescale != 0, rescaled, guided(estimates, scale))
    out = out + jnp.where(variants.zero_star, _zero_star(estimates, scale), 0.0)
    norm, longest = (jnp.linalg.norm(array, axis=-1, keepdims=True) for array in (out, estimates.positive))
    normed = out * jnp.minimum(longest / (norm + 1e-8), 1.0) * variants.norm
    return jnp.where(variants.norm != 0, normed, out), momentum


def _projected(estimates: Estimates, scale: Array, variants: Variants, momentum: Array) -> tuple[Array, Array]:
    """Return APG's estimate with the prompt, and the guidance with that of earlier evaluations."""
    _, positive, negative, _ = estimates
    guidance = variants.apg_momentum * momentum + (positive - negative)

    def norm_of_channels(array: Array) -> Array:
        return jnp.sqrt(jnp.sum(array**2, (1, 2, 3), keepdims=True))

    limit = jnp.where(variants.apg_norm_threshold > 0, variants.apg_norm_threshold, jnp.inf)
    limited = guidance * jnp.minimum(1.0, limit / norm_of_channels(guidance))
    unit = positive / jnp.maximum(norm_of_channels(positive), 1e-12)
    along = jnp.sum(limited * unit, (1, 2, 3), keepdims=True) * unit
    return negative + (limited - along + variants.apg_eta * along) + (positive - negative) / scale, guidance


def _rescaled(estimates: Estimates, scale: Array, multiplier: Array, columns_bl: Array, real: Array) -> Array:
    """Return guidance with the standard deviation that the prompt's estimate has, as a v-prediction of VE diffusion.

    ComfyUI's node takes it over channels, frames and rows, for each column of latent pixels by itself.
    """
    x, positive, negative, sigma = estimates
    root = jnp.sqrt(sigma**2 + 1.0)
    x = x / root**2
    positive, negative = ((x - estimate) * root / sigma for estimate in (positive, negative))
    whole = negative + scale * (positive - negative)
    ratio = jnp.sqrt(_column_variance(positive, columns_bl, real) / _column_variance(whole, columns_bl, real))
    whole = multiplier * (whole * ratio) + (1.0 - multiplier) * whole
    return jnp.where(real, x - whole * sigma / root, 0.0)


def _column_variance(array: Array, columns_bl: Array, real: Array) -> Array:
    """Return the sample variance in each value's column of latent pixels."""

    def sums(values: Array) -> Array:
        values_bln = jnp.sum(values, (2, 4))
        add = jax.vmap(lambda values_ln, columns_l: jnp.zeros_like(values_ln).at[columns_l].add(values_ln))
        sums_bln = jnp.take_along_axis(add(values_bln, columns_bl), columns_bl[..., None], axis=1)
        return sums_bln[:, :, None, :, None]

    count = sums(real.astype(jnp.float32))
    mean = sums(jnp.where(real, array, 0.0)) / count
    return sums(jnp.where(real, array - mean, 0.0) ** 2) / (count - 1.0)


def _zero_star(estimates: Estimates, scale: Array) -> Array:
    """Return what changes if the negative estimate is first multiplied by the coefficient of the projection.

    It is that of x − positive onto x − negative.
    """
    x, positive, negative, _ = estimates
    axes = tuple(range(1, x.ndim))
    along = jnp.sum((x - positive) * (x - negative), axes, keepdims=True)
    projection = along / (jnp.sum((x - negative) ** 2, axes, keepdims=True) + 1e-8)
    return (projection - 1.0) * (1.0 - scale) * negative


def scale_schedule(sigmas_n: np.ndarray, scale: float, interval: tuple[float, float], shift: float) -> np.ndarray:
    """Return the guidance scale at each evaluation, (n,), float32: `scale` in `interval`, 1 (no guidance) outside.

    `interval` is two fractions of the sampling, from 0 (start) to 1 (end), counted before the shift as in ComfyUI.
    """
    first, last = (np.float32(percent_to_sigma(fraction, shift)) for fraction in interval)
    # The largest level of some shifts is just above 1; without an interval, ComfyUI compares nothing.
    inside_n = (sigmas_n <= first) & (sigmas_n >= last) if interval != (0.0, 1.0) else np.True_
    return np.where(inside_n, scale, np.ones_like(sigmas_n)).astype(np.float32)
