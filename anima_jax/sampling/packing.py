"""Packing of images of several sizes into one batch of tokens.

Each image's patches come first; zeros follow up to the token budget. There are few budgets, so images of many sizes
share a compiled program. At most an eighth of the largest image's tokens is padding, except below 128 tokens.

Where an image has an odd number of rows or columns, half of its last patches lies outside of it. That half is zero in
every array but the network's input, which `wrapped` fills from the opposite edge, as ComfyUI does
(`pad_to_patch_size` in comfy/ldm/common_dit.py).
Axes: b batch, l tokens, c the 64 values of a token; one image's latents are (t, y, x, 16).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from anima_jax.models.dit import OUT_CHANNELS, PATCH, patchify, token_positions, unpatchify

BUDGET_STEP = 16
BUDGETS_PER_OCTAVE = 8

UNPADDED_TOKENS = 1024
"""Token budget from which images that fill it, such as those of 1024², have a program of their own, without masks."""


def token_budget(tokens: int) -> int:
    """Return the smallest budget for this many tokens. There are 8 per power of two, all multiples of 16."""
    octave = 2 ** max(0, math.ceil(math.log2(tokens)) - 1)
    step = max(BUDGET_STEP, octave // BUDGETS_PER_OCTAVE)
    return -(-tokens // step) * step


class TokenPacking:
    """The token layout of a batch of latents of these sizes, (t, y, x).

    `size_b3` is each image's size in latent pixels, `length` the token budget of the largest image.
    """

    def __init__(self, sizes: Sequence[tuple[int, ...]]):
        self.size_b3 = np.array(sizes, np.int32)
        self.length = token_budget(int(grid_of(self.size_b3).prod(axis=1).max()))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (b, l, c) of packed latents."""
        return len(self.size_b3), self.length, PATCH * PATCH * OUT_CHANNELS

    def pack(self, latents: Sequence[Any]) -> np.ndarray:
        """Return each image's latents as tokens (b, l, c), float32."""
        features = PATCH * PATCH * latents[0].shape[-1]
        tokens_blc = np.zeros((len(latents), self.length, features), np.float32)
        for row, image in zip(tokens_blc, latents, strict=True):
            edges = [(0, 0), *((0, -side % PATCH) for side in image.shape[1:3]), (0, 0)]
            whole: Any = np.pad(image, edges)[None]
            patches = patchify(whole)[0]
            row[: len(patches)] = patches
        return tokens_blc

    def unpack(self, tokens_blc: Any) -> list[np.ndarray]:
        """Return each image's latents on the host: the inverse of `pack`."""
        latents: list[np.ndarray] = []
        grids = grid_of(self.size_b3).tolist()
        for row, grid, (_, y, x) in zip(np.asarray(tokens_blc), grids, self.size_b3.tolist(), strict=True):
            whole: Any = unpatchify(row[None, : math.prod(grid)], *grid)
            latents.append(whole[0, :, :y, :x])
        return latents


def is_padded(size_b3: np.ndarray, length: int) -> bool:
    """Return whether the program masks padding: unless all images have `length` tokens, or if these are few."""
    return length < UNPADDED_TOKENS or bool(np.any(grid_of(size_b3).prod(axis=1) < length))


def grid_of(size_b3: Any) -> Any:
    """Return sizes in patches, of sizes (t, y, x) in latent pixels; half a patch counts as one."""
    return -(-size_b3 // np.array([1, PATCH, PATCH], np.int32))


def real_values(size_b3: Array, length: int) -> Array:
    """Return which values of packed latents belong to an image, bool (b, l, 4·16): all but padding."""
    grid_b3 = grid_of(size_b3)
    real_bl = jnp.arange(length) < jnp.prod(grid_b3, axis=1)[:, None]
    place_bl3 = token_positions(grid_b3, length) * jnp.array([1, PATCH, PATCH])
    inside_blmn = (
        real_bl[..., None, None]
        & (place_bl3[..., 1, None, None] + np.arange(PATCH)[:, None] < size_b3[:, 1, None, None, None])
        & (place_bl3[..., 2, None, None] + np.arange(PATCH) < size_b3[:, 2, None, None, None])
    )
    return jnp.repeat(inside_blmn.reshape(len(size_b3), length, -1), OUT_CHANNELS, axis=-1)


def every_eighth(size_b3: Array, length: int) -> Array:
    """Return which values of packed latents are of every eighth latent pixel in rows and columns, (b, l, 4·16)."""
    of_token_bl = jnp.all(token_positions(grid_of(size_b3), length)[..., 1:] % (8 // PATCH) == 0, axis=-1)
    return of_token_bl[..., None] & (jnp.arange(PATCH * PATCH * OUT_CHANNELS) < OUT_CHANNELS)


def wrapped(x_blc: Array, size_b3: Array) -> Array:
    """Return packed latents in which an odd last row or column is followed by the first one of its image."""
    b, length, _ = x_blc.shape
    grid_b3 = grid_of(size_b3)
    _, row_bl, column_bl = jnp.moveaxis(token_positions(grid_b3, length), -1, 0)
    index_bl = jnp.arange(length)[None]
    x_blmnc = x_blc.reshape(b, length, PATCH, PATCH, -1)

    def opposite(steps_bl: Array) -> Array:
        return jnp.take_along_axis(x_blmnc, jnp.maximum(index_bl - steps_bl, 0)[..., None, None, None], axis=1)

    # Columns first: the corner comes from the first row, which is then already wrapped.
    for axis, place_bl, steps_bl in ((2, column_bl, column_bl), (1, row_bl, row_bl * grid_b3[:, 2:3])):
        is_odd_b1 = size_b3[:, axis : axis + 1] % PATCH == 1
        at_edge_bl = is_odd_b1 & (place_bl == grid_b3[:, axis : axis + 1] - 1)
        outside_mn = np.indices((PATCH, PATCH))[axis - 1] == PATCH - 1
        first = jnp.roll(opposite(steps_bl), PATCH - 1, axis=axis + 1)
        x_blmnc = jnp.where(at_edge_bl[..., None, None, None] & outside_mn[..., None], first, x_blmnc)
    return x_blmnc.reshape(x_blc.shape)
