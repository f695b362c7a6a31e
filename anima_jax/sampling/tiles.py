"""The VAE on large pictures: tile by tile, blended where tiles overlap.

Tiles are of one size, so that they share a compiled program, and lie evenly over the picture.
Axes: b batch, t frames, y rows, x columns, c channels.
"""

from collections.abc import Callable

import numpy as np

TILE = 128
"""Side of a tile in latent pixels: 1,024 pixels, which take no more memory than what passes at once."""

OVERLAP = 24
"""By how many latent pixels neighbours overlap at least."""


def in_tiles(
    run: Callable[[np.ndarray], np.ndarray],
    array_btyxc: np.ndarray,
    unit_in: int,
    unit_out: int,
    *,
    tile: int = TILE,
    overlap: int = OVERLAP,
) -> np.ndarray:
    """`run` of the array, as if at once; `unit_in` and `unit_out` are a latent pixel's side in argument and result.

    A result is the mean of the tiles that hold it, each weighted by the distance to its nearest edge, up to the
    overlap.
    """
    rows, columns = (size // unit_in for size in array_btyxc.shape[2:4])
    high, wide = min(tile, rows), min(tile, columns)
    weight_yx1 = _ramp(high, overlap, unit_out)[:, None, None] * _ramp(wide, overlap, unit_out)[:, None]
    total, weights = np.zeros(()), np.zeros((rows * unit_out, columns * unit_out, 1), np.float32)
    for top in _starts(rows, high, overlap):
        for left in _starts(columns, wide, overlap):
            y, x = slice(top * unit_in, (top + high) * unit_in), slice(left * unit_in, (left + wide) * unit_in)
            result = np.asarray(run(array_btyxc[:, :, y, x]), np.float32)
            if not total.shape:
                total = np.zeros((*result.shape[:2], *weights.shape[:2], result.shape[-1]), np.float32)
            y, x = slice(top * unit_out, (top + high) * unit_out), slice(left * unit_out, (left + wide) * unit_out)
            total[:, :, y, x] += weight_yx1 * result
            weights[y, x] += weight_yx1
    return total / weights


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin, evenly from 0 to size − tile."""
    count = 1 + max(0, -(-(size - tile) // max(1, tile - overlap)))
    return np.rint(np.linspace(0, size - tile, count)).astype(int).tolist()


def _ramp(tile: int, overlap: int, unit: int) -> np.ndarray:
    """Weights along a side: rising over the overlap, then level, then falling."""
    place = np.arange(tile * unit) + 0.5
    return np.minimum(np.minimum(place, place[::-1]), max(1, overlap * unit)).astype(np.float32)
