"""Quantising of weights as ComfyUI's kernels (comfy_kitchen's reference backend) and bitsandbytes do, code for code.

Each function takes some rows of a weight in float32 (axes: o outputs, i inputs) and the largest magnitude in the whole
weight, which only the formats with one scale per tensor use. It returns the parts of these rows by their names in the
file after the layer's name. `quantise` (quantiser.py) concatenates the parts of consecutive ranges of rows.

Sources: `quantize_*` in comfy_kitchen's `backends/eager/quantization.py`; OCP Microscaling Formats 1.0; NF4 from QLoRA
(arXiv 2305.14314), packed as in bitsandbytes' `backends/default/ops.py`.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from anima_jax.checkpoints.quantised.bitsandbytes import CODES, LEVELS, PEAKS, STATE
from anima_jax.checkpoints.quantised.comfyui import (
    FLOAT8,
    MXFP8_BLOCK,
    NVFP4_BLOCK,
    SCALE,
    SCALE_2,
    SETTINGS,
    TILE,
    padded,
)
from anima_jax.checkpoints.quantised.formats import FORMATS
from anima_jax.checkpoints.quantised.parts import Parts
from anima_jax.checkpoints.quantised.quantiser import Quantiser
from anima_jax.models.quantised import NF4_BLOCK, NF4_LEVELS, hadamard

_F8_MAX, _F4_MAX = np.float32(448.0), np.float32(6.0)
_TINY = np.finfo(np.float32).tiny
_ROTATED = 256  # inputs that one rotation mixes; 4 to some power
_CACHED = 2**15  # values whose intermediate results stay in the CPU's cache


def fp8_scaled(values_oi: np.ndarray, largest: float) -> Parts:
    """One scale per tensor: the largest magnitude becomes float8_e4m3fn's, 448."""
    scale = np.maximum(np.float32(largest) / _F8_MAX, _TINY)  # of zeros, too, the inverse is finite
    scaled = np.clip(values_oi * (np.float32(1) / scale), -_F8_MAX, _F8_MAX)
    return {CODES: float_codes(scaled, 4, 3).view(FLOAT8[0]), SCALE: scale}


def int8_tensorwise(values_oi: np.ndarray, largest: float) -> Parts:
    """One scale per tensor: the largest magnitude becomes 127."""
    return _int8(values_oi, np.float32(largest))


def int8_rowwise(values_oi: np.ndarray, largest: float = 0.0) -> Parts:
    """One scale per output: its largest magnitude becomes 127."""
    return _int8(values_oi, np.abs(values_oi).max(axis=1, keepdims=True))


def int8_convrot(values_oi: np.ndarray, largest: float = 0.0) -> Parts:
    """Row-wise after each group of 256 inputs is rotated, which spreads outliers; inputs are a multiple of 256."""
    return int8_rowwise((values_oi.reshape(-1, _ROTATED) @ hadamard(_ROTATED)).reshape(values_oi.shape))


def _int8(values_oi: np.ndarray, largest: np.ndarray | np.float32) -> Parts:
    scale = np.maximum(largest / np.float32(127), np.float32(1e-30))
    return {CODES: np.clip(np.rint(values_oi / scale), -128, 127).astype(np.int8), SCALE: scale}


def mxfp8(values_oi: np.ndarray, largest: float = 0.0) -> Parts:
    """Float8_e4m3fn with a power of two per block of 32 inputs, rounded up; outputs and inputs are multiples of 32."""
    blocks = values_oi.reshape(len(values_oi), -1, MXFP8_BLOCK)
    needed = np.maximum(_peaks(values_oi, MXFP8_BLOCK) / _F8_MAX, np.float32(2.0**-127))
    # The logarithm is rounded to float32, as the reference's, before it is rounded up.
    exponents = np.ceil(np.log2(needed.astype(np.float64)).astype(np.float32)).astype(np.int32)
    scaled = np.clip(blocks * np.ldexp(np.float32(1), -exponents)[..., None], -_F8_MAX, _F8_MAX)
    scaled[exponents == -127] = 0  # the code of this scale, 0, stands for a block of zeros
    codes = float_codes(scaled, 4, 3).view(FLOAT8[0]).reshape(values_oi.shape)
    return {CODES: codes, SCALE: _tiled((exponents + 127).astype(np.uint8))}


def nvfp4(values_oi: np.ndarray, largest: float) -> Parts:
    """Float4 (e2m1) with a float8 scale per block of 16 inputs, itself scaled per tensor; multiples of 16, as mxfp8."""
    scale = np.maximum(np.float32(largest) / (_F8_MAX * _F4_MAX), _TINY)
    blocks = values_oi.reshape(len(values_oi), -1, NVFP4_BLOCK)
    block_scales = np.minimum(_peaks(values_oi, NVFP4_BLOCK) / _F4_MAX / scale, _F8_MAX)
    scale_codes = float_codes(block_scales, 4, 3).view(FLOAT8[0])
    total = scale * scale_codes.astype(np.float32)
    scaled = np.clip(blocks / np.where(total, total, _F8_MAX)[..., None], -_F4_MAX, _F4_MAX)
    scaled[total == 0] = 0
    codes = float_codes(scaled, 2, 1).reshape(values_oi.shape)
    return {CODES: _packed(codes), SCALE: _tiled(scale_codes), SCALE_2: scale}


def nf4(values_oi: np.ndarray, largest: float = 0.0) -> Parts:
    """The nearest of sixteen values, times the largest magnitude of 64 consecutive values (inputs: multiples)."""
    blocks = values_oi.reshape(-1, NF4_BLOCK)
    absmax = _peaks(values_oi, NF4_BLOCK).reshape(-1)
    scaled = blocks * (np.float32(1) / np.maximum(absmax, np.float32(1e-38)))[:, None]
    scaled = np.clip(scaled, -1, 1)
    codes = np.zeros(scaled.shape, np.uint8)
    for middle in (NF4_LEVELS[:-1] + NF4_LEVELS[1:]) / np.float32(2):
        codes += scaled > middle  # several times faster than a binary search
    return {CODES: _packed(codes.ravel())[:, None], PEAKS: absmax}


def float_codes(values: np.ndarray, exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """Round float32 to the codes (sign, exponent, mantissa; uint8) of a small format: to nearest, ties to even.

    Values must not exceed the format's largest.
    """
    smallest = np.uint32((129 - (1 << (exponent_bits - 1))) << 23)  # the exponent of the smallest normal number
    dropped = np.uint32(23 - mantissa_bits)
    all_bits = values.reshape(-1).view(np.uint32)
    codes = np.empty(all_bits.size, np.uint8)
    buffers = [np.empty(_CACHED, np.uint32) for _ in range(3)]
    for first in range(0, codes.size, _CACHED):  # many times faster than arrays that leave the CPU's cache
        bits = all_bits[first : first + _CACHED]
        rounded, exponent, large = (buffer[: bits.size] for buffer in buffers)
        np.bitwise_and(bits, np.uint32(0x7FFFFFFF), out=rounded)
        np.bitwise_and(bits, np.uint32(0x7F800000), out=exponent)
        np.maximum(exponent, smallest, out=exponent)
        # A number that is 2^(23 − mantissa_bits) times larger makes the addition round to the mantissa's last bit.
        np.add(exponent, dropped << np.uint32(23), out=large)
        np.add(rounded.view(np.float32), large.view(np.float32), out=rounded.view(np.float32))
        rounded -= large
        exponent -= smallest
        exponent >>= dropped
        rounded += exponent
        np.right_shift(bits, np.uint32(31 - exponent_bits - mantissa_bits), out=exponent)
        exponent &= np.uint32(1 << (exponent_bits + mantissa_bits))
        rounded |= exponent
        codes[first : first + _CACHED] = rounded
    return codes.reshape(values.shape)


def _peaks(values_oi: np.ndarray, block: int) -> np.ndarray:
    """Return the largest magnitude of each block of inputs, (outputs, blocks)."""
    starts = np.arange(0, values_oi.size, block)
    return np.maximum.reduceat(np.abs(values_oi).reshape(-1), starts).reshape(len(values_oi), -1)


def _packed(codes: np.ndarray) -> np.ndarray:
    """Pack pairs of four-bit codes along the last axis, the first of each in the high bits."""
    return codes[..., ::2] << 4 | codes[..., 1::2]


def _tiled(scales: np.ndarray) -> np.ndarray:
    """Arrange block scales as tensor cores read them (cuBLAS, "1D block scaling factors layout").

    They are filled up with zeros; `untiled` is the inverse.
    """
    rows, columns = padded(*scales.shape)
    filled = np.zeros((rows, columns), scales.dtype)
    filled[: scales.shape[0], : scales.shape[1]] = scales
    tiles = filled.reshape(rows // TILE[0], 4, 32, columns // TILE[1], 4).transpose(0, 3, 2, 1, 4)
    return tiles.reshape(rows, columns)


def _json(values: Mapping[str, Any]) -> np.ndarray:
    return np.frombuffer(json.dumps(values).encode(), np.uint8)


def _comfyui(
    storage: str,
    rows: Callable[[np.ndarray, float], Parts],
    parts: Mapping[str, Any],
    settings: Mapping[str, Any],
    multiple: tuple[int, int] = (1, 1),
) -> Quantiser:
    """Return the quantiser of a format, a key of FORMATS, whose weights have `settings` as JSON."""
    return Quantiser(
        rows,
        lambda found, shape: FORMATS[storage].dequantise(found, shape, settings),
        parts,
        multiple,
        lambda shape: {SETTINGS: _json(settings)},
    )


def _state(shape: tuple[int, ...]) -> dict[str, Any]:
    """Return bitsandbytes' settings of a weight."""
    return {"quant_type": "nf4", "blocksize": NF4_BLOCK, "dtype": "bfloat16", "shape": shape}


_F32, _U8, _I8 = (np.dtype(dtype) for dtype in (np.float32, np.uint8, np.int8))
_SCALAR = (_F32, lambda o, i: ())


def _same(o: int, i: int) -> tuple[int, int]:
    return o, i


def _tiles(block: int) -> Callable[[int, int], tuple[int, int]]:
    return lambda o, i: padded(o, i // block)


_ROWWISE = {SCALE: (_F32, lambda o, i: (o, 1)), CODES: (_I8, _same)}
_ONE_SCALE = {SCALE: _SCALAR, CODES: (_I8, _same)}
_INTEGERS = {"format": "int8_tensorwise"}
_ROTATION = {"convrot": True, "convrot_groupsize": _ROTATED}
_MXFP8 = {SCALE: (_U8, _tiles(MXFP8_BLOCK)), CODES: (FLOAT8[0], _same)}
_NVFP4 = {SCALE_2: _SCALAR, SCALE: (FLOAT8[0], _tiles(NVFP4_BLOCK)), CODES: (_U8, lambda o, i: (o, i // 2))}

QUANTISERS = {
    "fp8_scaled": _comfyui(
        "fp8_scaled", fp8_scaled, {SCALE: _SCALAR, CODES: (FLOAT8[0], _same)}, {"format": "float8_e4m3fn"}
    ),
    "int8": _comfyui("int8", int8_rowwise, _ROWWISE, _INTEGERS),
    "int8_tensorwise": _comfyui("int8", int8_tensorwise, _ONE_SCALE, _INTEGERS),
    "int8_convrot": _comfyui("int8_convrot", int8_convrot, _ROWWISE, _INTEGERS | _ROTATION, (1, _ROTATED)),
    "mxfp8": _comfyui("mxfp8", mxfp8, _MXFP8, {"format": "mxfp8"}, (32, 32)),
    "nvfp4": _comfyui("nvfp4", nvfp4, _NVFP4, {"format": "nvfp4"}, (16, 16)),
    "nf4": Quantiser(
        nf4,
        lambda found, shape: FORMATS["nf4"].dequantise(found | {LEVELS: NF4_LEVELS}, shape, _state(shape)),
        {PEAKS: (_F32, lambda o, i: (o * i // NF4_BLOCK,)), CODES: (_U8, lambda o, i: (o * i // 2, 1))},
        (1, NF4_BLOCK),
        lambda shape: {LEVELS: NF4_LEVELS, f"{STATE}.bitsandbytes__nf4": _json(_state(shape))},
    ),
}
"""Name of the format → its quantiser. Within a weight, the parts that need the largest alignment come first."""
