"""The formats in which ComfyUI stores quantised weights: their layout and values.

Source: comfy_kitchen 0.2 (`tensor/` and `backends/eager/quantization.py`) and ComfyUI (`comfy/ops.py`,
`_load_quantized_module`). Values are computed in float32. Axes: o outputs, i inputs.
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np

from anima_jax.checkpoints.quantised.parts import PartLayout, Parts
from anima_jax.checkpoints.safetensors_header import CODES, TensorInfo

SCALE = "weight_scale"

FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))

_FLOATS = tuple(np.dtype(dtype) for dtype in (np.float32, ml_dtypes.bfloat16, np.float16))


def scaled_layout(parts: Mapping[str, TensorInfo], settings: Mapping[str, Any]) -> PartLayout:
    """Return the layout of codes with one scale, or one per output, which multiplies them."""
    codes, scale = required(parts, "weight", *FLOAT8), required(parts, SCALE, *_FLOATS)
    if len(codes.shape) < 1 or scale.shape not in (*_ones(len(codes.shape)), *_columns(codes.shape)):
        raise ValueError(f"{scale.name} is {scale.shape}, expected one scale, or one per row of {codes.shape}")
    per_row = {"weight": Fraction(1)} | ({SCALE: Fraction(1)} if scale.nbytes > scale.dtype.itemsize else {})
    return PartLayout(codes.shape, per_row)


def dequantise_scaled(parts: Parts, shape: tuple[int, ...]) -> np.ndarray:
    """Return the values of codes with one scale, or one per output."""
    scale = checked_scale(parts[SCALE])
    values = parts["weight"].astype(np.float32)
    values *= scale.reshape(-1, *[1] * (len(shape) - 1))
    return values


def required(parts: Mapping[str, TensorInfo], name: str, *dtypes: np.dtype[Any]) -> TensorInfo:
    """Return a part. Raises ValueError if it is missing or its dtype is none of `dtypes`."""
    if name not in parts:
        codes = parts["weight"].name
        raise ValueError(f"{codes} is quantised, but {codes.removesuffix('weight')}{name} is missing")
    part = parts[name]
    if part.dtype not in dtypes:
        raise ValueError(f"{part.name} is {part.code}, expected {' or '.join(CODES[dtype] for dtype in dtypes)}")
    return part


def checked_scale(scale: np.ndarray) -> np.ndarray:
    """Return scales in float32. Raises ValueError for one that is NaN, infinite or negative."""
    values = scale.astype(np.float32)
    wrong = ~np.isfinite(values) | (values < 0)
    if wrong.any():
        raise ValueError(f"a scale is {values[wrong].flat[0]}, expected a finite number of at least 0")
    return values


def _ones(axes: int) -> list[tuple[int, ...]]:
    return [(1,) * count for count in range(axes + 1)]


def _columns(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [(shape[0],) + (1,) * count for count in range(len(shape))]
