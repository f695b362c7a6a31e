"""The VAE on large images: computed in tiles, which are blended where they overlap.

All tiles have the same size, so they share a compiled program, and are spaced evenly over the image.
Axes: b batch, t frames, y rows, x columns, c channels.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

TILE = 128
"""Side of a tile in latent pixels: 1,024 pixels, which need no more memory than the largest untiled image."""

OVERLAP = 24
"""Minimum overlap of neighbouring tiles in latent pixels."""


def in_tiles(
    run: Callable[[np.ndarray], Any],
    array_btyxc: np.ndarray,
    unit_in: int,
    unit_out: int,
    *,
    tile: int = TILE,
    overlap: int = OVERLAP,
) -> np.ndarray:
    """Return `run(array_btyxc)`, computed in tiles, (b, t, y, x, c), float32.

    `unit_in` and `unit_out` are the side of a latent pixel in the argument and in the result. Where tiles overlap, the
    result is their weighted mean; along each side, the weight is the distance to the tile's nearest edge, capped at the
    overlap.
    """
    rows, columns = (size // unit_in for size in array_btyxc.shape[2:4])
    height, width = min(tile, rows), min(tile, columns)
    weight_yx1 = _ramp(height, overlap, unit_out)[:, None, None] * _ramp(width, overlap, unit_out)[:, None]
    total, weights = np.zeros(()), np.zeros((rows * unit_out, columns * unit_out, 1), np.float32)
    for top in _starts(rows, height, overlap):
        for left in _starts(columns, width, overlap):
            y, x = slice(top * unit_in, (top + height) * unit_in), slice(left * unit_in, (left + width) * unit_in)
            result = np.asarray(run(array_btyxc[:, :, y, x]), np.float32)
            if not total.shape:
                total = np.zeros((*result.shape[:2], *weights.shape[:2], result.shape[-1]), np.float32)
            y, x = slice(top * unit_out, (top + height) * unit_out), slice(left * unit_out, (left + width) * unit_out)
            total[:, :, y, x] += weight_yx1 * result
            weights[y, x] += weight_yx1
    return total / weights


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Return the positions at which tiles start, spaced evenly from 0 to size − tile."""
    count = 1 + max(0, -(-(size - tile) // max(1, tile - overlap)))
    return np.rint(np.linspace(0, size - tile, count)).astype(int).tolist()


def _ramp(tile: int, overlap: int, unit: int) -> np.ndarray:
    """Return the weights along one side of a tile: rising over the overlap, then constant, then falling."""
    position = np.arange(tile * unit) + 0.5
    return np.minimum(np.minimum(position, position[::-1]), max(1, overlap * unit)).astype(np.float32)
