"""Brownian motion over the noise levels, equal to torchsde's `BrownianTree` for the same seed.

ComfyUI's dpmpp SDE samplers draw their noise from it, so an image changes little with the number of steps: the path is
the same, evaluated at other points. A Brownian bridge splits an interval's increment at its midpoint, with noise from
the seed of that node of the tree. Source: torchsde/_brownian/brownian_interval.py (halfway tree, tolerance 1e-6).
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from anima_jax.diffusion.torch_random import RandomStream

_DIGITS = 6
"""Decimal places to which times are rounded."""

_ENTROPY_POOL = 24


@dataclasses.dataclass
class _Node:
    """An interval and the motion's increment over it; `path` is (index within its level of the tree, level)."""

    start: float
    end: float
    increment: np.ndarray
    path: tuple[int, int]
    before: np.ndarray
    """The motion at `start`, float64."""


class BrownianTree:
    """A Brownian motion from `start`, where it is 0, to `end`: float64 arrays of `shape`.

    `stream` returns the random stream for a seed.
    """

    def __init__(
        self, seed: int, start: float, end: float, shape: tuple[int, ...], stream: Callable[[int], RandomStream]
    ):
        self._seed, self._shape, self._stream = seed, shape, stream
        total = self._normal(()) * np.float32(math.sqrt(end - start))
        self._nodes = [_Node(round(start, _DIGITS), round(end, _DIGITS), total, (0, 0), np.zeros(shape))]

    def __call__(self, sigma: float, next_sigma: float) -> np.ndarray:
        """Return standard normal noise, float32: the increment from `sigma` to `next_sigma`, over its std.

        It is 0 between two equal levels.
        """
        if sigma == next_sigma:
            return np.zeros(self._shape, np.float32)
        moved = self._at(next_sigma) - self._at(sigma)
        return (moved / math.sqrt(abs(sigma - next_sigma))).astype(np.float32)

    def _at(self, time: float) -> np.ndarray:
        """Return the motion at `time`, float64.

        The nodes on the path to it are kept, because the next time is usually near.
        """
        root = self._nodes[0]
        time = min(max(round(time, _DIGITS), root.start), root.end)
        while not self._nodes[-1].start <= time <= self._nodes[-1].end:
            self._nodes.pop()
        while True:
            node = self._nodes[-1]
            if time == node.start:
                return node.before
            if time == node.end:
                return node.before + node.increment
            self._nodes.append(self._half(node, time))

    def _half(self, node: _Node, time: float) -> _Node:
        """Return the half of `node` that contains `time`."""
        middle = round(0.5 * (node.start + node.end), _DIGITS)
        left, right, inverse = middle - node.start, node.end - middle, 1 / (node.end - node.start)
        increment = np.float32(left) * node.increment * np.float32(inverse)
        increment = increment + np.float32(math.sqrt(left * right * inverse)) * self._normal(node.path)
        index, depth = node.path
        if time <= middle:
            return _Node(node.start, middle, increment, (2 * index, depth + 1), node.before)
        rest = node.increment - increment
        return _Node(middle, node.end, rest, (2 * index + 1, depth + 1), node.before + increment)

    def _normal(self, path: tuple[int, ...]) -> np.ndarray:
        """Return the noise that splits the increment of the node at `path`; for (), the noise of the whole motion."""
        entropy = np.random.SeedSequence(self._seed, spawn_key=path, pool_size=_ENTROPY_POOL)
        return self._stream(int(entropy.generate_state(1)[0])).randn(self._shape)
