"""The reference implementations' own numbers, and how far from them counts as equal."""

import pathlib

import numpy as np
from safetensors.numpy import load_file

GOLDEN = pathlib.Path(__file__).parent / "golden"

# DESIGN's bounds for float32: values carry the rounding of a few hundred sums, gradients that of twice as many.
VALUE_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4


def golden(name: str) -> dict[str, np.ndarray]:
    return load_file(GOLDEN / f"{name}.safetensors")


def relative_error(actual, expected) -> float:
    """Largest difference, relative to the largest expected value."""
    expected = np.asarray(expected, np.float64)
    return float(np.max(np.abs(np.asarray(actual, np.float64) - expected)) / np.max(np.abs(expected)))


def channel_last(array: np.ndarray) -> np.ndarray:
    """(b, c, t, y, x), the files' layout, as (b, t, y, x, c)."""
    return np.moveaxis(array, 1, -1)
