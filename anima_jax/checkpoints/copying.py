"""Copies and casts of large host arrays, at the speed of memory.

numpy walks a transposed array one element at a time, and for bfloat16 by a slow path of its own: 0.17 GB/s for a weight
matrix. Seen as integers and taken in strips of 16 rows, which keep both sides in the cache, it is 1.5 GB/s.
"""

import numpy as np

from anima_jax.errors import UserError

_STRIP = 16


def copy_into(out: np.ndarray, source: np.ndarray) -> None:
    """`out[...] = source` for arrays of one shape and one dtype, `source` often a transposed view."""
    integers = np.dtype(f"u{out.dtype.itemsize}")
    out, source = out.view(integers), source.view(integers)
    if source.ndim == 2 and source.strides[0] < source.strides[1]:
        for begin in range(0, source.shape[1], _STRIP):
            strip = slice(begin, begin + _STRIP)
            out[:, strip] = source[:, strip]
    else:
        out[...] = source


def contiguous(array: np.ndarray) -> np.ndarray:
    """`array` in row-major order: itself if it is so already."""
    if array.flags.c_contiguous:
        return array
    out = np.empty(array.shape, array.dtype)
    copy_into(out, array)
    return out


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`array` in `dtype`, rounded to nearest even.

    UserError if a finite value has no finite place in `dtype` (float16 ends at 65504); infinities and NaNs that are
    there already pass.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        out = array.astype(dtype)
    if np.dtype(dtype).itemsize < array.dtype.itemsize or dtype == np.float16:
        lost = int(np.count_nonzero(np.isfinite(array) & ~np.isfinite(out)))
        if lost:
            largest = float(np.max(np.abs(array.astype(np.float32)), where=np.isfinite(array), initial=0.0))
            raise UserError(f"{name}: {lost} values overflow in {np.dtype(dtype)}, the largest is {largest:.6g}")
    return out
