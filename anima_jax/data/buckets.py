"""Size buckets: which sizes a picture or clip is trained at, by its shape and length.

The choice is diffusion-pipe's (utils/dataset.py: DirectoryDataset, ARBucketDataset), number for number, with sides that
are multiples of 16.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

PIXEL_MULTIPLE = 16
"""Pixels a side of one token: 8 × of the VAE times the transformer's patch of 2. Sides are multiples of it."""

FRAMES_PER_LATENT = 4
"""The VAE's first latent frame is one frame of the clip, every further one four."""

DECIMALS = 3
"""Ratios and resolutions are told apart by so many decimals."""


class Size(NamedTuple):
    """What the VAE sees of an example."""

    width: int
    """Pixels, a multiple of 16."""
    height: int
    """Pixels, a multiple of 16."""
    frames: int
    """1 is a picture. Of other numbers the VAE takes the first 1 + 4·((frames − 1) // 4)."""

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of the transformer's patches."""
        frames = 1 + (self.frames - 1) // FRAMES_PER_LATENT
        return frames, self.height // PIXEL_MULTIPLE, self.width // PIXEL_MULTIPLE

    @property
    def tokens(self) -> int:
        """The transformer's sequence length."""
        return math.prod(self.grid)


class Bucket(NamedTuple):
    """A size, and the resolution that it was made for."""

    size: Size
    resolution: float | None
    """Side in pixels of the square of the same area; None for an explicit size bucket."""


@dataclasses.dataclass(frozen=True)
class Bucketing:
    """The buckets of one source. Ratios, resolutions and frame counts are put in order, each kept once."""

    resolutions: tuple[float, ...]
    """Sides of squares in pixels: each stands for an area, and every example is trained at every one."""
    aspect_ratios: tuple[float, ...]
    """Width over height."""
    frame_buckets: tuple[int, ...]
    """Lengths in frames. 1, for pictures, is always among them."""
    size_buckets: tuple[Size, ...] = ()
    """Explicit sizes, which take the place of all the others where there are any."""

    def __post_init__(self):
        object.__setattr__(self, "resolutions", _distinct(self.resolutions))
        object.__setattr__(self, "aspect_ratios", _distinct(self.aspect_ratios))
        object.__setattr__(self, "frame_buckets", tuple(sorted({1, *self.frame_buckets})))

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Every size that an example can have."""
        shapes = itertools.product(self.resolutions, self.aspect_ratios, self.frame_buckets)
        return self.size_buckets or tuple(dict.fromkeys(Size(*_sides(side, ratio), n) for side, ratio, n in shapes))

    def place(self, width: int, height: int, frames: int) -> tuple[Bucket, ...]:
        """The buckets of a picture (frames = 1) or clip: one for each resolution, or the one size bucket.

        Empty for what is too short: a clip never goes to a bucket of pictures, and a picture never to one of clips.
        """
        if self.size_buckets:
            return self._size_bucket(width, height, frames)
        length = max((bucket for bucket in self.frame_buckets if bucket <= frames), default=0)
        if length < 1 or (frames > 1 and length == 1):
            return ()
        ratio = self.aspect_ratios[int(np.argmin(_distances(width, height, self.aspect_ratios)))]
        return tuple(Bucket(Size(*_sides(side, ratio), length), side) for side in self.resolutions)

    def _size_bucket(self, width: int, height: int, frames: int) -> tuple[Bucket, ...]:
        fitting = [size for size in self.size_buckets if size.frames <= frames and (frames == 1 or size.frames > 1)]
        if not fitting:
            return ()
        fitting.sort(key=lambda size: size.frames, reverse=True)
        distances = _distances(width, height, [round(size.width / size.height, DECIMALS) for size in fitting])
        return (Bucket(fitting[int(np.argmin(distances))], None),)


def spaced_ratios(smallest: float, largest: float, count: int) -> tuple[float, ...]:
    """`count` ratios from `smallest` to `largest`, each the same factor above the one before it."""
    return tuple(np.geomspace(smallest, largest, count).tolist())


def _distinct(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(sorted({round(float(value), DECIMALS) for value in values}))


def _distances(width: int, height: int, ratios: Iterable[float]) -> np.ndarray:
    return np.abs(np.log(width / height) - np.log(np.array(list(ratios))))


def _sides(resolution: float, ratio: float) -> tuple[int, int]:
    """Width and height of about the area resolution² at this ratio."""
    width = math.sqrt(resolution**2 * ratio)
    return nearest_multiple(width), nearest_multiple(resolution**2 / width)


def nearest_multiple(pixels: float) -> int:
    """The multiple of 16 nearest to `pixels`, at least 16."""
    return max(1, round(pixels / PIXEL_MULTIPLE)) * PIXEL_MULTIPLE
