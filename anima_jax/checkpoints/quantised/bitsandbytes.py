"""bitsandbytes' weights: layout and values.

Source: bitsandbytes 0.50 (`functional.py`, `QuantState`). A weight of 4 bits is a sequence of values. Two share a byte,
the first in the upper half; each is a code for one of 16 levels. A block of values, usually 64, has its peak as its
scale. With double quantisation a peak is itself a code of 8 bits: its level times the peak of a block of peaks,
plus an offset. The settings, in JSON, have the shape of the weight and the sizes of the blocks. A weight of 8 bits
(LLM.int8) has the peak of each output instead, which the code 127 stands for.
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np

from anima_jax.checkpoints.quantised.parts import PartLayout, Parts, checked_scale, required
from anima_jax.checkpoints.safetensors_header import TensorInfo

CODES = "weight"
PEAKS, LEVELS, STATE = "weight.absmax", "weight.quant_map", "weight.quant_state"
NESTED_PEAKS, NESTED_LEVELS = "weight.nested_absmax", "weight.nested_quant_map"
ROW_PEAKS = "SCB"
"""Names of the parts, without the kind at the end of the state's."""

KINDS = ("nf4", "fp4")

_LARGEST_OFFSET = 3e38  # of those in float32

_BYTES = tuple(np.dtype(dtype) for dtype in (np.uint8, np.int8, ml_dtypes.bfloat16, np.float16, np.float32))
_FLOAT32, _UINT8 = np.dtype(np.float32), np.dtype(np.uint8)


def layout(parts: Mapping[str, TensorInfo], settings: Mapping[str, Any]) -> PartLayout:
    """Return the layout of a 4-bit weight. Raises ValueError for parts that are missing or do not fit."""
    codes = required(parts, CODES, *_BYTES)
    shape = _shape(codes, settings)
    values, block = math.prod(shape), _block(settings, "blocksize")
    _require_length(codes, -(-values // (2 * codes.dtype.itemsize)))
    inputs = Fraction(values, shape[0])
    per_row = {CODES: inputs / (2 * codes.dtype.itemsize), PEAKS: inputs / block}
    unit = math.lcm(2 * codes.dtype.itemsize, block)
    peaks = -(-values // block)
    nested = NESTED_PEAKS in parts or "nested_blocksize" in settings
    _require_length(required(parts, PEAKS, _UINT8 if nested else _FLOAT32), peaks)
    _require_length(required(parts, LEVELS, _FLOAT32), 16)
    if nested:
        outer = _block(settings, "nested_blocksize")
        _require_length(required(parts, NESTED_PEAKS, _FLOAT32), -(-peaks // outer))
        _require_length(required(parts, NESTED_LEVELS, _FLOAT32), 256)
        offset = settings.get("nested_offset")
        if not isinstance(offset, (int, float)) or isinstance(offset, bool) or not abs(offset) < _LARGEST_OFFSET:
            raise ValueError(f"{codes.name}: nested_offset is {offset!r:.40}, expected a finite number")
        per_row[NESTED_PEAKS] = inputs / block / outer
        unit = math.lcm(unit, block * outer)
    return PartLayout(shape, per_row, unit // math.gcd(unit, int(inputs)))


def dequantise(parts: Parts, shape: tuple[int, ...], settings: Mapping[str, Any]) -> np.ndarray:
    """Return the values of 4-bit codes."""
    block, values = _block(settings, "blocksize"), math.prod(shape)
    peaks = parts[PEAKS]
    if NESTED_PEAKS in parts:
        of_blocks = checked_scale(NESTED_PEAKS, parts[NESTED_PEAKS]).reshape(-1)
        of_peaks = of_blocks.repeat(_block(settings, "nested_blocksize"))[: peaks.size]
        of_codes = parts[NESTED_LEVELS].reshape(-1)[peaks.reshape(-1)]
        peaks = of_codes * of_peaks + np.float32(settings["nested_offset"])
    codes = np.ascontiguousarray(parts[CODES]).reshape(-1).view(np.uint8)
    levels = parts[LEVELS].reshape(-1)
    if not np.isfinite(levels).all():
        raise ValueError("the levels in its quant_map are not finite")
    out = levels[np.stack([codes >> 4, codes & 15], axis=-1)].reshape(-1)
    out = np.pad(out, (0, -out.size % block)).reshape(-1, block)
    out *= checked_scale(PEAKS, peaks, negative=NESTED_PEAKS in parts).reshape(-1, 1)
    return out.reshape(-1)[:values].reshape(shape)


def int8_layout(parts: Mapping[str, TensorInfo], settings: Mapping[str, Any]) -> PartLayout:
    """Return the layout of an 8-bit weight. Raises ValueError for parts that are missing or do not fit."""
    del settings
    codes = required(parts, CODES, np.dtype(np.int8))
    if len(codes.shape) != 2:
        raise ValueError(f"{codes.name} is {codes.shape}, expected a matrix")
    _require_length(required(parts, ROW_PEAKS, _FLOAT32), codes.shape[0])
    return PartLayout(codes.shape, {CODES: Fraction(1), ROW_PEAKS: Fraction(1)})


def dequantise_int8(parts: Parts, shape: tuple[int, ...], settings: Mapping[str, Any]) -> np.ndarray:
    """Return the values of 8-bit codes."""
    del shape, settings
    peaks = checked_scale(ROW_PEAKS, parts[ROW_PEAKS]).reshape(-1, 1)
    return parts[CODES].astype(np.float32) * peaks * np.float32(1 / 127)


def _shape(codes: TensorInfo, settings: Mapping[str, Any]) -> tuple[int, ...]:
    shape = settings.get("shape")
    if not isinstance(shape, list) or not shape or not all(type(size) is int and 0 < size < 2**31 for size in shape):
        raise ValueError(f"{codes.name}: its quant_state has the shape {shape!r:.80}, expected a list of sizes")
    return tuple(shape)


def _block(settings: Mapping[str, Any], key: str) -> int:
    size = settings.get(key)
    if type(size) is not int or not 0 < size <= 2**16 or size.bit_count() != 1:
        raise ValueError(f"the quant_state has {key} {size!r:.40}, expected a power of 2")
    return size


def _require_length(part: TensorInfo, length: int) -> None:
    if math.prod(part.shape) != length or (part.shape and part.shape[0] != length):
        raise ValueError(f"{part.name} is {part.shape}, expected {length} values")
