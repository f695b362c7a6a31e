"""Samplers by ComfyUI's names: each a pure step function, run by one `lax.scan` over the sigmas.

Source: ComfyUI comfy/k_diffusion/sampling.py, for its flow model (`CONST` in comfy/model_sampling.py): the network's
velocity v gives the denoised estimate D = x − σ·v.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from anima_jax.diffusion.samplers.euler import euler

Denoise = Callable[[Array, Array], Array]
"""(x, σ) → D, the estimate of the clean latents."""

SAMPLERS: dict[str, Callable[[Denoise, Array, Array, Array], Array]] = {"euler": euler}
"""Name → (denoise, x, σ, next σ) → next x."""


def start(noise: Array, sigma: Array, latents: Array | float = 0.0) -> Array:
    """Where sampling begins: the point at `sigma` on the line from `latents` to `noise`."""
    return sigma * noise + (1.0 - sigma) * latents


def sample(sampler: str, velocity: Callable[[Array, Array], Array], x: Array, sigmas: Array) -> Array:
    """Follow `velocity(x, σ)` from `x` at sigmas[0] to sigmas[-1] with the sampler of this name, in float32."""
    step = SAMPLERS[sampler]

    def denoise(x: Array, sigma: Array) -> Array:
        return x - sigma * velocity(x, sigma)

    def body(x, pair):
        return step(denoise, x, pair[0], pair[1]), None

    sigmas = jnp.asarray(sigmas, jnp.float32)
    return jax.lax.scan(body, x.astype(jnp.float32), (sigmas[:-1], sigmas[1:]))[0]


def guided(velocity_positive: Array, velocity_negative: Array, scale: Array | float) -> Array:
    """Classifier-free guidance: v_neg + scale · (v_pos − v_neg)."""
    return velocity_negative + scale * (velocity_positive - velocity_negative)
