"""DPM-Solver of orders 1 to 3 (arXiv 2206.00927), with steps of fixed and of adaptive size in t = −ln σ.

Source: ComfyUI comfy/k_diffusion/sampling.py, `DPMSolver` and `PIDStepSizeController`. As there, both samplers end at
the last level above 0, and what noise is left there stays in the result.
"""

import math
from collections.abc import Callable
from typing import Annotated

import numpy as np

from anima_jax.diffusion.samplers.ancestral import split_variance
from anima_jax.diffusion.samplers.ode import derivative
from anima_jax.diffusion.samplers.options import Between, Strength
from anima_jax.diffusion.samplers.plan import Trace, Vector
from anima_jax.errors import UserError

Order = Annotated[int, Between(2, 3)]

_ENOUGH = 1e-5
"""A distance to the last level, in t, that is not worth a step."""


def dpm_fast(trace: Trace) -> Vector:
    """Take steps of order 3, even in t, with as many evaluations as there are steps in the schedule."""
    evaluations = len(trace.sigmas) - 1
    count, rest = evaluations // 3 + 1, evaluations % 3
    orders = [3] * (count - 1) + [rest] if rest else [3] * (count - 2) + [2, 1]
    first, last = (-math.log(level) for level in (trace.sigmas[0], trace.sigmas[-1] or trace.sigmas[-2]))
    levels = np.exp(-np.linspace(first, last, count + 1))
    x = trace.start
    for order, sigma, after in zip(orders, levels[:-1], levels[1:], strict=True):
        x = _Step(trace, x, float(sigma)).to(float(after), order)
    return x


class _Step:
    """Solutions of several orders for one step from `x` at `sigma`. They share their evaluations."""

    def __init__(self, trace: Trace, x: Vector, sigma: float):
        self._trace, self._x, self._sigma = trace, x, sigma
        self._start = derivative(trace, x, sigma)
        self._stages: dict[float, Vector] = {}

    def to(self, after: float, order: int, first: float | None = None) -> Vector:
        """Return the point at level `after`. The first stage is at `first` of the step, by default 1 / order."""
        h = math.log(self._sigma / after)
        end = self._x - after * math.expm1(h) * self._start
        if order == 1:
            return end
        first = first or 1 / order
        middle = self._stage(first * h, lambda level: self._x - level * math.expm1(first * h) * self._start)
        if order == 2:
            return end - after / (2 * first) * math.expm1(h) * (middle - self._start)

        def second(level: float) -> Vector:
            part = 2 / 3 * h
            point = self._x - level * math.expm1(part) * self._start
            return point - 2 * level * (math.expm1(part) / part - 1) * (middle - self._start)

        later = self._stage(2 / 3 * h, second)
        return end - after * 3 / 2 * (math.expm1(h) / h - 1) * (later - self._start)

    def _stage(self, part: float, point: Callable[[float], Vector]) -> Vector:
        """Return the derivative at `part` of the step in t, at the point that `point` returns for the level there."""
        if part not in self._stages:
            level = self._sigma * math.exp(-part)
            self._stages[part] = derivative(self._trace, point(level), level)
        return self._stages[part]


def dpm_adaptive(trace: Trace, *, order: Order = 3, eta: Strength = 0.0, s_noise: Strength = 1.0) -> list[Vector]:
    """Take one step whose error is estimated, between the first two of three levels; the third ends the sampling.

    The results are the point after the step, the solution of one order less, its difference from the solution
    without noise, and the point before the step.
    """
    sigma, after, last = trace.sigmas
    down, up = split_variance(sigma, after, eta)
    if eta:
        down = max(down, last)
        up = math.sqrt(after**2 - down**2)
    step = _Step(trace, trace.start, sigma)
    low = step.to(down, order - 1, first=1 / 3 if order == 3 else None)
    high = step.to(down, order)
    point = high + s_noise * up * trace.noise(sigma, after) if eta else high
    return [point, low, low - high, trace.start]


class StepController:
    """The sizes of `dpm_adaptive`'s steps: a PID controller of the error.

    `rtol` and `atol` are the relative and absolute tolerances against which the error is measured, `h_init` is the
    first step in t = −ln σ. A step is accepted if the factor of the next one's size is at least `accept_safety`.
    """

    def __init__(
        self,
        sigmas: np.ndarray,
        *,
        order: Order = 3,
        rtol: Strength = 0.05,
        atol: Strength = 0.0078,
        h_init: Strength = 0.05,
        pcoeff: Strength = 0.0,
        icoeff: Strength = 1.0,
        dcoeff: Strength = 0.0,
        accept_safety: Strength = 0.81,
        eta: Strength = 0.0,
    ):
        self.rtol, self.atol = rtol, atol
        levels = list(np.asarray(sigmas, np.float32))
        self._first = self._now = -np.log(levels[0])
        self._last = -np.log(levels[-1] or levels[-2])
        self._h, self._accept_safety = h_init, accept_safety
        share = 1 / (1.5 if eta else order)
        self._powers = ((pcoeff + icoeff + dcoeff) * share, -(pcoeff + 2 * dcoeff) * share, dcoeff * share)
        self._inverse_errors: list[float] = []

    @property
    def progress(self) -> float:
        """How much of the way in t is done, 0 to 1."""
        way = self._last - self._first
        return float((self._now - self._first) / way) if way > 0 else 1.0

    @property
    def finished(self) -> bool:
        """Whether the last level is reached."""
        return not self._now < self._last - _ENOUGH

    @property
    def levels(self) -> np.ndarray:
        """The levels at which the next step starts and ends, and the last level, float32."""
        return np.exp(-np.array([self._now, self._next, self._last], np.float32))

    @property
    def _next(self) -> np.float32:
        return min(self._last, np.float32(self._now + self._h))

    def accept(self, error: float) -> bool:
        """Return whether a step with this error is accepted, and choose the size of the next one.

        Raises UserError if the error is not a finite number, and if sampling would never end.
        """
        if not math.isfinite(error):
            raise UserError(f"sampler 'dpm_adaptive': the error of a step is {error}, expected a finite number")
        inverse, tried = 1 / (error + 1e-8), self._next
        past = [inverse, *(self._inverse_errors or [inverse, inverse])]
        try:
            factor = 1 + math.atan(math.prod(map(pow, past, self._powers)) - 1)
        except OverflowError:
            raise UserError("sampler 'dpm_adaptive': pcoeff, icoeff or dcoeff is too large") from None
        accepted = factor >= self._accept_safety
        if accepted:
            self._now = tried
            self._inverse_errors = past[:2]
        elif not self._inverse_errors:
            self._inverse_errors = past[1:]
        self._h *= factor
        if not accepted and self._next == tried:
            raise UserError("sampler 'dpm_adaptive': no step is accepted with these rtol, atol and accept_safety")
        return accepted
