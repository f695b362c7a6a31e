"""Size buckets: the sizes at which an image or clip is trained, chosen by its aspect ratio and length.

The choice is the same as in diffusion-pipe (utils/dataset.py: DirectoryDataset, ARBucketDataset), number for number,
with sides that are multiples of 16.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from anima_jax.config.dataset import Source
from anima_jax.config.sizes import SIDE_DECIMALS, Size, nearest_multiple
from anima_jax.errors import plural


class Bucket(NamedTuple):
    """A size, the resolution that it belongs to, and the number of reference pictures of the same size."""

    size: Size
    resolution: float | None
    """Side in pixels of the square with the same area; None for an explicit size bucket."""
    references: int = 0
    """Each is one more frame in the transformer, after the picture's own."""

    @property
    def grid(self) -> tuple[int, int, int]:
        """Number of latent frames with those of the references, patch rows and patch columns in the transformer."""
        frames, rows, columns = self.size.grid
        return frames + self.references, rows, columns

    @property
    def tokens(self) -> int:
        """Sequence length of the transformer."""
        return math.prod(self.grid)

    def __str__(self) -> str:
        with_references = f" with {plural(self.references, 'reference')}" if self.references else ""
        return f"{self.size.width}×{self.size.height}{with_references}"


@dataclasses.dataclass(frozen=True)
class Bucketing:
    """The buckets of one source. Ratios, resolutions and frame counts are sorted and distinct."""

    resolutions: tuple[float, ...]
    """Sides of squares in pixels. Each defines an area; every example is trained at every resolution."""
    aspect_ratios: tuple[float, ...]
    """Width / height."""
    frame_buckets: tuple[int, ...]
    """Lengths in frames, always including 1 (images)."""
    size_buckets: tuple[Size, ...] = ()
    """Explicit sizes, used instead of all of the above."""

    def __post_init__(self):
        object.__setattr__(self, "resolutions", _distinct(self.resolutions))
        object.__setattr__(self, "aspect_ratios", _distinct(self.aspect_ratios))
        object.__setattr__(self, "frame_buckets", tuple(sorted({1, *self.frame_buckets})))

    @classmethod
    def of(cls, source: Source) -> "Bucketing":
        """Return the buckets that a source's configuration describes."""
        if source.size_buckets:
            return cls((), (), (), source.size_buckets)
        ratios = (1.0,)
        if source.enable_ar_bucket:
            ratios = source.ar_buckets or spaced_ratios(
                source.min_ar or 1.0, source.max_ar or 1.0, source.num_ar_buckets or 1
            )
        return cls(source.sides, ratios, source.frame_buckets)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Every size that an example can have."""
        shapes = itertools.product(self.resolutions, self.aspect_ratios, self.frame_buckets)
        return self.size_buckets or tuple(dict.fromkeys(Size(*_sides(side, ratio), n) for side, ratio, n in shapes))

    def place(self, width: int, height: int, frames: int) -> tuple[Bucket, ...]:
        """Return the buckets of an image (frames = 1) or clip: one per resolution, or the nearest size bucket.

        Return an empty tuple if none fits: a clip never goes into an image bucket, or an image into a clip bucket.
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
        distances = _distances(width, height, [round(size.width / size.height, SIDE_DECIMALS) for size in fitting])
        return (Bucket(fitting[int(np.argmin(distances))], None),)


def spaced_ratios(smallest: float, largest: float, count: int) -> tuple[float, ...]:
    """Return `count` ratios from `smallest` to `largest`, evenly spaced on a logarithmic scale."""
    return tuple(np.geomspace(smallest, largest, count).tolist())


def _distinct(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(sorted({round(float(value), SIDE_DECIMALS) for value in values}))


def _distances(width: int, height: int, ratios: Iterable[float]) -> np.ndarray:
    return np.abs(np.log(width / height) - np.log(np.array(list(ratios))))


def _sides(resolution: float, ratio: float) -> tuple[int, int]:
    """Return the (width, height) with this aspect ratio and an area of about resolution²."""
    width = math.sqrt(resolution**2 * ratio)
    return nearest_multiple(width), nearest_multiple(resolution**2 / width)
