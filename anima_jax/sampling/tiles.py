"""The VAE on images that do not fit the memory: computed in tiles, which are blended where they overlap.

All tiles have the same size, so they share a compiled program, and are spaced evenly over the image.
Axes: b batch, t frames, y rows, x columns, c channels.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from anima_jax.parallel import hosts
from anima_jax.parallel.devices import GB, free_bytes
from anima_jax.parallel.mesh import current_mesh
from anima_jax.sampling.images import PIXELS_PER_LATENT

TILE = 128
"""Side of a tile in latent pixels: 1,024 pixels."""

SMALLER_TILES = (96, 64, 48, 32)
"""Sides of the tiles, in latent pixels, for devices without the memory for a larger one."""

OVERLAP = 24
"""Minimum overlap of neighbouring tiles in latent pixels; less in tiles of less than four times as much."""

BYTES_PER_VALUE = 32
"""The VAE's peak memory divided by its pixels and the channels of its first level.

XLA's own count for the released VAE is 20 to 26, in float32 as in bfloat16; the rest is for the scratch memory of
convolutions.
"""


def run_vae(
    run: Callable[[np.ndarray], Any],
    array_btyxc: np.ndarray,
    unit_in: int,
    unit_out: int,
    width: int,
    tile: int | None,
) -> np.ndarray:
    """Return `run(array_btyxc)`, computed whole or in tiles as `tile_side` says, or in tiles if the memory runs out.

    `unit_in` and `unit_out` are the side of a latent pixel in the argument and in the result.
    """
    rows, columns = (size // unit_in for size in array_btyxc.shape[2:4])
    side = tile_side(rows, columns, width, tile)
    if side is not None:
        return in_tiles(run, array_btyxc, unit_in, unit_out, tile=side)
    try:
        return np.asarray(run(array_btyxc))
    except jax.errors.JaxRuntimeError as error:
        if tile is not None or "RESOURCE_EXHAUSTED" not in str(error) or not hosts.is_single_process():
            raise
    print(f"the VAE ran out of memory: it runs in tiles of {TILE * PIXELS_PER_LATENT} pixels", file=sys.stderr)
    return in_tiles(run, array_btyxc, unit_in, unit_out)


def tile_side(rows: int, columns: int, width: int, tile: int | None) -> int | None:
    """Return the side of the tiles, in latent pixels, for an image of this size in latent pixels; None: the whole.

    `width` is the number of channels of the VAE's first level. `tile` is the side in pixels that the user asks for; 0
    for the whole image. With None the image is computed whole if it fits the memory that is free on every device, or if
    that is unknown; otherwise in the largest tiles that fit.
    """
    if tile is not None:
        return tile // PIXELS_PER_LATENT or None
    devices = current_mesh().devices.flat
    own = [free_bytes(device) for device in devices if device.process_index == jax.process_index()]
    free = hosts.smallest(min((found for found in own if found is not None), default=None))

    needed = vae_bytes(rows, columns, width)
    if free is None or needed <= free:
        return None
    side = next((side for side in (TILE, *SMALLER_TILES) if vae_bytes(side, side, width) <= free), SMALLER_TILES[-1])
    if hosts.is_process_0():
        size = f"{columns * PIXELS_PER_LATENT}×{rows * PIXELS_PER_LATENT} pixels"
        needs = f"needs about {needed / GB:.1f} GB for {size}, {free / GB:.1f} GB are free"
        print(f"the VAE {needs}: it runs in tiles of {side * PIXELS_PER_LATENT} pixels", file=sys.stderr)
    return side


def vae_bytes(rows: int, columns: int, width: int) -> int:
    """Return an estimate of the VAE's peak memory for an image of this size in latent pixels."""
    return BYTES_PER_VALUE * width * rows * columns * PIXELS_PER_LATENT**2


def in_tiles(
    run: Callable[[np.ndarray], Any],
    array_btyxc: np.ndarray,
    unit_in: int,
    unit_out: int,
    *,
    tile: int = TILE,
    overlap: int | None = None,
) -> np.ndarray:
    """Return `run(array_btyxc)`, computed in tiles, (b, t, y, x, c), float32.

    `unit_in` and `unit_out` are the side of a latent pixel in the argument and in the result. Where tiles overlap, the
    result is their weighted mean; along each side, the weight is the distance to the tile's nearest edge, capped at the
    overlap, by default `OVERLAP` or a quarter of a smaller tile.
    """
    overlap = min(OVERLAP, tile // 4) if overlap is None else overlap
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
