"""Brownian motion over the noise levels as torchsde's `BrownianTree` has it for a seed.

ComfyUI's dpmpp SDE samplers take their noise from it, so that a picture changes little with the number of steps: the
path is the same, only looked at elsewhere. An interval's increment is divided at its midpoint by a Brownian bridge,
with noise of the node's own seed. Source: torchsde/_brownian/brownian_interval.py (halfway tree, tolerance 1e-6).
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from anima_jax.diffusion.torch_random import Stream

_DIGITS = 6
"""Times are rounded to so many decimals."""

_ENTROPY_POOL = 24


@dataclasses.dataclass
class _Node:
    """An interval and the motion's increment over it; `place` is its number (level by level) and depth in the tree."""

    start: float
    end: float
    increment: np.ndarray
    place: tuple[int, int]
    before: np.ndarray
    """The motion at `start`, float64."""


class BrownianTree:
    """A motion from 0 at `start` to `end`; every array has `shape`. `stream` makes a generator of a seed."""

    def __init__(self, seed: int, start: float, end: float, shape: tuple[int, ...], stream: Callable[[int], Stream]):
        self._seed, self._shape, self._stream = seed, shape, stream
        whole = self._normal(()) * np.float32(math.sqrt(end - start))
        self._path = [_Node(round(start, _DIGITS), round(end, _DIGITS), whole, (0, 0), np.zeros(shape))]

    def __call__(self, sigma: float, next_sigma: float) -> np.ndarray:
        """Standard normal noise, float32: the way from `sigma` down to `next_sigma`, divided by its deviation."""
        moved = self._at(next_sigma) - self._at(sigma)
        return (moved / math.sqrt(sigma - next_sigma)).astype(np.float32)

    def _at(self, time: float) -> np.ndarray:
        """The motion at `time`, float64. Keeps the nodes on the way to it, for the next time is near."""
        root = self._path[0]
        time = min(max(round(time, _DIGITS), root.start), root.end)
        while not self._path[-1].start <= time <= self._path[-1].end:
            self._path.pop()
        while True:
            node = self._path[-1]
            if time == node.start:
                return node.before
            if time == node.end:
                return node.before + node.increment
            self._path.append(self._half(node, time))

    def _half(self, node: _Node, time: float) -> _Node:
        """The half of `node` in which `time` is."""
        middle = round(0.5 * (node.start + node.end), _DIGITS)
        left, right, whole = middle - node.start, node.end - middle, 1 / (node.end - node.start)
        increment = np.float32(left) * node.increment * np.float32(whole)
        increment = increment + np.float32(math.sqrt(left * right * whole)) * self._normal(node.place)
        number, depth = node.place
        if time <= middle:
            return _Node(node.start, middle, increment, (2 * number, depth + 1), node.before)
        rest = node.increment - increment
        return _Node(middle, node.end, rest, (2 * number + 1, depth + 1), node.before + increment)

    def _normal(self, place: tuple[int, ...]) -> np.ndarray:
        """The noise that a node divides its increment with; for no node, that of the whole increment."""
        entropy = np.random.SeedSequence(self._seed, spawn_key=place, pool_size=_ENTROPY_POOL)
        return self._stream(int(entropy.generate_state(1)[0])).randn(self._shape)
