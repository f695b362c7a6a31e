"""Conversion of a sampler's formulas to the numbers that one compiled step needs.

Between two evaluations of the network a sampler is linear: it sums points, estimates and noise with factors that depend
only on the noise levels. Its formulas therefore run once on the host, in float64, on `Vector`s, which record the sums.
The result is a `SamplerPlan`: for each evaluation the noise level, and the factors that turn the current arrays into
those that the next evaluation needs. One step function serves all samplers, and nothing is recompiled when noise levels
change.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Vector:
    """A sum of arrays that exist only on the device: `terms` maps each array's number in the trace to its factor."""

    def __init__(self, terms: dict[int, float]):
        self.terms = terms

    @property
    def number(self) -> int:
        """The array's number, if the vector is a single array."""
        (number,) = self.terms
        return number

    def __add__(self, other: "Vector") -> "Vector":
        numbers = self.terms.keys() | other.terms.keys()
        return Vector({number: self.terms.get(number, 0.0) + other.terms.get(number, 0.0) for number in numbers})

    def __mul__(self, factor: float) -> "Vector":
        return Vector({number: float(factor) * value for number, value in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "Vector":
        return self * (1.0 / divisor)

    def __neg__(self) -> "Vector":
        return self * -1.0

    def __sub__(self, other: "Vector") -> "Vector":
        return self + -other


class Draw(NamedTuple):
    """A noise array that a sampler uses between one noise level and the next.

    It is limited to `clip_std` of its standard deviations, unless that is 0.
    """

    sigma: float
    next_sigma: float
    clip_std: float = 0.0


@dataclasses.dataclass
class _Evaluation:
    """One evaluation of the network and the arrays computed from it before the next one."""

    sigma: float
    point: int
    denoised: int
    unconditional: int
    noises: list[int] = dataclasses.field(default_factory=list[int])
    sums: dict[int, dict[int, float]] = dataclasses.field(default_factory=dict[int, dict[int, float]])
    """Array → the arrays that it is the sum of, with their factors."""


class Trace:
    """A record of a sampler's formulas, made while they run.

    `sigmas` are Python floats, descending; `shift` is the schedule's; `start` is the point at the first level.
    """

    def __init__(self, sigmas: np.ndarray, shift: float):
        self.sigmas = [float(sigma) for sigma in np.asarray(sigmas, np.float32)]
        self.shift = shift
        self._numbers = itertools.count()
        self.start = self._new()
        self.draws: list[Draw] = []
        self.evaluations: list[_Evaluation] = []

    def _new(self) -> Vector:
        return Vector({next(self._numbers): 1.0})

    @property
    def steps(self) -> Iterator[tuple[float, float]]:
        """Pairs of each noise level and the next."""
        return itertools.pairwise(self.sigmas)

    def denoise(self, x: Vector, sigma: float) -> Vector:
        """Return the network's estimate of the clean latents from the point `x` at this noise level."""
        return self.denoise_both(x, sigma)[0]

    def denoise_both(self, x: Vector, sigma: float) -> tuple[Vector, Vector]:
        """Return the guided estimate and the negative prompt's own estimate."""
        point = self.keep(x) if self.evaluations else x
        guided, unconditional = self._new(), self._new()
        self.evaluations.append(_Evaluation(sigma, point.number, guided.number, unconditional.number))
        return guided, unconditional

    def noise(self, sigma: float, next_sigma: float, clip_std: float = 0.0) -> Vector:
        """Return new standard normal noise for the path from `sigma` to `next_sigma`; for `clip_std` see `Draw`."""
        drawn = self._new()
        self.draws.append(Draw(sigma, next_sigma, clip_std))
        self.evaluations[-1].noises.append(drawn.number)
        return drawn

    def keep(self, x: Vector) -> Vector:
        """Return `x` stored as a new array, so that later formulas do not need the arrays that it is the sum of."""
        terms = x.terms
        x.terms = self._new().terms
        self.evaluations[-1].sums[x.number] = terms
        return x


class SamplerPlan(NamedTuple):
    """A sampler's n evaluations, with k arrays carried between them.

    The j inputs of a step are the k arrays, the estimate, the negative prompt's estimate if `both`, and the new noise
    arrays. Array 0 is the point at which the network is evaluated; after the last step it is the result, and further
    results follow it.
    """

    sigmas_n: np.ndarray
    """Noise level of each evaluation, float32."""

    factors_nkj: np.ndarray
    """Factors of the next k arrays, which are sums of the j inputs, float32."""

    draw_numbers_nq: np.ndarray
    """Numbers in `draws` of the noise arrays that are new at each evaluation, int; −1 for none."""

    draws: tuple[Draw, ...]
    both: bool


Formulas = Callable[..., Vector | list[Vector]]
"""A sampler's formulas: a function that computes the result from `trace.start` and evaluations of the network.

Its first argument is the `Trace`, its keyword-only parameters are the sampler's options.
"""


def make_plan(formulas: Formulas, sigmas: np.ndarray, shift: float) -> SamplerPlan:
    """Return the plan of a sampler's formulas along `sigmas`, at least two descending levels."""
    trace = Trace(sigmas, shift)
    results = formulas(trace)
    results = [trace.keep(Vector(result.terms)) for result in (results if isinstance(results, list) else [results])]
    evaluations = trace.evaluations
    carried = _carried(evaluations, [result.number for result in results])
    used = {source for evaluation in evaluations for terms in evaluation.sums.values() for source in terms}
    both = any(evaluation.unconditional in used for evaluation in evaluations)
    fresh = max(len(evaluation.noises) for evaluation in evaluations)
    count = max(map(len, carried))
    factors = np.zeros((len(evaluations), count, count + 1 + both + fresh))
    noises = np.full((len(evaluations), fresh), -1)
    drawn = 0
    for index, evaluation in enumerate(evaluations):
        columns = {number: column for column, number in enumerate(carried[index])}
        columns[evaluation.denoised] = count
        if both:
            columns[evaluation.unconditional] = count + 1
        columns |= {number: count + 1 + both + index for index, number in enumerate(evaluation.noises)}
        for row, number in enumerate(carried[index + 1]):
            for source, factor in _expanded(evaluation.sums, number).items():
                factors[index, row, columns[source]] = factor
        noises[index, : len(evaluation.noises)] = drawn + np.arange(len(evaluation.noises))
        drawn += len(evaluation.noises)
    levels = np.array([evaluation.sigma for evaluation in evaluations], np.float32)
    return SamplerPlan(levels, factors.astype(np.float32), noises, tuple(trace.draws), both)


def _carried(evaluations: list[_Evaluation], results: Sequence[int]) -> list[list[int]]:
    """Return the arrays carried into each evaluation and out of the last: the point, then those needed later."""
    carried = [list(results)]
    for evaluation in reversed(evaluations):
        sources = {source for number in carried[-1] for source in _expanded(evaluation.sums, number)}
        new = {evaluation.point, evaluation.denoised, evaluation.unconditional, *evaluation.noises}
        carried.append([evaluation.point, *sorted(sources - new)])
    return carried[::-1]


def _expanded(sums: dict[int, dict[int, float]], number: int) -> dict[int, float]:
    """Return an array as a sum (array → factor) of arrays that are not sums themselves."""
    if number not in sums:
        return {number: 1.0}
    total: dict[int, float] = {}
    for source, factor in sums[number].items():
        for deeper, value in _expanded(sums, source).items():
            total[deeper] = total.get(deeper, 0.0) + factor * value
    return {source: factor for source, factor in total.items() if factor}
