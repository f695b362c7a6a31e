"""Packing of images of several sizes into one batch of tokens.

Each image's patches come first; zeros follow up to the token budget. There are few budgets, so images of many sizes
share a compiled program. At most an eighth of the largest image's tokens is padding, except below 128 tokens.
Axes: b batch, l tokens, c the 64 values of a token; one image's latents are (t, y, x, 16).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from anima_jax.models.dit import PATCH, patchify, unpatchify

BUDGET_STEP = 16
BUDGETS_PER_OCTAVE = 8


def token_budget(tokens: int) -> int:
    """Return the smallest budget for this many tokens. There are 8 per power of two, all multiples of 16."""
    octave = 2 ** max(0, math.ceil(math.log2(tokens)) - 1)
    step = max(BUDGET_STEP, octave // BUDGETS_PER_OCTAVE)
    return -(-tokens // step) * step


class TokenPacking:
    """The token layout of a batch of latents of these sizes, (t, y, x).

    `grid_b3` is each image's size in patches, `length` the token budget of the largest image.
    """

    def __init__(self, sizes: Sequence[tuple[int, ...]]):
        self.grid_b3 = np.array([(t, y // PATCH, x // PATCH) for t, y, x in sizes], np.int32)
        self.length = token_budget(int(self.grid_b3.prod(axis=1).max()))

    def pack(self, latents: Sequence[Any]) -> np.ndarray:
        """Return each image's latents as tokens (b, l, c), float32."""
        features = PATCH * PATCH * latents[0].shape[-1]
        tokens_blc = np.zeros((len(latents), self.length, features), np.float32)
        for row, image in zip(tokens_blc, latents, strict=True):
            patches = patchify(image[None])[0]
            row[: len(patches)] = patches
        return tokens_blc

    def unpack(self, tokens_blc: Any) -> list[np.ndarray]:
        """Return each image's latents on the host: the inverse of `pack`."""
        rows, grids = np.asarray(tokens_blc), self.grid_b3.tolist()
        latents: list[Any] = [
            unpatchify(row[None, : math.prod(grid)], *grid)[0] for row, grid in zip(rows, grids, strict=True)
        ]
        return latents
