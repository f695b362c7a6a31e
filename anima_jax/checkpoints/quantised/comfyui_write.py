"""Quantising of weights as ComfyUI's kernels (comfy_kitchen's reference backend) and bitsandbytes do, code for code.

Each function takes some rows of a weight in float32 (axes: o outputs, i inputs) and the largest magnitude in the whole
weight, which only the formats with one scale per tensor use. It returns the parts of these rows by their names in the
file after the layer's name. `quantise` (write.py) concatenates the parts of consecutive ranges of rows.

Sources: `quantize_*` in comfy_kitchen's `backends/eager/quantization.py`; OCP Microscaling Formats 1.0; NF4 from QLoRA
(arXiv 2305.14314), packed as in bitsandbytes' `backends/default/ops.py`.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from anima_jax.checkpoints.quantised.quantiser import Parts, Quantiser

_F8 = np.dtype(ml_dtypes.float8_e4m3fn)
_F8_MAX, _F4_MAX = np.float32(448.0), np.float32(6.0)
_TINY = np.finfo(np.float32).tiny
_ROTATED = 256  # inputs that one rotation mixes; 4 to some power

NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
"""The sixteen values of NF4: quantiles of the normal distribution."""


def fp8_scaled(values_oi: np.ndarray, largest: float) -> Parts:
    """One scale per tensor: the largest magnitude becomes float8_e4m3fn's, 448."""
    scale = np.maximum(np.float32(largest) / _F8_MAX, _TINY)  # of zeros, too, the inverse is finite
    scaled = np.clip(values_oi * (np.float32(1) / scale), -_F8_MAX, _F8_MAX)
    return {"weight": float_codes(scaled, 4, 3).view(_F8), "weight_scale": scale}


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
    return {"weight": np.clip(np.rint(values_oi / scale), -128, 127).astype(np.int8), "weight_scale": scale}


def mxfp8(values_oi: np.ndarray, largest: float = 0.0) -> Parts:
    """Float8_e4m3fn with a power of two per block of 32 inputs, rounded up; outputs and inputs are multiples of 32."""
    blocks = values_oi.reshape(len(values_oi), -1, 32)
    needed = np.maximum(np.abs(blocks).max(axis=-1) / _F8_MAX, np.float32(2.0**-127))
    # The logarithm is rounded to float32, as the reference's, before it is rounded up.
    exponents = np.ceil(np.log2(needed.astype(np.float64)).astype(np.float32)).astype(np.int32)
    scaled = np.clip(blocks * np.ldexp(np.float32(1), -exponents)[..., None], -_F8_MAX, _F8_MAX)
    scaled[exponents == -127] = 0  # the code of this scale, 0, stands for a block of zeros
    codes = float_codes(scaled, 4, 3).view(_F8).reshape(values_oi.shape)
    return {"weight": codes, "weight_scale": _tiled((exponents + 127).astype(np.uint8))}


def nvfp4(values_oi: np.ndarray, largest: float) -> Parts:
    """Float4 (e2m1) with a float8 scale per block of 16 inputs, itself scaled per tensor; multiples of 16, as mxfp8."""
    scale = np.maximum(np.float32(largest) / (_F8_MAX * _F4_MAX), _TINY)
    blocks = values_oi.reshape(len(values_oi), -1, 16)
    block_scales = np.minimum(np.abs(blocks).max(axis=-1) / _F4_MAX / scale, _F8_MAX)
    scale_codes = float_codes(block_scales, 4, 3).view(_F8)
    total = scale * scale_codes.astype(np.float32)
    scaled = np.clip(blocks / np.where(total, total, _F8_MAX)[..., None], -_F4_MAX, _F4_MAX)
    scaled[total == 0] = 0
    codes = float_codes(scaled, 2, 1).reshape(values_oi.shape)
    return {"weight": _packed(codes), "weight_scale": _tiled(scale_codes), "weight_scale_2": scale}


def nf4(values_oi: np.ndarray, largest: float = 0.0) -> Parts:
    """The nearest of sixteen values, times the largest magnitude of 64 consecutive values (inputs: multiples)."""
    blocks = values_oi.reshape(-1, 64)
    absmax = np.abs(blocks).max(axis=-1)
    scaled = blocks * (np.float32(1) / np.maximum(absmax, np.float32(1e-38)))[:, None]
    middles = (NF4[:-1] + NF4[1:]) / np.float32(2)
    codes = np.searchsorted(middles, np.clip(scaled, -1, 1).ravel()).astype(np.uint8)
    return {"weight": _packed(codes)[:, None], "weight.absmax": absmax}


def float_codes(values: np.ndarray, exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """Round float32 to the codes (sign, exponent, mantissa; uint8) of a small format: to nearest, ties to even.

    Values must not exceed the format's largest.
    """
    bits = values.view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    smallest = np.uint32((129 - (1 << (exponent_bits - 1))) << 23)  # the exponent of the smallest normal number
    exponent = np.maximum(magnitude & np.uint32(0x7F800000), smallest)
    # A number that is 2^(23 − mantissa_bits) times larger makes the addition round to the mantissa's last bit.
    large = exponent + np.uint32((23 - mantissa_bits) << 23)
    rounded = (magnitude.view(np.float32) + large.view(np.float32)).view(np.uint32)
    rounded -= large
    exponent -= smallest
    exponent >>= np.uint32(23 - mantissa_bits)
    rounded += exponent
    bits = bits >> np.uint32(31 - exponent_bits - mantissa_bits)
    bits &= np.uint32(1 << (exponent_bits + mantissa_bits))
    rounded |= bits
    return rounded.astype(np.uint8)


def hadamard(size: int) -> np.ndarray:
    """Return ConvRot's orthogonal and symmetric matrix: the Kronecker power of a regular 4 × 4 Hadamard matrix."""
    four = np.ones((4, 4), np.float32) - 2 * np.eye(4, dtype=np.float32)[::-1]
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.kron(matrix, four)
    return matrix / np.float32(size**0.5)


def _packed(codes: np.ndarray) -> np.ndarray:
    """Pack pairs of four-bit codes along the last axis, the first of each in the high bits."""
    return codes[..., ::2] << 4 | codes[..., 1::2]


def _tiled(scales: np.ndarray) -> np.ndarray:
    """Arrange block scales as tensor cores read them (cuBLAS, "1D block scaling factors layout").

    Padded with zeros to tiles of 128 rows and 4 columns, each stored as 32 rows of 16.
    """
    rows, columns = -(-scales.shape[0] // 128), -(-scales.shape[1] // 4)
    padded = np.zeros((rows * 128, columns * 4), scales.dtype)
    padded[: scales.shape[0], : scales.shape[1]] = scales
    tiles = padded.reshape(rows, 4, 32, columns, 4).transpose(0, 3, 2, 1, 4)
    return tiles.reshape(rows * 128, columns * 4)


def _settings(values: Mapping[str, Any]) -> np.ndarray:
    return np.frombuffer(json.dumps(values).encode(), np.uint8)


def _comfyui(
    rows: Callable[[np.ndarray, float], Parts],
    parts: Mapping[str, Any],
    multiple: tuple[int, int] = (1, 1),
    **settings: Any,
) -> Quantiser:
    """Return a quantiser whose weights have their settings as JSON in `comfy_quant`."""
    return Quantiser(rows, parts, multiple, lambda shape: {"comfy_quant": _settings(settings)})


def _nf4_settings(shape: tuple[int, ...]) -> Parts:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": shape}
    return {"weight.quant_map": NF4, "weight.quant_state.bitsandbytes__nf4": _settings(state)}


_F32, _U8, _I8 = (np.dtype(dtype) for dtype in (np.float32, np.uint8, np.int8))
_SCALAR = (_F32, lambda o, i: ())


def _same(o: int, i: int) -> tuple[int, int]:
    return o, i


_ROWWISE = {"weight_scale": (_F32, lambda o, i: (o, 1)), "weight": (_I8, _same)}


def _tiles(block: int) -> Callable[[int, int], tuple[int, ...]]:
    return lambda o, i: (-(-o // 128) * 128, -(-i // (4 * block)) * 4)


QUANTISERS = {
    "fp8_scaled": _comfyui(fp8_scaled, {"weight_scale": _SCALAR, "weight": (_F8, _same)}, format="float8_e4m3fn"),
    "int8": _comfyui(int8_rowwise, _ROWWISE, format="int8_tensorwise"),
    "int8_tensorwise": _comfyui(
        int8_tensorwise, {"weight_scale": _SCALAR, "weight": (_I8, _same)}, format="int8_tensorwise"
    ),
    "int8_convrot": _comfyui(
        int8_convrot, _ROWWISE, (1, _ROTATED), format="int8_tensorwise", convrot=True, convrot_groupsize=_ROTATED
    ),
    "mxfp8": _comfyui(mxfp8, {"weight_scale": (_U8, _tiles(32)), "weight": (_F8, _same)}, (32, 32), format="mxfp8"),
    "nvfp4": _comfyui(
        nvfp4,
        {
            "weight_scale_2": _SCALAR,
            "weight_scale": (_F8, _tiles(16)),
            "weight": (_U8, lambda o, i: (o, i // 2)),
        },
        (16, 16),
        format="nvfp4",
    ),
    "nf4": Quantiser(
        nf4,
        {"weight.absmax": (_F32, lambda o, i: (o * i // 64,)), "weight": (_U8, lambda o, i: (o * i // 2, 1))},
        (1, 64),
        _nf4_settings,
    ),
}
"""Name of the format → its quantiser. Within a weight, the parts that need the largest alignment come first."""


def dequantise(parts: Parts, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float32 values of codes with a scale."""
    return parts["weight"].astype(np.float32) * parts["weight_scale"]
