"""Pictures of several sizes as one batch of tokens.

Each picture's patches come first, zeros follow up to the token budget. Budgets are few, so that pictures of many sizes
share a compiled program, and padding is an eighth of it at most.
Axes: b batch, l tokens, c the 64 values of a token; one picture's latents are (t, y, x, 16).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from anima_jax.models.dit import PATCH, patchify, unpatchify

BUDGET_STEP = 16
BUDGETS_AN_OCTAVE = 8


def token_budget(tokens: int) -> int:
    """The smallest budget for so many tokens: eight between a power of two and the next, multiples of 16."""
    octave = 2 ** max(0, math.ceil(math.log2(tokens)) - 1)
    step = max(BUDGET_STEP, octave // BUDGETS_AN_OCTAVE)
    return -(-tokens // step) * step


class TokenPacking:
    """Where pictures of these latent sizes (t, y, x) lie: `grid_b3` in patches, and `length` tokens for each."""

    def __init__(self, sizes: Sequence[tuple[int, int, int]]):
        self.grid_b3 = np.array([(t, y // PATCH, x // PATCH) for t, y, x in sizes], np.int32)
        self.length = token_budget(int(self.grid_b3.prod(axis=1).max()))

    def pack(self, latents: Sequence[Any]) -> np.ndarray:
        """Tokens (b, l, c), float32, of each picture's latents."""
        features = PATCH * PATCH * latents[0].shape[-1]
        tokens_blc = np.zeros((len(latents), self.length, features), np.float32)
        for row, picture in zip(tokens_blc, latents, strict=True):
            patches = patchify(picture[None])[0]
            row[: len(patches)] = patches
        return tokens_blc

    def unpack(self, tokens_blc: Any) -> list[Any]:
        """The inverse of `pack`, on the host."""
        pairs: Any = zip(np.asarray(tokens_blc), self.grid_b3.tolist(), strict=True)
        return [unpatchify(row[None, : math.prod(grid)], *grid)[0] for row, grid in pairs]
