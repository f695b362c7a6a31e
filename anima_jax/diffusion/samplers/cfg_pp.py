"""Samplers of the CFG++ kind (arXiv 2406.08070): they step along the noise that the negative prompt's estimate leaves.

Source: ComfyUI comfy/k_diffusion/sampling.py. D is the guided estimate, U the negative prompt's own. Of these samplers
only `euler_cfg_pp`, `euler_ancestral_cfg_pp` and `cfgpp_ud10_ab` scale U by α = 1 − σ, as a flow model's points need;
the others treat them as points of a variance-exploding model.
"""

import math
from typing import Annotated, Literal

from anima_jax.diffusion.samplers.ancestral import split_variance
from anima_jax.diffusion.samplers.ode import lagrange_integrals, res_step, weighted
from anima_jax.diffusion.samplers.options import Between, Strength
from anima_jax.diffusion.samplers.plan import Trace, Vector

HISTORY_WEIGHT = 0.25
"""Weight of the Adams-Bashforth step in `cfgpp_ud10_ab`."""

NOISE_HISTORY_WEIGHT = 0.1
"""Weight of the extrapolation of the negative prompt's noise in `cfgpp_ud10_ab`."""


def euler_cfg_pp(trace: Trace, *, version: Literal["regular", "alternative"] = "regular") -> Vector:
    """Take Euler steps from the guided estimate along the negative prompt's noise.

    The alternative version takes the step x + (σ' − σ)(x − 2D + U)/σ instead.
    """
    x = trace.start
    for sigma, after in trace.steps:
        denoised, unconditional = trace.denoise_both(x, sigma)
        if version == "alternative":
            x = x + ((after - sigma) / sigma) * (x - 2 * denoised + unconditional)
        else:
            x = (1 - after) * denoised + after * _noise(x, unconditional, sigma)
    return x


def euler_ancestral_cfg_pp(
    trace: Trace, *, eta: Annotated[float, Between(0.0, 1.0)] = 1.0, s_noise: Annotated[float, Between(0.0, 10.0)] = 1.0
) -> Vector:
    """Take steps of `euler_cfg_pp` to a σ/α below the next one, then add noise up to the next level.

    From σ = 1, where σ/α is infinite, all noise is replaced by new noise.
    """
    x = trace.start
    for sigma, after in trace.steps:
        denoised, unconditional = trace.denoise_both(x, sigma)
        if after == 0:
            return denoised
        ratio = sigma / (1 - sigma) if sigma < 1 else math.inf
        down, up = split_variance(ratio, after / (1 - after), eta)
        x = (1 - after) * (denoised + down * _noise(x, unconditional, sigma))
        if eta and s_noise:
            x = x + (1 - after) * s_noise * up * trace.noise(sigma, after)
    return x


def _noise(x: Vector, unconditional: Vector, sigma: float) -> Vector:
    """Return the noise of a flow model's point, given the estimate U."""
    return (x - (1 - sigma) * unconditional) / sigma


def dpmpp_2s_ancestral_cfg_pp(trace: Trace, *, eta: Strength = 1.0, s_noise: Strength = 1.0) -> Vector:
    """Take steps of DPM-Solver++(2S) on x + D − U to a level below the next one, then add noise up to the next level.

    As in ComfyUI, the U of the second half is that of the step's second evaluation.
    """
    x = trace.start
    for sigma, after in trace.steps:
        denoised, unconditional = trace.denoise_both(x, sigma)
        down, up = split_variance(sigma, after, eta)
        estimate = denoised
        if down > 0:
            ratio = math.sqrt(down / sigma)
            point = ratio * (x + denoised - unconditional) + (1 - ratio) * denoised
            estimate, unconditional = trace.denoise_both(point, ratio * sigma)
        ratio = down / sigma
        x = ratio * (x + denoised - unconditional) + (1 - ratio) * estimate
        if after > 0 and up:
            x = x + s_noise * up * trace.noise(sigma, after)
    return x


def dpmpp_2m_cfg_pp(trace: Trace) -> Vector:
    """Take steps of DPM-Solver++(2M), t = −ln σ, that extrapolate from the previous U to D."""
    x, before = trace.start, None
    for sigma, after in trace.steps:
        denoised, unconditional = trace.denoise_both(x, sigma)
        ratio = after / sigma
        x = denoised + ratio * (x - unconditional)
        if before and after > 0:
            earlier, earlier_sigma = before
            half = math.log(sigma / after) / (2 * math.log(earlier_sigma / sigma))
            x = x + (1 - ratio) * half * (denoised - earlier)
        before = unconditional, sigma
    return x


def res_multistep_cfg_pp(trace: Trace) -> Vector:
    """Take second-order exponential multistep steps on x + D − U towards U, t = −ln σ (arXiv 2308.02157)."""
    return res_multistep_ancestral_cfg_pp(trace, eta=0.0)


def res_multistep_ancestral_cfg_pp(trace: Trace, *, eta: Strength = 1.0, s_noise: Strength = 1.0) -> Vector:
    """Take steps of `res_multistep_cfg_pp` to a level below the next one, then add noise up to the next level."""
    x, before = trace.start, None
    for sigma, after in trace.steps:
        denoised, unconditional = trace.denoise_both(x, sigma)
        down, up = split_variance(sigma, after, eta)
        if before is None or down == 0:
            x = denoised + (down / sigma) * (x - unconditional)
        else:
            x = res_step(x + denoised - unconditional, sigma, down, unconditional, before)
        if after > 0 and up:
            x = x + s_noise * up * trace.noise(sigma, after)
        before = unconditional, sigma, down
    return x


def gradient_estimation_cfg_pp(trace: Trace, *, ge_gamma: float = 2.0) -> Vector:
    """Take Euler steps from D along (x − U)/σ, extrapolated by `ge_gamma` from the previous one (arXiv 2306.04848)."""
    x, before = trace.start, None
    for sigma, after in trace.steps:
        denoised, unconditional = trace.denoise_both(x, sigma)
        if after == 0:
            return denoised
        d = trace.keep((x - unconditional) / sigma)
        x = denoised + after * d
        if before is not None:
            x = x + (after - sigma) * (ge_gamma - 1) * (d - before)
        before = d
    return x


def cfgpp_ud10_ab(trace: Trace) -> Vector:
    """Take steps of `euler_cfg_pp` mixed with Adams-Bashforth steps of order 2 along the steps' own slopes.

    The negative prompt's noise is extrapolated slightly from the previous one. The result is the line through the last
    two estimates D, extrapolated to σ = 0.
    """
    x, before = trace.start, None
    for sigma, after in trace.steps:
        denoised, unconditional = trace.denoise_both(x, sigma)
        noise = trace.keep(_noise(x, unconditional, sigma))
        if before is None:
            step = (1 - after) * denoised + after * noise - x
            slope = trace.keep(step / (after - sigma))
        else:
            earlier, earlier_noise, earlier_slope, earlier_sigma = before
            gap = sigma - earlier_sigma
            if after == 0:
                return denoised - (sigma / gap) * (denoised - earlier)
            ahead = noise + NOISE_HISTORY_WEIGHT * ((after - sigma) / gap) * (noise - earlier_noise)
            step = (1 - after) * denoised + after * ahead - x
            slope = trace.keep(step / (after - sigma))
            adams = weighted(lagrange_integrals([sigma, earlier_sigma], sigma, after), [slope, earlier_slope])
            step = step + HISTORY_WEIGHT * (adams - step)
        x = x + step
        before = denoised, noise, slope, sigma
    return x
