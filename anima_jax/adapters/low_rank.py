"""Adapters as exact products of two narrow matrices, for programs in which each image of a batch has its own adapters.

In the layout of files ΔW = U D, with U (out, r) and D (r, in). A LoRA is such a product. So are, by the mixed-product
property, the Kronecker product of two products, (U₁ ⊗ U₂)(D₁ ⊗ D₂), and their elementwise product, whose U has the
Kronecker products of the rows of U₁ and U₂ and whose D those of the columns of D₁ and D₂; both have the rank r₁ · r₂.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from anima_jax.adapters.dialects import module_names
from anima_jax.adapters.file import Adapter
from anima_jax.adapters.patch import BIAS_PARTS, FLOAT32, Patch


class LowRank(NamedTuple):
    """ΔW of one module as a model multiplies by it: D (r, in) and, with the adapter's scale, Uᵀ (r, out), float32."""

    down_ri: np.ndarray
    up_ro: np.ndarray


def rank_of(patch: Patch) -> int | None:
    """Return the rank of the product that `low_rank` returns, or None if the change is not ΔW = U D alone.

    It depends on the weight (DoRA, GLoRA, OFT), replaces it, changes a bias, or extends the weight.
    """
    beside = patch.parts.keys() & {"dora_scale", "reshape_weight"} - {*patch.idle}
    if patch.kind.on_weight or patch.kind.replaces or beside or patch.parts.keys() & BIAS_PARTS:
        return None
    shapes = [[part.shape for part in chain.values()] for chain in patch.chains]
    if any(len(shape) != 2 for chain in shapes for shape in chain):
        return None
    return math.prod(min(chain[0]) if len(chain) == 1 else chain[0][1] for chain in shapes)


def low_rank(patch: Patch) -> LowRank:
    """Return ΔW, with the patch's scale, of a patch that has a `rank_of`."""
    pairs = [_pair([part.float32() for part in chain.values()]) for chain in patch.chains]
    up, down = functools.reduce(_elementwise if patch.kind.elementwise else _kronecker, pairs)
    if "inv_scale" in patch.parts and "inv_scale" not in patch.idle:
        down = down * patch.parts["inv_scale"].float32()
    return LowRank(down, up.T * np.float32(patch.scale))


def _pair(chain: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the product of a chain of matrices as one of two; a single matrix has the identity beside it."""
    first, *others = chain
    if others:
        return first, functools.reduce(np.matmul, others)
    one = np.eye(min(first.shape), dtype=FLOAT32)
    return (first, one) if first.shape[0] >= first.shape[1] else (one, first)


def _kronecker(left: tuple[np.ndarray, ...], right: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    return np.kron(left[0], right[0]), np.kron(left[1], right[1])


def _elementwise(left: tuple[np.ndarray, ...], right: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    up = left[0][:, :, None] * right[0][:, None, :]
    down = left[1][:, None, :] * right[1][None, :, :]
    return up.reshape(len(up), -1), down.reshape(-1, down.shape[-1])


def adapter_rank(adapter: Adapter, layers: Mapping[str, int]) -> int | None:
    """Return the largest rank of an adapter's changes, or None if it has other changes than U D of these modules.

    `layers` maps the paths of stacked modules to their number of layers.
    """
    known = module_names(layers)
    ranks = [rank_of(patch) if module in known else None for module, patch in adapter.patches.items()]
    return None if None in ranks else max(filter(None, ranks), default=0)


def low_ranks(adapter: Adapter, layers: Mapping[str, int]) -> dict[tuple[str, int], LowRank]:
    """Return (path, layer) → change of an adapter that has an `adapter_rank`."""
    known = module_names(layers)
    return {known[module]: low_rank(patch) for module, patch in adapter.patches.items()}
