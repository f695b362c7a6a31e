"""Samplers that step below the next noise level and add noise up to it, and those that replace noise altogether.

Source: ComfyUI comfy/k_diffusion/sampling.py, in their flow-model forms (`…_RF`) where it has one. `eta` is the share
of the noise that is replaced, `s_noise` the factor of the new noise.
"""

import math
from typing import Annotated

import numpy as np

from anima_jax.diffusion.samplers.ode import midpoint_step, res_step
from anima_jax.diffusion.samplers.options import Between, Strength
from anima_jax.diffusion.samplers.plan import Trace, Vector

LCMNoise = Annotated[float, Between(0.0, 64.0)]


def euler_ancestral(trace: Trace, *, eta: Strength = 1.0, s_noise: Strength = 1.0) -> Vector:
    """Take Euler steps to a level below the next one, then add noise up to the next level."""
    x = trace.start
    for sigma, after in trace.steps:
        denoised = trace.denoise(x, sigma)
        if after == 0:
            return denoised
        down = _level_below(sigma, after, eta)
        x = (down / sigma) * x + (1 - down / sigma) * denoised
        x = _renoised(trace, x, sigma, after, eta, s_noise)
    return x


def dpm_2_ancestral(trace: Trace, *, eta: Strength = 1.0, s_noise: Strength = 1.0) -> Vector:
    """Take steps of `dpm_2` to a level below the next one, then add noise up to the next level."""
    x = trace.start
    for sigma, after in trace.steps:
        down = _level_below(sigma, after, eta)
        x = midpoint_step(trace, x, sigma, down)
        if down != 0:
            x = _renoised(trace, x, sigma, after, eta, s_noise)
    return x


def dpmpp_2s_ancestral(trace: Trace, *, eta: Strength = 1.0, s_noise: Strength = 1.0) -> Vector:
    """Take steps of DPM-Solver++(2S) to a level below the next one, then add noise up to the next level."""
    x = trace.start
    for sigma, after in trace.steps:
        denoised = trace.denoise(x, sigma)
        if after == 0:
            return denoised
        down = _level_below(sigma, after, eta)
        middle = 0.9999 if sigma == 1 else sigma_of((log_snr(sigma) + log_snr(down)) / 2)
        denoised = trace.denoise((middle / sigma) * x + (1 - middle / sigma) * denoised, middle)
        x = (down / sigma) * x + (1 - down / sigma) * denoised
        x = _renoised(trace, x, sigma, after, eta, s_noise)
    return x


def _level_below(sigma: float, after: float, eta: float) -> float:
    """Return the level at which a flow model's ancestral step ends before noise is added."""
    return after * (1 + (after / sigma - 1) * eta)


def _renoised(trace: Trace, x: Vector, sigma: float, after: float, eta: float, s_noise: float) -> Vector:
    """Return `x` with noise added from the level below up to `after`."""
    if not eta:
        return x
    down = _level_below(sigma, after, eta)
    ratio = (1 - after) / (1 - down)
    return ratio * x + s_noise * math.sqrt(after**2 - (down * ratio) ** 2) * trace.noise(sigma, after)


def res_multistep_ancestral(trace: Trace, *, eta: Strength = 1.0, s_noise: Strength = 1.0) -> Vector:
    """Take steps of `res_multistep` to a level below the next one, then add noise up to the next level.

    Unlike in the other ancestral samplers, the data is not scaled down when noise is added.
    """
    x, before = trace.start, None
    for sigma, after in trace.steps:
        denoised = trace.denoise(x, sigma)
        down, up = split_variance(sigma, after, eta)
        x = res_step(x, sigma, down, denoised, before)
        if after > 0 and up:
            x = x + s_noise * up * trace.noise(sigma, after)
        before = denoised, sigma, down
    return x


def split_variance(sigma: float, after: float, eta: float = 1.0) -> tuple[float, float]:
    """Return the two parts of an ancestral step whose data is not scaled, as it would be in a variance-exploding model.

    They are the level below `after` to which it denoises, and the std of the noise that it then adds up to `after`.
    """
    if not eta:
        return after, 0.0
    up = after if math.isinf(sigma) else min(after, eta * after * math.sqrt(1 - (after / sigma) ** 2))
    return math.sqrt(after**2 - up**2), up


def lcm(
    trace: Trace,
    *,
    s_noise: LCMNoise = 1.0,
    s_noise_end: LCMNoise = 1.0,
    noise_clip_std: Annotated[float, Between(0.0, 10.0)] = 0.0,
) -> Vector:
    """Take steps σ'·n + (1 − σ')·D: new noise on each estimate (latent consistency models, arXiv 2310.04378).

    The factor of the noise changes linearly from `s_noise` to `s_noise_end`. If `noise_clip_std` is above 0, noise is
    limited to this many of its standard deviations.
    """
    x, last = trace.start, max(1, len(trace.sigmas) - 2)
    for index, (sigma, after) in enumerate(trace.steps):
        x = (1 - after) * trace.denoise(x, sigma)
        if after > 0:
            factor = s_noise + (s_noise_end - s_noise) * index / last
            x = x + factor * after * trace.noise(sigma, after, noise_clip_std)
    return x


def ddpm(trace: Trace) -> Vector:
    """Take steps of the posterior of a variance-preserving diffusion (arXiv 2006.11239), α² = 1 / (1 + σ²).

    As in ComfyUI, the points of the flow model are taken for those of the other diffusion, and the factors are float32,
    whose 1 − α² has few digits at small levels.
    """
    x, one = trace.start, np.float32(1.0)
    for sigma, after in trace.steps:
        squares = np.array([sigma, after], np.float32) ** 2
        kept, kept_after = one / (squares + one)
        scale, scale_after = np.sqrt(one + squares)
        share = kept / kept_after
        noise = (x - trace.denoise(x, sigma)) / sigma
        x = np.sqrt(one / share) * (x / scale - ((one - share) / np.sqrt(one - kept)) * noise)
        if after > 0:
            std = np.sqrt((one - share) * (one - kept_after) / (one - kept))
            x = scale_after * (x + std * trace.noise(sigma, after))
    return x


def log_snr(sigma: float) -> float:
    """Return λ = ln(α / σ), half the logarithm of the signal-to-noise ratio; α is 1 − σ."""
    return math.log((1 - sigma) / sigma)


def sigma_of(snr: float) -> float:
    """Return the level σ for a given λ."""
    return 1 / (1 + math.exp(snr))
