"""Samplers that add noise at every step.

Source: ComfyUI comfy/k_diffusion/sampling.py and sa_solver.py, in their flow-model forms: a point at level σ is (1 −
σ)·D + σ·noise. Most of them integrate over the half log-SNR λ = ln((1 − σ)/σ); α is 1 − σ, n is standard normal noise.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from anima_jax.diffusion.samplers.ode import lagrange_integrals, midpoint_step, res_step, weighted
from anima_jax.diffusion.samplers.plan import Trace, Vector
from anima_jax.diffusion.schedules import percent_to_sigma

ER_POINTS = 200

SA_NOISY = (0.2, 0.8)
"""Fractions of the sampling between which SA-Solver adds noise."""


def euler_ancestral(trace: Trace) -> Vector:
    """Take Euler steps to a level below the next one, then add noise up to the next level."""
    x = trace.start
    for sigma, after in trace.steps:
        denoised = trace.denoise(x, sigma)
        down = _level_below(sigma, after)
        x = (down / sigma) * x + (1 - down / sigma) * denoised
        x = _renoised(trace, x, sigma, after)
    return x


def dpm_2_ancestral(trace: Trace) -> Vector:
    """Take steps of `dpm_2` to a level below the next one, then add noise up to the next level."""
    x = trace.start
    for sigma, after in trace.steps:
        x = midpoint_step(trace, x, sigma, _level_below(sigma, after))
        x = _renoised(trace, x, sigma, after)
    return x


def dpmpp_2s_ancestral(trace: Trace) -> Vector:
    """Take steps of DPM-Solver++(2S) to a level below the next one, then add noise up to the next level."""
    x = trace.start
    for sigma, after in trace.steps:
        denoised, down = trace.denoise(x, sigma), _level_below(sigma, after)
        if down > 0:
            middle = 0.9999 if sigma == 1 else _sigma((_snr(sigma) + _snr(down)) / 2)
            denoised = trace.denoise((middle / sigma) * x + (1 - middle / sigma) * denoised, middle)
        x = (down / sigma) * x + (1 - down / sigma) * denoised
        x = _renoised(trace, x, sigma, after)
    return x


def res_multistep_ancestral(trace: Trace) -> Vector:
    """Take steps of `res_multistep` to a level below the next one, then add noise up to the next level.

    Unlike in the other ancestral samplers, the data is not scaled down when noise is added.
    """
    x, before = trace.start, None
    for sigma, after in trace.steps:
        denoised = trace.denoise(x, sigma)
        down, up = split_variance(sigma, after)
        x = res_step(x, sigma, down, denoised, before)
        if after > 0:
            x = x + up * trace.noise(sigma, after)
        before = denoised, sigma, down
    return x


def lcm(trace: Trace) -> Vector:
    """Take steps σ'·n + (1 − σ')·D: new noise on each estimate (latent consistency models, arXiv 2310.04378)."""
    x = trace.start
    for sigma, after in trace.steps:
        x = (1 - after) * trace.denoise(x, sigma)
        if after > 0:
            x = x + after * trace.noise(sigma, after)
    return x


def euler_cfg_pp(trace: Trace) -> Vector:
    """Take Euler steps from the guided estimate along the negative prompt's noise (CFG++, arXiv 2406.08070)."""
    x = trace.start
    for sigma, after in trace.steps:
        denoised, unconditional = trace.denoise_both(x, sigma)
        x = (1 - after) * denoised + (after / sigma) * (x - (1 - sigma) * unconditional)
    return x


def euler_ancestral_cfg_pp(trace: Trace) -> Vector:
    """Take steps of `euler_cfg_pp` to a σ/α below the next one, then add noise up to the next level.

    From σ = 1, where σ/α is infinite, all noise is replaced by new noise.
    """
    x = trace.start
    for sigma, after in trace.steps:
        denoised, unconditional = trace.denoise_both(x, sigma)
        if after == 0:
            return denoised
        ratio = sigma / (1 - sigma) if sigma < 1 else math.inf
        down, up = split_variance(ratio, after / (1 - after))
        x = (1 - after) * (denoised + (down / sigma) * (x - (1 - sigma) * unconditional))
        x = x + (1 - after) * up * trace.noise(sigma, after)
    return x


def dpmpp_2m_sde(trace: Trace) -> Vector:
    """Take steps of SDE-DPM-Solver++(2M), arXiv 2211.01095, in the midpoint form."""
    return _multistep_sde(trace, 2, lambda h: (-math.expm1(-h) / 2, 0.0))


def dpmpp_2m_sde_heun(trace: Trace) -> Vector:
    """Take steps of SDE-DPM-Solver++(2M) in Heun's form."""
    return _multistep_sde(trace, 2, _phi_2_3)


def dpmpp_3m_sde(trace: Trace) -> Vector:
    """Take steps of SDE-DPM-Solver++(3M)."""
    return _multistep_sde(trace, 3, _phi_2_3)


def _phi_2_3(h: float) -> tuple[float, float]:
    """Return φ₂ and φ₃ of an exponential integrator over a step of −h."""
    phi_2 = math.expm1(-h) / h + 1
    return phi_2, phi_2 / h - 0.5


def _multistep_sde(trace: Trace, order: int, shares: Callable[[float], tuple[float, float]]) -> Vector:
    """Take steps of an exponential integrator in λ with up to two derivatives of the estimates.

    `shares` maps twice the step in λ to the weights of the derivatives.
    """
    x = trace.start
    history: list[tuple[Vector, float]] = []
    for sigma, after in itertools.pairwise(_finite_levels(trace)):
        now = trace.denoise(x, sigma)
        if after == 0:
            return now
        h = _snr(after) - _snr(sigma)
        x = (after / sigma) * math.exp(-h) * x - (1 - after) * math.expm1(-2 * h) * now
        history = [(now, _snr(sigma)), *history[: order - 1]]
        slope, bend = _differences(history, h)
        first, second = shares(2 * h)
        x = x + (1 - after) * (first * slope - second * bend)
        x = x + after * math.sqrt(-math.expm1(-2 * h)) * trace.noise(sigma, after)
    return x


def _differences(history: list[tuple[Vector, float]], h: float) -> tuple[Vector, Vector]:
    """Return the estimate's first and second derivatives with respect to λ / h.

    Those for which the history (newest first) is too short are 0.
    """
    none = Vector({})
    if len(history) == 1:
        return none, none
    slopes: list[Vector] = []
    gaps: list[float] = []
    for (newer, snr), (older, earlier_snr) in itertools.pairwise(history):
        gaps.append((snr - earlier_snr) / h)
        slopes.append((newer - older) / gaps[-1])
    if len(history) == 2:
        return slopes[0], none
    bend = (slopes[0] - slopes[1]) / sum(gaps)
    return slopes[0] + gaps[0] * bend, bend


def dpmpp_sde(trace: Trace) -> Vector:
    """Take steps of SDE-DPM-Solver++ of order 2, with a stage in the middle.

    The stage and the step are both ancestral steps in e^−λ = σ/α.
    """
    x = trace.start
    for sigma, after in itertools.pairwise(_finite_levels(trace)):
        denoised = trace.denoise(x, sigma)
        if after == 0:
            return denoised
        middle = _middle_level(sigma, after)
        denoised = trace.denoise(_ancestral_sde(trace, x, denoised, sigma, middle), middle)
        x = _ancestral_sde(trace, x, denoised, sigma, after)
    return x


def _ancestral_sde(trace: Trace, x: Vector, denoised: Vector, sigma: float, after: float) -> Vector:
    """Take a step from `sigma` towards `denoised` to a level below `after`, then add noise up to `after`."""
    alpha, ratio = 1 - after, sigma / (1 - sigma)
    down, up = split_variance(ratio, after / alpha)
    return alpha * (down / ratio / (1 - sigma) * x + (1 - down / ratio) * denoised + up * trace.noise(sigma, after))


def _middle_level(sigma: float, after: float) -> float:
    """Return the level in the middle of a step in λ, with ComfyUI's float32 rounding: the Brownian path is read there.

    A level one unit in the last place away may round to the next of the path's times.
    """
    one = np.float32(1.0)
    start, end = (np.float32(-math.log(level / (one - level))) for level in (np.float32(sigma), np.float32(after)))
    return float(one / (one + np.float32(math.exp(start + (end - start) / 2))))


def seeds_2(trace: Trace) -> Vector:
    """Take steps of SEEDS-2 (arXiv 2305.14267), with its stage in the middle."""
    x = trace.start
    for sigma, after in itertools.pairwise(_finite_levels(trace)):
        denoised = trace.denoise(x, sigma)
        if after == 0:
            return denoised
        path = _Path(trace, x, sigma, after)
        stage, middle = path.to(1 / 2)
        estimate = trace.denoise(stage - (1 - middle) * math.expm1(-path.h) * denoised, middle)
        end, _ = path.to(1)
        x = end - (1 - after) * math.expm1(-2 * path.h) * estimate
    return x


def seeds_3(trace: Trace) -> Vector:
    """Take steps of SEEDS-3 (arXiv 2305.14267), with its stages at one third and two thirds."""
    x = trace.start
    for sigma, after in itertools.pairwise(_finite_levels(trace)):
        denoised = trace.denoise(x, sigma)
        if after == 0:
            return denoised
        path = _Path(trace, x, sigma, after)
        start, level = path.to(1 / 3)
        estimate = trace.denoise(start - (1 - level) * math.expm1(-2 / 3 * path.h) * denoised, level)
        for position, weight in ((2 / 3, 2), (1, 3 / 2)):
            h = 2 * position * path.h
            share = weight * ((math.expm1(-h) + h) / h)
            start, level = path.to(position)
            x = start + (1 - level) * ((-math.expm1(-h) - share) * denoised + share * estimate)
            if position < 1:
                estimate = trace.denoise(x, level)
    return x


class _Path:
    """The linear part of one step of SEEDS: `x` and the noise accumulated between `sigma` and `after`."""

    def __init__(self, trace: Trace, x: Vector, sigma: float, after: float):
        self._trace, self._x, self._sigma = trace, x, sigma
        self._snr, self._position, self._noise = _snr(sigma), 0.0, Vector({})
        self.h = _snr(after) - _snr(sigma)

    def to(self, position: float) -> tuple[Vector, float]:
        """Return the point at `position` in the step (0 to 1) and its level. Positions must be ascending."""
        before, level = (_sigma(self._snr + part * self.h) for part in (self._position, position))
        h = (position - self._position) * self.h
        drawn = self._trace.noise(before, level)
        self._noise = math.exp(-h) * self._noise + math.sqrt(-math.expm1(-2 * h)) * drawn
        self._position = position
        return level / self._sigma * math.exp(-position * self.h) * self._x + level * self._noise, level


def er_sde(trace: Trace) -> Vector:
    """Take steps of ER-SDE-3 (arXiv 2309.06169) in ℓ = σ/α, with its integrals as sums of 200 terms."""
    x, slope_before = trace.start, None
    history: list[tuple[Vector, float]] = []
    for sigma, after in itertools.pairwise(_finite_levels(trace)):
        denoised = trace.denoise(x, sigma)
        if after == 0:
            return denoised
        alpha, start, end = 1 - after, sigma / (1 - sigma), after / (1 - after)
        step, scale = end - start, _er_scale(end)
        kept = scale / _er_scale(start)
        x = alpha * (kept / (1 - sigma) * x + (1 - kept) * denoised)
        points = end - step / ER_POINTS * np.arange(ER_POINTS)
        shares = -step / ER_POINTS / _er_scale(points)
        if history:
            slope = trace.keep((denoised - history[0][0]) / (start - history[0][1]))
            x = x + alpha * (step + scale * np.sum(shares)) * slope
            if slope_before is not None:
                bend = (slope - slope_before) / ((start - history[1][1]) / 2)
                x = x + alpha * (step**2 / 2 + scale * np.sum(shares * (points - start))) * bend
            slope_before = slope
        history = [(denoised, start), *history[:1]]
        x = x + alpha * math.sqrt(max(0.0, end**2 - (start * kept) ** 2)) * trace.noise(sigma, after)
    return x


def _er_scale(ratio: Any) -> Any:
    """Return g(ℓ), the noise scale that ER-SDE's authors found best."""
    return ratio * (np.exp(ratio**0.3) + 10)


def sa_solver(trace: Trace) -> Vector:
    """Take steps of SA-Solver (arXiv 2309.05019): stochastic Adams predictor of order 3, corrector of order 4.

    Noise is added (τ = 1) between one fifth and four fifths of the sampling.
    """
    levels = _finite_levels(trace)
    count = len(levels) - 1
    first, last = (percent_to_sigma(done, trace.shift) for done in SA_NOISY)
    x = point = trace.start
    noise, before, tau = Vector({}), None, 0.0
    estimates: list[Vector] = []
    for index, (sigma, after) in enumerate(itertools.pairwise(levels)):
        estimates = [trace.denoise(point, sigma), *estimates[:3]]
        if after == 0:
            return estimates[0]
        known = levels[index::-1]
        if before is not None:
            order = min(index + 1, 4, count - index)
            x = trace.keep(_stochastic_adams(x, before, sigma, estimates, known[:order], tau) + noise)
        tau, before = float(last <= after <= first), sigma
        point = _stochastic_adams(x, sigma, after, estimates, known[: min(index + 1, 3, count - 1 - index)], tau)
        if tau:
            h = _snr(after) - _snr(sigma)
            noise = trace.keep(after * math.sqrt(-math.expm1(-2 * tau**2 * h)) * trace.noise(sigma, after))
        else:
            noise = Vector({})
        point = point + noise
    return x


def _stochastic_adams(
    x: Vector, start: float, end: float, estimates: list[Vector], levels: list[float], tau: float
) -> Vector:
    """Take a step from level `start` to `end` along the polynomial in λ through the newest estimates.

    `levels` are the levels of those estimates.
    """
    growth, snr = 1 + tau**2, _snr(end)
    factors = lagrange_integrals(
        [_snr(level) for level in levels], _snr(start), snr, weight=lambda at: growth * np.exp(growth * (at - snr))
    )
    x = end / start * math.exp(-(tau**2) * (snr - _snr(start))) * x
    return x + (1 - end) * weighted(factors, estimates[: len(levels)])


def split_variance(sigma: float, after: float) -> tuple[float, float]:
    """Return the two parts of an ancestral step.

    They are the level below `after` to which it denoises, and the std of the noise that it then adds up to `after`.
    """
    return _level_below(sigma, after), after * math.sqrt(1 - (after / sigma) ** 2)


def _level_below(sigma: float, after: float) -> float:
    """Return the level at which a flow model's ancestral step ends before noise is added."""
    return after**2 / sigma


def _renoised(trace: Trace, x: Vector, sigma: float, after: float) -> Vector:
    """Return `x` with noise added from the level below up to `after`; unchanged at the last step."""
    if after == 0:
        return x
    down = _level_below(sigma, after)
    ratio = (1 - after) / (1 - down)
    return ratio * x + math.sqrt(after**2 - (down * ratio) ** 2) * trace.noise(sigma, after)


def _finite_levels(trace: Trace) -> list[float]:
    """Return the levels. A first level of 1, at which λ is infinite, is lowered slightly."""
    first, *rest = trace.sigmas
    return [float(np.float32(percent_to_sigma(1e-4, trace.shift))) if first >= 1 else first, *rest]


def _snr(sigma: float) -> float:
    """Return λ = ln(α / σ)."""
    return math.log((1 - sigma) / sigma)


def _sigma(snr: float) -> float:
    """Return the level σ for a given λ."""
    return 1 / (1 + math.exp(snr))
