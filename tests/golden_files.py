"""Reference values computed by the original implementations, and the tolerances for comparing with them."""

import pathlib

import numpy as np
from safetensors.numpy import load_file

GOLDEN = pathlib.Path(__file__).parent / "golden"

# For float32: values accumulate the rounding of a few hundred sums, gradients that of twice as many.
VALUE_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4


def golden(name: str) -> dict[str, np.ndarray]:
    return load_file(GOLDEN / f"{name}.safetensors")


def relative_error(actual, expected) -> float:
    """Return the largest difference, relative to the largest expected value."""
    expected = np.asarray(expected, np.float64)
    return float(np.max(np.abs(np.asarray(actual, np.float64) - expected)) / np.max(np.abs(expected)))


def channel_last(array: np.ndarray) -> np.ndarray:
    """Convert the files' layout (b, c, t, y, x) to (b, t, y, x, c)."""
    return np.moveaxis(array, 1, -1)
