"""Quantising of one weight, a range of rows at a time, of which alone there is a copy in float32.

A `Quantiser` describes a format that can be written. `quantise` also measures what the format loses.
"""

import concurrent.futures
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from anima_jax.checkpoints.quantised.parts import Parts

_TILE = 128
"""Ranges of rows are multiples of this, which is a multiple of every format's blocks of rows."""

_RANGE = 2**19  # values quantised at a time


class Quantiser(NamedTuple):
    """A format of weights that can be written.

    `rows(values_oi, largest)` quantises some rows of a weight in float32; `largest` is the largest magnitude of the
    whole weight. `dequantise(parts, shape)` returns their values. `parts` has, for each part, its dtype and its shape
    as a function of the weight's (o, i). The weight's shape must be multiples of `multiple`. `constants(shape)` returns
    the parts that depend on the shape only. `embeddings` is whether programs look rows up in the format, too.
    """

    rows: Callable[[np.ndarray, float], Parts]
    dequantise: Callable[[Parts, tuple[int, ...]], np.ndarray]
    parts: Mapping[str, tuple[np.dtype[Any], Callable[[int, int], tuple[int, ...]]]]
    multiple: tuple[int, int] = (1, 1)
    constants: Callable[[tuple[int, ...]], Parts] = lambda shape: {}
    embeddings: bool = False


class QuantisationLoss(NamedTuple):
    """What quantising loses: the sums of the squared errors and of the squared values of a weight."""

    error: float
    size: float


def quantise(values_oi: np.ndarray, quantiser: Quantiser) -> tuple[Parts, QuantisationLoss]:
    """Return the parts of a weight in any floating-point dtype, without the constants, and what is lost.

    Raises ValueError for values that are NaN or infinite.
    """
    largest = largest_magnitude(values_oi)
    if not np.isfinite(largest):
        raise ValueError("NaN or infinite values cannot be quantised")
    outputs, inputs = values_oi.shape
    step = max(_TILE, _RANGE // inputs // _TILE * _TILE)

    def part(first: int) -> tuple[Parts, float, float]:
        values = values_oi[first : first + step].astype(np.float32)
        found = quantiser.rows(values, largest)
        difference = quantiser.dequantise(found, values.shape)
        difference -= values
        return found, _square(difference), _square(values)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        parts, errors, sizes = zip(*pool.map(part, range(0, outputs, step)), strict=True)
    whole = {
        name: np.concatenate([each[name] for each in parts]) if array.ndim else array
        for name, array in parts[0].items()
    }
    return whole, QuantisationLoss(sum(errors), sum(sizes))


def largest_magnitude(values: np.ndarray) -> float:
    """Return the largest magnitude; NaN or infinity if a value is."""
    if values.dtype.itemsize not in (2, 4) or not values.size:
        return float(np.abs(values.astype(np.float32)).max(initial=0))
    # The bits of floating-point numbers are in their order, with NaN above infinity.
    bits = values.view(f"u{values.dtype.itemsize}")
    return float((bits & bits.dtype.type(np.iinfo(bits.dtype).max // 2)).max().view(values.dtype))


def _square(values: np.ndarray) -> float:
    flat = values.ravel()
    with np.errstate(over="ignore"):  # beyond 1e19, which no weight is
        return float(np.dot(flat, flat))
