"""What a sampling's parameters make of its noise levels: the plan, the guidance at each level, and the clean result."""

from collections.abc import Sequence

import numpy as np

from anima_jax.diffusion import guidance, samplers
from anima_jax.diffusion.samplers.plan import SamplerPlan
from anima_jax.errors import UserError
from anima_jax.sampling.request import SamplingParams


def plan_of(params: SamplingParams, sigmas: np.ndarray, *, noise_on_device: bool) -> SamplerPlan:
    """Return the sampler's plan along `sigmas`. Raises UserError for options that do not fit them or the noise."""
    plan = samplers.sampler_plan(params.sampler, sigmas, params.shift, params.sampler_options)
    if noise_on_device and any(draw.clip_std for draw in plan.draws):
        raise UserError("noise_clip_std: works with torch's noise, not with noise jax")
    return plan


def scale_of(params: SamplingParams, sigmas_n: np.ndarray) -> np.ndarray:
    """Return the guidance scale at each of these levels, float32."""
    return guidance.scale_schedule(sigmas_n, params.guidance_scale, params.guidance_interval, params.shift)


def completed(
    latents: Sequence[np.ndarray],
    originals: Sequence[np.ndarray],
    mask: np.ndarray | None,
    params: SamplingParams,
    sigmas: np.ndarray,
) -> list[np.ndarray]:
    """Return each image's clean latents, given the point that the last evaluation along `sigmas` led to.

    If the last level σ is above 0, latents are divided by 1 − σ, as in ComfyUI. Where `mask` is 0 they are `originals`.
    """
    last = np.float32(sigmas[-1] or samplers.SAMPLERS[params.sampler].ends_at)
    latents = [x / (np.float32(1.0) - last) for x in latents]
    if mask is None or sigmas[-1] > 0.0:
        return latents
    # Where the mask is grey, the last estimate is already mixed with the original.
    return [np.where(mask > 0.0, x, kept) for x, kept in zip(latents, originals, strict=True)]
