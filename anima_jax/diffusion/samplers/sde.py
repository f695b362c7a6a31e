"""Samplers that add noise at every step, as exponential integrators of the diffusion's SDE.

Source: ComfyUI comfy/k_diffusion/sampling.py and sa_solver.py, in their flow-model forms: a point at level σ is (1 −
σ)·D + σ·noise. They integrate over the half log-SNR λ = ln((1 − σ)/σ), ER-SDE over e^−λ; α is 1 − σ, n is standard
normal noise. `eta` is the strength of the SDE's noise (0: the ODE), `s_noise` the factor of the noise.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np

from anima_jax.diffusion.samplers.ancestral import log_snr, sigma_of
from anima_jax.diffusion.samplers.ode import lagrange_integrals, weighted
from anima_jax.diffusion.samplers.options import Between, Strength
from anima_jax.diffusion.samplers.plan import Trace, Vector
from anima_jax.diffusion.schedules import percent_to_sigma

ER_POINTS = 200

Fraction = Annotated[float, Between(0.0, 1.0)]


def dpmpp_2m_sde(
    trace: Trace,
    *,
    solver_type: Literal["midpoint", "heun"] = "midpoint",
    eta: Strength = 1.0,
    s_noise: Strength = 1.0,
) -> Vector:
    """Take steps of SDE-DPM-Solver++(2M), arXiv 2211.01095."""
    shares = _phi_2_3 if solver_type == "heun" else lambda h: (-math.expm1(-h) / 2, 0.0)
    return _multistep_sde(trace, 2, shares, eta, s_noise)


def dpmpp_3m_sde(trace: Trace, *, eta: Strength = 1.0, s_noise: Strength = 1.0) -> Vector:
    """Take steps of SDE-DPM-Solver++(3M)."""
    return _multistep_sde(trace, 3, _phi_2_3, eta, s_noise)


def _phi_2_3(h: float) -> tuple[float, float]:
    """Return φ₂ and φ₃ of an exponential integrator over a step of −h."""
    phi_2 = math.expm1(-h) / h + 1
    return phi_2, phi_2 / h - 0.5


def _multistep_sde(
    trace: Trace, order: int, shares: Callable[[float], tuple[float, float]], eta: float, s_noise: float
) -> Vector:
    """Take steps of an exponential integrator in λ with up to two derivatives of the estimates.

    `shares` maps 1 + eta times the step in λ to the weights of the derivatives.
    """
    x = trace.start
    history: list[tuple[Vector, float]] = []
    for sigma, after in itertools.pairwise(_finite_levels(trace)):
        now = trace.denoise(x, sigma)
        if after == 0:
            return now
        h = log_snr(after) - log_snr(sigma)
        x = (after / sigma) * math.exp(-eta * h) * x - (1 - after) * math.expm1(-(1 + eta) * h) * now
        history = [(now, log_snr(sigma)), *history[: order - 1]]
        slope, bend = _differences(history, h)
        first, second = shares((1 + eta) * h)
        x = x + (1 - after) * (first * slope - second * bend)
        if eta and s_noise:
            x = x + s_noise * after * math.sqrt(-math.expm1(-2 * eta * h)) * trace.noise(sigma, after)
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


def dpmpp_sde(trace: Trace, *, eta: Strength = 1.0, s_noise: Strength = 1.0, r: Strength = 0.5) -> Vector:
    """Take steps of SDE-DPM-Solver++ of order 2, with a stage at `r` of the step, by default in the middle.

    The stage and the step are both ancestral steps in e^−λ = σ/α.
    """
    x = trace.start
    for sigma, after in itertools.pairwise(_finite_levels(trace)):
        denoised = trace.denoise(x, sigma)
        if after == 0:
            return denoised
        middle, *ratios = _rounded(sigma, after, r)
        stage = trace.denoise(_ancestral_sde(trace, x, denoised, (sigma, middle), ratios[:2], eta, s_noise), middle)
        denoised = denoised + (stage - denoised) / (2 * r)
        x = _ancestral_sde(trace, x, denoised, (sigma, after), ratios[::2], eta, s_noise)
    return x


def _ancestral_sde(
    trace: Trace,
    x: Vector,
    denoised: Vector,
    levels: tuple[float, float],
    ratios: Sequence[np.float32],
    eta: float,
    s_noise: float,
) -> Vector:
    """Take a step from the first level towards `denoised` to one below the second, then add noise up to that.

    `ratios` are σ/α of both. The step in them is rounded as in ComfyUI: after the first level, where σ/α is 30,000, the
    part that is denoised is a difference of nearly equal numbers.
    """
    (sigma, after), (ratio, end) = levels, ratios
    up = min(end, np.float32(eta) * np.sqrt(end**2 * (ratio**2 - end**2) / ratio**2))
    kept, alpha = float(np.sqrt(end**2 - up**2)) * (1 - sigma) / sigma, 1 - after
    x = alpha * (kept / (1 - sigma) * x + (1 - kept) * denoised)
    return x + alpha * s_noise * float(up) * trace.noise(sigma, after) if eta and s_noise else x


def _rounded(sigma: float, after: float, r: float) -> tuple[float, np.float32, np.float32, np.float32]:
    """Return the level at `r` of a step in λ, and σ/α of the first level, of this one and of the last one.

    They have ComfyUI's float32 rounding. The Brownian path is read at the level: if that were one unit in the last
    place away, it might round to the next of the path's times.
    """
    one = np.float32(1.0)
    start, end = (np.float32(-math.log(level / (one - level))) for level in (np.float32(sigma), np.float32(after)))
    middle = start + (end - start) * np.float32(r)
    first, within, last = (np.float32(math.exp(-snr)) for snr in (start, middle, end))
    return float(one / (one + np.float32(math.exp(middle)))), first, within, last


def seeds_2(
    trace: Trace,
    *,
    solver_type: Literal["phi_1", "phi_2"] = "phi_1",
    eta: Strength = 1.0,
    s_noise: Strength = 1.0,
    r: Annotated[float, Between(0.01, 1.0)] = 0.5,
) -> Vector:
    """Take steps of SEEDS-2 (arXiv 2305.14267), with a stage at `r` of the step, by default in the middle."""
    x = trace.start
    for sigma, after in itertools.pairwise(_finite_levels(trace)):
        denoised = trace.denoise(x, sigma)
        if after == 0:
            return denoised
        path = _Path(trace, x, sigma, after, eta, s_noise)
        start, middle = path.to(r)
        estimate = trace.denoise(start - (1 - middle) * math.expm1(-r * path.h) * denoised, middle)
        whole = math.expm1(-path.h)
        share = whole / (2 * r) if solver_type == "phi_1" else _h_phi_2(-path.h) / r
        start, _ = path.to(1)
        x = start - (1 - after) * ((whole - share) * denoised + share * estimate)
    return x


def seeds_3(
    trace: Trace,
    *,
    eta: Strength = 1.0,
    s_noise: Strength = 1.0,
    r_1: Annotated[float, Between(0.01, 1.0)] = 1 / 3,
    r_2: Annotated[float, Between(0.01, 1.0)] = 2 / 3,
) -> Vector:
    """Take steps of SEEDS-3 (arXiv 2305.14267), with its stages at `r_1` and `r_2` of the step."""
    x = trace.start
    for sigma, after in itertools.pairwise(_finite_levels(trace)):
        denoised = trace.denoise(x, sigma)
        if after == 0:
            return denoised
        path = _Path(trace, x, sigma, after, eta, s_noise)
        start, level = path.to(r_1)
        estimate = trace.denoise(start - (1 - level) * math.expm1(-r_1 * path.h) * denoised, level)
        for position, weight in ((r_2, r_2 / r_1), (1, 1 / r_2)):
            share = weight * _h_phi_2(-position * path.h)
            start, level = path.to(position)
            x = start - (1 - level) * ((math.expm1(-position * path.h) - share) * denoised + share * estimate)
            if position == r_2:
                estimate = trace.denoise(x, level)
    return x


def _h_phi_2(h: float) -> float:
    """Return h·φ₂(h) of an exponential integrator."""
    return (math.expm1(h) - h) / h


class _Path:
    """The linear part of one step of SEEDS: `x` and the noise accumulated between `sigma` and `after`.

    `h` is the step in λ times 1 + eta.
    """

    def __init__(self, trace: Trace, x: Vector, sigma: float, after: float, eta: float, s_noise: float):
        self._trace, self._x, self._sigma = trace, x, sigma
        self._eta, self._s_noise = eta, s_noise
        self._snr, self._position, self._noise = log_snr(sigma), 0.0, Vector({})
        self._step = log_snr(after) - self._snr
        self.h = (1 + eta) * self._step

    def to(self, position: float) -> tuple[Vector, float]:
        """Return the point at `position` in the step (0 to 1) and its level. Positions must be ascending."""
        before, level = (sigma_of(self._snr + part * self._step) for part in (self._position, position))
        if self._eta and self._s_noise:
            h = (position - self._position) * self._eta * self._step
            drawn = self._trace.noise(before, level)
            self._noise = math.exp(-h) * self._noise + math.sqrt(-math.expm1(-2 * h)) * drawn
        self._position = position
        kept = level / self._sigma * math.exp(-position * self._eta * self._step)
        return kept * self._x + self._s_noise * level * self._noise, level


def er_sde(
    trace: Trace,
    *,
    solver_type: Literal["ER-SDE", "Reverse-time SDE", "ODE"] = "ER-SDE",
    max_stage: Annotated[int, Between(1, 3)] = 3,
    eta: Strength = 1.0,
    s_noise: Strength = 1.0,
) -> Vector:
    """Take steps of ER-SDE (arXiv 2309.06169) in ℓ = σ/α, with its integrals as sums of 200 terms.

    Its noise scale is the one its authors found best, or ℓ^(1 + eta) of the reverse-time SDE and the ODE (eta 0).
    """
    scale_of, exponent = _er_scale, 1 + (0.0 if solver_type == "ODE" else eta)
    if solver_type != "ER-SDE":
        scale_of, s_noise = (lambda ratio: ratio**exponent), s_noise if exponent > 1 else 0.0
    x, slope_before = trace.start, None
    history: list[tuple[Vector, float]] = []
    for sigma, after in itertools.pairwise(_finite_levels(trace)):
        denoised = trace.denoise(x, sigma)
        if after == 0:
            return denoised
        alpha, start, end = 1 - after, sigma / (1 - sigma), after / (1 - after)
        step, scale = end - start, scale_of(end)
        kept = scale / scale_of(start)
        x = alpha * (kept / (1 - sigma) * x + (1 - kept) * denoised)
        points = end - step / ER_POINTS * np.arange(ER_POINTS)
        shares = -step / ER_POINTS / scale_of(points)
        if history and max_stage >= 2:
            slope = trace.keep((denoised - history[0][0]) / (start - history[0][1]))
            x = x + alpha * (step + scale * np.sum(shares)) * slope
            if slope_before is not None and max_stage >= 3:
                bend = (slope - slope_before) / ((start - history[1][1]) / 2)
                x = x + alpha * (step**2 / 2 + scale * np.sum(shares * (points - start))) * bend
            slope_before = slope
        history = [(denoised, start), *history[:1]]
        if s_noise:
            std = math.sqrt(max(0.0, end**2 - (start * kept) ** 2))
            x = x + alpha * s_noise * std * trace.noise(sigma, after)
    return x


def _er_scale(ratio: Any) -> Any:
    """Return g(ℓ), the noise scale that ER-SDE's authors found best."""
    return ratio * (np.exp(ratio**0.3) + 10)


def sa_solver(
    trace: Trace,
    *,
    eta: Annotated[float, Between(0.0, 10.0)] = 1.0,
    sde_start_percent: Fraction = 0.2,
    sde_end_percent: Fraction = 0.8,
    s_noise: Strength = 1.0,
    predictor_order: Annotated[int, Between(1, 6)] = 3,
    corrector_order: Annotated[int, Between(0, 6)] = 4,
    use_pece: bool = False,
    simple_order_2: bool = False,
) -> Vector:
    """Take steps of SA-Solver (arXiv 2309.05019): a stochastic Adams predictor and a corrector.

    Noise is added (τ = eta) between two fractions of the sampling, by default one fifth and four fifths. With
    `use_pece` the network is evaluated again at each corrected point.
    """
    levels = _finite_levels(trace)
    # Near the end the orders are lowered, if the end is an image.
    left = len(levels) - 1 if levels[-1] == 0 else math.inf
    first, last = (percent_to_sigma(done, trace.shift) for done in (sde_start_percent, sde_end_percent))
    x = point = trace.start
    noise, tau = Vector({}), 0.0
    estimates: list[Vector] = []
    for index, (sigma, after) in enumerate(itertools.pairwise(levels)):
        denoised = trace.denoise(point, sigma)
        estimates = [denoised, *estimates[: max(predictor_order, corrector_order) - 1]]
        known = levels[index::-1][: len(estimates)]
        order = 0 if index == 0 or (after == 0 and not use_pece) else int(min(corrector_order, left - index))
        if order:
            simple = _simple_corrector if simple_order_2 else None
            x = _stochastic_adams(x, levels[index - 1], sigma, estimates, known[:order], tau, simple)
            x = trace.keep(x + noise)
            if use_pece:
                denoised = estimates[0] = trace.denoise(x, sigma)
        else:
            x = point
        if after == 0:
            return denoised
        tau = eta if last <= after <= first else 0.0
        simple = _simple_predictor if simple_order_2 else None
        order = int(min(predictor_order, left - 1 - index))
        point = _stochastic_adams(x, sigma, after, estimates, known[:order], tau, simple)
        noise = Vector({})
        if tau and s_noise:
            h = log_snr(after) - log_snr(sigma)
            std = after * math.sqrt(-math.expm1(-2 * tau**2 * h))
            noise = trace.keep(s_noise * std * trace.noise(sigma, after))
        point = point + noise
    # Where noise is left over, ComfyUI 0.3.75 returned the last evaluation's point instead; later versions do not.
    return point


def _stochastic_adams(
    x: Vector,
    start: float,
    end: float,
    estimates: list[Vector],
    levels: list[float],
    tau: float,
    simple: Callable[[float, float, float], float] | None,
) -> Vector:
    """Take a step from level `start` to `end` along the polynomial in λ through the newest estimates.

    `levels` are the levels of those estimates. If there are two, `simple` returns the share of the older one.
    """
    growth, snr, h = 1 + tau**2, log_snr(end), log_snr(end) - log_snr(start)
    snrs = [log_snr(level) for level in levels]
    if simple and len(levels) == 2:
        older = simple(growth, h, snrs[1] - log_snr(start))
        factors = np.array([-math.expm1(-growth * h) - older, older])
    else:
        factors = lagrange_integrals(snrs, log_snr(start), snr, weight=lambda at: growth * np.exp(growth * (at - snr)))
    x = end / start * math.exp(-(tau**2) * h) * x
    return x + (1 - end) * weighted(factors, estimates[: len(levels)])


def _simple_predictor(growth: float, h: float, gap: float) -> float:
    """Return the share of the older estimate, `gap` away from the start, in SA-Solver's simple two-step predictor."""
    return growth * h**2 / 2 / gap


def _simple_corrector(growth: float, h: float, gap: float) -> float:
    """Return the share of the older estimate in SA-Solver's simple one-step corrector."""
    return -math.expm1(-growth * h) - growth * h / 2


def _finite_levels(trace: Trace) -> list[float]:
    """Return the levels. A first level of 1, at which λ is infinite, is lowered slightly."""
    first, *rest = trace.sigmas
    return [float(np.float32(percent_to_sigma(1e-4, trace.shift))) if first >= 1 else first, *rest]
