"""Samplers that add no noise: they solve the ODE dx/dσ = d = (x − D)/σ, where D is the network's clean estimate.

Source: ComfyUI comfy/k_diffusion/sampling.py and comfy/k_diffusion/deis.py. The multistep methods integrate the
polynomial through the last derivatives (Adams-Bashforth).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated

import numpy as np

from anima_jax.diffusion.samplers.options import Between
from anima_jax.diffusion.samplers.plan import Trace, Vector

MaxOrder = Annotated[int, Between(1, 4)]

UNI_PC_LAST = 0.001

_QUADRATURE = np.polynomial.legendre.leggauss(64)
"""Gauss-Legendre points in [−1, 1] and their weights: exact up to rounding for everything integrated here."""


def euler(trace: Trace) -> Vector:
    """Take Euler steps: x + (σ' − σ)·d."""
    x = trace.start
    for sigma, after in trace.steps:
        x = x + (after - sigma) * derivative(trace, x, sigma)
    return x


def heun(trace: Trace) -> Vector:
    """Take Euler steps with the mean of the derivatives at both ends (Karras et al., arXiv 2206.00364, algorithm 2)."""
    x = trace.start
    for sigma, after in trace.steps:
        d = derivative(trace, x, sigma)
        if after > 0:
            d = (d + derivative(trace, x + (after - sigma) * d, after)) / 2
        x = x + (after - sigma) * d
    return x


def heunpp2(trace: Trace) -> Vector:
    """Take Euler steps with a mean of the derivatives at up to three levels ahead, weighted by those levels.

    The last step has one derivative, the one before it two.
    """
    x, levels = trace.start, trace.sigmas
    for index, (sigma, after) in enumerate(trace.steps):
        ahead = levels[index + 1 : -1][:2]
        shares = [level / ((len(ahead) + 1) * levels[0]) for level in ahead]
        d = derivative(trace, x, sigma)
        mean, point = (1 - sum(shares)) * d, x
        for before, level, share in zip([sigma, *ahead], ahead, shares, strict=False):
            point = point + (level - before) * d
            d = derivative(trace, point, level)
            mean = mean + share * d
        x = x + (after - sigma) * mean
    return x


def dpm_2(trace: Trace) -> Vector:
    """Take Euler steps with the derivative at the geometric mean of both levels (DPM-Solver-2)."""
    x = trace.start
    for sigma, after in trace.steps:
        x = midpoint_step(trace, x, sigma, after)
    return x


def midpoint_step(trace: Trace, x: Vector, sigma: float, after: float) -> Vector:
    """Take one step of `dpm_2`."""
    d = derivative(trace, x, sigma)
    if after > 0:
        middle = math.sqrt(sigma * after)
        d = derivative(trace, x + (middle - sigma) * d, middle)
    return x + (after - sigma) * d


def dpmpp_2m(trace: Trace) -> Vector:
    """Take steps of DPM-Solver++(2M), arXiv 2211.01095, with t = −ln σ.

    D is extrapolated from the last two estimates.
    """
    x, before = trace.start, None
    for sigma, after in trace.steps:
        now = denoised = trace.denoise(x, sigma)
        if before and after > 0:
            earlier, earlier_sigma = before
            half = math.log(sigma / after) / (2 * math.log(earlier_sigma / sigma))
            denoised = now + half * (now - earlier)
        x = (after / sigma) * x + (1 - after / sigma) * denoised
        before = now, sigma
    return x


def gradient_estimation(trace: Trace, *, ge_gamma: float = 2.0) -> Vector:
    """Take Euler steps with the derivative extrapolated by `ge_gamma` from the previous one (arXiv 2306.04848)."""
    x, before = trace.start, None
    for sigma, after in trace.steps:
        d = mean = trace.keep(derivative(trace, x, sigma))
        if before and after > 0:
            mean = before + ge_gamma * (d - before)
        x = x + (after - sigma) * mean
        before = d
    return x


def res_multistep(trace: Trace) -> Vector:
    """Take second-order exponential multistep steps, t = −ln σ (arXiv 2308.02157)."""
    x, before = trace.start, None
    for sigma, after in trace.steps:
        denoised = trace.denoise(x, sigma)
        x = res_step(x, sigma, after, denoised, before)
        before = denoised, sigma, after
    return x


def res_step(
    x: Vector, sigma: float, after: float, denoised: Vector, before: tuple[Vector, float, float] | None
) -> Vector:
    """Take one step of `res_multistep`.

    `before` is the previous estimate, its level, and the level at which that step ended.
    """
    if before is None or after == 0:
        return (after / sigma) * x + (1 - after / sigma) * denoised
    earlier, earlier_sigma, reached = before
    h = math.log(sigma / after)
    # A step that ended at 0 has no share in the next one.
    position = math.log(reached / earlier_sigma) / h if reached else math.inf
    phi_1 = -math.expm1(-h) / h
    share = (1 - phi_1) / h / position
    return math.exp(-h) * x + h * ((phi_1 - share) * denoised + share * earlier)


def lms(trace: Trace, *, order: Annotated[int, Between(1, 100)] = 4) -> Vector:
    """Take Adams-Bashforth steps with polynomials in the level itself."""
    return _multistep(trace, order, lambda levels, after: lagrange_integrals(levels, levels[0], after))


def deis(trace: Trace, *, max_order: MaxOrder = 3) -> Vector:
    """Take steps of DEIS (arXiv 2204.13902), 'tab'.

    d is a polynomial in the VP diffusion's time, integrated over σ.
    """
    return _multistep(trace, max_order, lambda levels, after: lagrange_integrals(levels, levels[0], after, of=_vp_time))


def _vp_time(sigma: np.ndarray) -> np.ndarray:
    """Return the time at which the VP diffusion has this level, given 0.002 at time 0.001 and 80 at time 1."""
    first, last = (math.log1p(level**2) for level in (0.002, 80.0))
    slope = 2 * (first / 1e-3 - last) / (1e-3 - 1)
    start = last - slope / 2
    return (np.sqrt(start**2 + 2 * slope * np.log1p(sigma**2)) - start) / slope


def ipndm(trace: Trace, *, max_order: MaxOrder = 4) -> Vector:
    """Take Adams-Bashforth steps with the factors for evenly spaced levels (arXiv 2202.09778)."""
    even = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
    return _multistep(trace, max_order, lambda levels, after: (after - levels[0]) * np.array(even[len(levels) - 1]))


def ipndm_v(trace: Trace, *, max_order: MaxOrder = 4) -> Vector:
    """Take Adams-Bashforth steps for uneven levels, except for three terms, which follow ComfyUI.

    They are the share of the second difference, the sign of `bend` in the share of the third, and the last of the third
    difference's factors, whose ratio should be h2 / h3.
    """

    def weights(levels: Sequence[float], after: float) -> Sequence[float] | np.ndarray:
        gaps = -np.diff([after, *levels])
        h, h1, h2, h3 = [*gaps, *[math.nan] * 3][:4]
        ratio, wide = h1 / h2, h1 * (h1 + h2) / (h2 * (h2 + h3))
        # Newton's form: divided differences as factors of the derivatives, and each difference's share of the step.
        differences = (
            (1, 0, 0, 0),
            (1, -1, 0, 0),
            (1, -1 - ratio, ratio, 0),
            (1, -1 - ratio - wide, ratio + wide * (1 + h2 / h3), -wide * ratio),
        )
        slope = (1 - h / (3 * (h + h1))) / 2
        bend = (1 - h / (2 * (h + h1))) * h / (6 * (h + h1 + h2))
        shares = (
            1,
            h / (2 * h1),
            (1 - h**2 / (3 * h1 * (h1 + h2))) / 2,
            (slope + bend) * h * (h + h1) * (h + h1 + h2) / (h1 * (h1 + h2) * (h1 + h2 + h3)),
        )
        order = len(levels)
        terms = [share * np.array(row[:order]) for share, row in zip(shares[:order], differences[:order], strict=True)]
        return h * np.sum(terms, axis=0)

    return _multistep(trace, max_order, weights)


def uni_pc(trace: Trace) -> Vector:
    """Take steps of UniPC of order 3 (arXiv 2302.04867) with B(h) = h."""
    return _uni_pc(trace, lambda h: h)


def uni_pc_bh2(trace: Trace) -> Vector:
    """Take steps of UniPC of order 3 with B(h) = eʰ − 1."""
    return _uni_pc(trace, math.expm1)


def _uni_pc(trace: Trace, scale: Callable[[float], float]) -> Vector:
    """Take steps of a predictor in λ and a corrector that uses the estimate at the predicted point.

    `scale` is B(h). The points are those of the VP diffusion, x·α with α = 1 / √(1 + σ²). A last level of 0 is replaced
    by `UNI_PC_LAST`.
    """
    levels = [*trace.sigmas[:-1], trace.sigmas[-1] or UNI_PC_LAST]
    count = len(levels) - 1
    alphas, stds, snrs = zip(*map(_vp_terms, levels), strict=True)
    x = point = trace.start / math.hypot(1, levels[0])
    estimates: list[Vector] = []
    corrector = None

    def moved(x: Vector, index: int, factors: Sequence[float], estimates: Sequence[Vector]) -> Vector:
        return (stds[index] / stds[index - 1]) * x + alphas[index] * weighted(factors, estimates)

    for index, sigma in enumerate(levels[:-1]):
        whole = math.hypot(1, sigma) * point
        noise = (whole - trace.denoise(whole, sigma)) / sigma
        new = trace.keep((point - stds[index] * noise) / alphas[index])
        if corrector is not None:
            x = trace.keep(moved(x, index, corrector, [*estimates, new]))
        if count == 1:
            break  # ComfyUI does not move the point in a single step.
        order = min(index + 1, count - 1, 3, count - index)
        estimates = [new, *estimates][:order]
        predictor, corrector = _uni_pc_factors(snrs[index::-1][:order], snrs[index + 1], scale)
        point = moved(x, index + 1, predictor, estimates)
    return point / alphas[-1]


def _vp_terms(sigma: float) -> tuple[float, float, float]:
    """Return the VP diffusion's α, std and λ = ln(α / std) at level `sigma` as ComfyUI's UniPC computes them.

    In float32 its 1 − α² has few digits at small levels: the std at 0.001 is 0.00101.
    """
    one = np.float32(1.0)
    log_alpha = np.float32(math.log(one / (np.float32(sigma) * np.float32(sigma) + one))) / 2
    variance = one - np.float32(math.exp(2 * log_alpha))
    return math.exp(log_alpha), math.sqrt(variance), float(log_alpha - np.float32(math.log(variance)) / 2)


def _uni_pc_factors(
    snrs: Sequence[float], after: float, scale: Callable[[float], float]
) -> tuple[list[float], list[float]]:
    """Return the predictor's and the corrector's factors of the estimates at these λ, newest first.

    The corrector's last factor is that of the new estimate at `after`.
    """
    order = len(snrs)
    h = snrs[0] - after
    ratios = np.array([(snrs[0] - snr) / h for snr in snrs[1:]] + [1.0])
    moments: list[float] = []
    phi = math.expm1(h) / h - 1
    for power in range(1, order + 1):
        moments.append(phi * math.factorial(power) / scale(h))
        phi = phi / h - 1 / math.factorial(power + 1)
    powers = ratios ** np.arange(order)[:, None]

    def solved(size: int) -> list[float]:
        shares = np.linalg.solve(powers[:size, :size], moments[:size]) if size != 1 else np.array([0.5])
        others = -scale(h) * shares / ratios[:size]
        return [-math.expm1(h) - others.sum(), *others]

    return solved(order - 1), solved(order)


def weighted(factors: Iterable[float], vectors: Iterable[Vector]) -> Vector:
    """Return Σ factor · vector."""
    total = Vector({})
    for factor, vector in zip(factors, vectors, strict=True):
        total = total + factor * vector
    return total


def _multistep(
    trace: Trace, order: int, weights: Callable[[Sequence[float], float], Sequence[float] | np.ndarray]
) -> Vector:
    """Take steps x + Σ wᵢ·dᵢ over up to `order` derivatives, newest first.

    `weights` maps their levels and the next level to wᵢ.
    """
    x = trace.start
    history: list[tuple[Vector, float]] = []
    for sigma, after in trace.steps:
        history = [(trace.keep(derivative(trace, x, sigma)), sigma), *history[: order - 1]]
        if after == 0:
            history = history[:1]
        factors = weights([level for _, level in history], after)
        x = x + weighted(factors, [d for d, _ in history])
    return x


def derivative(trace: Trace, x: Vector, sigma: float) -> Vector:
    """Evaluate the network and return (x − D)/σ."""
    denoised = trace.denoise(x, sigma)
    return (x - denoised) / sigma


def lagrange_integrals(
    nodes: Sequence[float],
    start: float,
    end: float,
    *,
    of: Callable[[np.ndarray], np.ndarray] = lambda level: level,
    weight: Callable[[np.ndarray], np.ndarray] = np.ones_like,
) -> np.ndarray:
    """Return the integrals from `start` to `end` of `weight` times each node's Lagrange polynomial.

    The polynomials are in the variable `of(level)`.
    """
    points = start + (end - start) * (_QUADRATURE[0] + 1) / 2
    shares = (end - start) / 2 * _QUADRATURE[1] * weight(points)
    positions, at = of(np.array(nodes)), of(points)
    integrals: list[float] = []
    for index, position in enumerate(positions):
        others = np.delete(positions, index)[:, None]
        integrals.append(np.sum(shares * np.prod((at - others) / (position - others), axis=0)))
    return np.array(integrals)
