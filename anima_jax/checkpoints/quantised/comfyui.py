"""The formats in which ComfyUI stores quantised weights: their layout and values.

Source: comfy_kitchen 0.2 (`tensor/` and `backends/eager/quantization.py`) and ComfyUI (`comfy/ops.py`,
`_load_quantized_module`). Values are computed in float32. Axes: o outputs, i inputs.

fp8_scaled    8-bit floats times a scale for all of them, or one per output.
fp8_blocks    8-bit floats times a scale per 128 × 128 weights: not ComfyUI's, but that of Qwen's own FP8 files.
int8          integers times such a scale.
int8_convrot  the same, of weights whose inputs were rotated in groups: each group was multiplied by a Hadamard matrix,
              which is its own inverse (`hadamard`). The settings have the size of a group.
mxfp8         8-bit floats times a power of two per 32 inputs (OCP Microscaling), in tiles (`untiled`).
nvfp4         two 4-bit floats a byte, the first in the upper half, times an 8-bit float per 16 inputs, in tiles, times
              a float32 for all of them.
"""

import functools
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np

from anima_jax.checkpoints.quantised.parts import PartLayout, Parts, checked_scale, required
from anima_jax.checkpoints.safetensors_header import TensorInfo
from anima_jax.models.quantised import hadamard

SCALE = "weight_scale"
SCALE_2 = "weight_scale_2"
SCALE_OF_SQUARES = "weight_scale_inv"
SETTINGS = "comfy_quant"
"""Names of parts: the scales, nvfp4's scale for all values, and the settings of a weight as JSON."""

FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))

_FLOATS = tuple(np.dtype(dtype) for dtype in (np.float32, ml_dtypes.bfloat16, np.float16))

_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)

BYTE_SCALES = (_E8M0, np.dtype(np.uint8))
"""Dtypes of mxfp8's scales."""

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""Values of the 4-bit floats by their code."""

MXFP8_BLOCK, NVFP4_BLOCK = 32, 16
"""Inputs that share a scale."""

SQUARE = 128
"""Inputs and outputs that share a scale in fp8_blocks."""

TILE = (128, 4)
"""Rows and columns of a tile of scales."""

Infos = Mapping[str, TensorInfo]
Json = Mapping[str, Any]


# ---- one scale, or one per output -----------------------------------------------------------------------------------


def fp8_layout(parts: Infos, settings: Json) -> PartLayout:
    """Return the layout of scaled 8-bit floats. Raises ValueError for parts that are missing or do not fit."""
    del settings
    return _scaled(parts, *FLOAT8)


def int8_layout(parts: Infos, settings: Json) -> PartLayout:
    """Return the layout of scaled integers. Raises ValueError as `fp8_layout` does, and for a wrong group."""
    layout = _scaled(parts, np.dtype(np.int8))
    if is_rotated(settings):
        size, inputs = group_size(settings), layout.shape[-1]
        if len(layout.shape) != 2 or inputs % size:
            raise ValueError(f"{parts['weight'].name} is {layout.shape}, which groups of {size} inputs do not divide")
    return layout


def _scaled(parts: Infos, *dtypes: np.dtype[Any]) -> PartLayout:
    codes, scale = required(parts, "weight", *dtypes), required(parts, SCALE, *_FLOATS)
    shape = codes.shape
    allowed = [(1,) * axes for axes in range(len(shape) + 1)]
    allowed += [(*shape[:1], *(1,) * axes) for axes in range(len(shape))]
    if not shape or scale.shape not in allowed:
        raise ValueError(f"{scale.name} is {scale.shape}, expected one scale, or one per row of {shape}")
    one_per_row = scale.nbytes > scale.dtype.itemsize
    return PartLayout(shape, {"weight": Fraction(1)} | ({SCALE: Fraction(1)} if one_per_row else {}))


def fp8_blocks_layout(parts: Infos, settings: Json) -> PartLayout:
    """Return the layout of 8-bit floats in squares. Raises ValueError for parts that are missing or do not fit."""
    del settings
    codes, scale = required(parts, "weight", *FLOAT8), required(parts, SCALE_OF_SQUARES, *_FLOATS)
    expected = tuple(-(-size // SQUARE) for size in codes.shape)
    if len(codes.shape) != 2 or scale.shape != expected:
        raise ValueError(f"{scale.name} is {scale.shape}, expected {expected}: a scale per {SQUARE} × {SQUARE} weights")
    return PartLayout(codes.shape, {"weight": Fraction(1), SCALE_OF_SQUARES: Fraction(1, SQUARE)}, SQUARE)


def dequantise_squares(parts: Parts, shape: tuple[int, ...], settings: Json) -> np.ndarray:
    """Return the values of 8-bit floats in squares."""
    del settings
    scales = checked_scale(SCALE_OF_SQUARES, parts[SCALE_OF_SQUARES]).repeat(SQUARE, 0).repeat(SQUARE, 1)
    return _float32(parts["weight"]) * scales[: shape[0], : shape[1]]


def dequantise_scaled(parts: Parts, shape: tuple[int, ...], settings: Json) -> np.ndarray:
    """Return the values of codes with one scale, or one per output."""
    del settings
    scale = checked_scale(SCALE, parts[SCALE])
    values = _float32(parts["weight"])
    values *= scale.reshape(-1, *[1] * (len(shape) - 1))
    return values


def dequantise_rotated(parts: Parts, shape: tuple[int, ...], settings: Json) -> np.ndarray:
    """Return the values of integers with scales, after the rotation of each group of inputs.

    The rotation of the integers themselves is exact in float32, also after its division by a power of 2, so that a
    value is rounded once; comfy_kitchen scales first, and rounds each sum.
    """
    size = group_size(settings)
    scale = checked_scale(SCALE, parts[SCALE]).reshape(-1, 1)
    values = _float32(parts["weight"]).reshape(-1, size) @ hadamard(size)
    return values.reshape(shape) * scale


def _float32(codes: np.ndarray) -> np.ndarray:
    """Return codes as float32: of 8-bit floats from a table, five times faster than by ml_dtypes."""
    return _values_of(codes.dtype)[codes.view(np.uint8)] if codes.dtype in FLOAT8 else codes.astype(np.float32)


@functools.lru_cache(maxsize=2)
def _values_of(dtype: np.dtype[Any]) -> np.ndarray:
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)


def is_rotated(settings: Json) -> bool:
    """Return whether the inputs of a weight with these settings are rotated."""
    return bool(_setting(settings, "convrot", False))


def group_size(settings: Json) -> int:
    """Return the number of inputs that are rotated together. Raises ValueError unless it is a power of 4."""
    size = _setting(settings, "convrot_groupsize", 256)
    if type(size) is not int or not 4 <= size <= 4**6 or size.bit_count() != 1 or size.bit_length() % 2 == 0:
        raise ValueError(f"convrot_groupsize is {size!r:.40}, expected a power of 4, up to {4**6}")
    return size


def _setting(settings: Json, name: str, default: Any) -> Any:
    """Return a setting, which may be among the `params` as well."""
    params = settings.get("params")
    return settings.get(name, params.get(name, default) if isinstance(params, dict) else default)


# ---- scales of blocks, in tiles -------------------------------------------------------------------------------------


def mxfp8_layout(parts: Infos, settings: Json) -> PartLayout:
    """Return the layout of blocks of 8-bit floats. Raises ValueError for parts that are missing or do not fit."""
    del settings
    required(parts, "weight", *FLOAT8)
    return _tiled(parts, MXFP8_BLOCK, 1, _E8M0)


def nvfp4_layout(parts: Infos, settings: Json) -> PartLayout:
    """Return the layout of blocks of 4-bit floats. Raises ValueError for parts that are missing or do not fit."""
    del settings
    required(parts, "weight", np.dtype(np.uint8))
    whole = required(parts, SCALE_2, *_FLOATS)
    if whole.nbytes != whole.dtype.itemsize:
        raise ValueError(f"{whole.name} is {whole.shape}, expected one scale")
    return _tiled(parts, NVFP4_BLOCK, 2, FLOAT8[0])


def _tiled(parts: Infos, block: int, per_byte: int, dtype: np.dtype[Any]) -> PartLayout:
    codes, scale = parts["weight"], required(parts, SCALE, dtype, BYTE_SCALES[1])
    if len(codes.shape) != 2 or (codes.shape[1] * per_byte) % block:
        raise ValueError(f"{codes.name} is {codes.shape}, which blocks of {block} inputs do not divide")
    shape = (codes.shape[0], codes.shape[1] * per_byte)
    rows, columns = padded(shape[0], shape[1] // block)
    if scale.shape not in ((rows, columns), (rows * columns,)):
        raise ValueError(f"{scale.name} is {scale.shape}, expected {(rows, columns)}: one per {block} inputs, in tiles")
    return PartLayout(shape, {"weight": Fraction(1), SCALE: Fraction(scale.shape[0], max(1, rows))}, TILE[0])


def padded(rows: int, columns: int) -> tuple[int, int]:
    """Return the shape of (rows, columns) scales that are filled up to whole tiles."""
    return -(-rows // TILE[0]) * TILE[0], -(-columns // TILE[1]) * TILE[1]


def untiled(scales: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return the scales (rows, columns) that are stored in tiles, as cuBLAS multiplies them.

    A tile of 128 × 4 scales is stored as 32 rows of 16: of four rows that are 32 apart, four scales each.
    """
    high, wide = (size // tile for size, tile in zip(padded(rows, columns), TILE, strict=True))
    tiles = scales.reshape(high, wide, 32, 4, 4).transpose(0, 3, 2, 1, 4)
    return tiles.reshape(high * TILE[0], wide * TILE[1])[:rows, :columns]


def mxfp8_scales(stored: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return mxfp8's scales, float32 (rows, columns), from the exponents in tiles; 0 is a scale of 0, as in ComfyUI.

    Raises ValueError if one of them is NaN.
    """
    exponents = untiled(stored.view(np.uint8), rows, columns)
    if (exponents == 255).any():
        raise ValueError(f"its {SCALE} has NaN, expected finite numbers of at least 0")
    return (exponents.astype(np.uint32) << 23).view(np.float32)


def dequantise_mxfp8(parts: Parts, shape: tuple[int, ...], settings: Json) -> np.ndarray:
    """Return the values of 8-bit floats in blocks."""
    del settings
    scales = mxfp8_scales(parts[SCALE], shape[0], shape[1] // MXFP8_BLOCK)
    values = _float32(parts["weight"]).reshape(*scales.shape, MXFP8_BLOCK)
    values *= scales[..., None]
    return values.reshape(shape)


def dequantise_nvfp4(parts: Parts, shape: tuple[int, ...], settings: Json) -> np.ndarray:
    """Return the values of 4-bit floats in blocks."""
    del settings
    of_blocks = untiled(parts[SCALE].view(FLOAT8[0]), shape[0], shape[1] // NVFP4_BLOCK)
    scales = checked_scale(SCALE, of_blocks) * checked_scale(SCALE_2, parts[SCALE_2]).reshape(())
    pairs = np.stack([parts["weight"] >> 4, parts["weight"] & 15], axis=-1)
    values = _E2M1[pairs].reshape(*scales.shape, NVFP4_BLOCK)
    values *= scales[..., None]
    return values.reshape(shape)
