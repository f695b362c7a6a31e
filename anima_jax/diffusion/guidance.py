"""Guidance: combines the estimates with the prompt and with the negative prompt into one.

Source: ComfyUI comfy/samplers.py (`cfg_function`, timestep ranges) and its CFGZeroStar node.
Axes: b batch, l tokens, c values of a token; n evaluations.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

from anima_jax.diffusion.schedules import percent_to_sigma


def guided(x_blc: Array, positive_blc: Array, negative_blc: Array, scale: Array, zero_star: Array) -> Array:
    """Return classifier-free guidance of clean estimates: negative + scale · (positive − negative).

    If `zero_star` is true the negative estimate is first multiplied by the coefficient of the projection of x −
    positive onto x − negative (CFG-Zero*, arXiv 2503.18886). Padding tokens must be equal in all three arrays.
    """
    out_blc = negative_blc + scale * (positive_blc - negative_blc)
    to_positive, to_negative = x_blc - positive_blc, x_blc - negative_blc
    along_b11 = jnp.sum(to_positive * to_negative, (1, 2), keepdims=True)
    projection_b11 = along_b11 / (jnp.sum(to_negative**2, (1, 2), keepdims=True) + 1e-8)
    return out_blc + jnp.where(zero_star, (projection_b11 - 1.0) * (1.0 - scale), 0.0) * negative_blc


def scale_schedule(sigmas_n: np.ndarray, scale: float, interval: tuple[float, float], shift: float) -> np.ndarray:
    """Return the guidance scale at each evaluation, (n,), float32: `scale` in `interval`, 1 (no guidance) outside.

    `interval` is two fractions of the sampling, from 0 (start) to 1 (end), counted before the shift as in ComfyUI.
    """
    first, last = (np.float32(percent_to_sigma(fraction, shift)) for fraction in interval)
    # The largest level of some shifts is just above 1; without an interval, ComfyUI compares nothing.
    inside_n = (sigmas_n <= first) & (sigmas_n >= last) if interval != (0.0, 1.0) else np.True_
    return np.where(inside_n, scale, np.ones_like(sigmas_n)).astype(np.float32)
