"""GGML's block formats, the quantised types of GGUF files: what a block's bytes mean, as float32.

A row of a weight (its last axis) is divided into blocks of 32 to 256 values; a block stores its codes and scales
together. The layouts are those of ggml's `ggml-common.h`; the arithmetic is that of `gguf.quants`, in its order: the
float32 values are equal bit for bit. Axes: n blocks, g groups of a block that share a scale, v values of a block.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

Blocks = Any
"""A structured array (n,) of blocks, whose fields are those of the format's layout."""

PLAIN: dict[int, np.dtype[Any]] = {
    0: np.dtype("<f4"),
    1: np.dtype("<f2"),
    24: np.dtype("i1"),
    25: np.dtype("<i2"),
    26: np.dtype("<i4"),
    27: np.dtype("<i8"),
    28: np.dtype("<f8"),
    30: np.dtype(ml_dtypes.bfloat16),
}
"""ggml's numbers of types that are not quantised."""

CHUNK = 2**20
"""Values that are decoded at a time, to bound the memory of intermediate results."""

_FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


@dataclasses.dataclass(frozen=True)
class BlockFormat:
    """One block format: ggml's number and name, values per block, the fields of a block, and how they decode.

    `file_type` is the number that `general.file_type` has in files whose weights are mostly of this format.
    """

    number: int
    name: str
    values: int
    layout: np.dtype[Any]
    decode: Callable[[Blocks], np.ndarray]
    file_type: int = 1024

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return self.layout.itemsize


def dequantise(blocks: np.ndarray, form: BlockFormat) -> np.ndarray:
    """Decode whole blocks: uint8, any shape with `form.nbytes` bytes per block in all, to float32 (values,).

    Raises ValueError if a block's scale is NaN or infinite, or if the format needs a package that is missing.
    """
    rows = blocks.reshape(-1, form.nbytes)
    out = np.empty((len(rows), form.values), np.float32)
    step = max(1, CHUNK // form.values)
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        with np.errstate(over="ignore", invalid="ignore"):
            out[part] = form.decode(np.ascontiguousarray(rows[part]).view(form.layout)[:, 0])
            finite = bool(np.isfinite(out[part].sum()))
        # Codes are finite: only a scale makes a value NaN or infinite.
        if not finite and (bad := int(np.count_nonzero(~np.isfinite(out[part]).all(axis=1)))):
            raise ValueError(f"{bad} of {len(rows)} blocks of {form.name} have a scale that is NaN or infinite")
    return out.reshape(-1)


def unpack(codes: np.ndarray, bits: int, span: int) -> np.ndarray:
    """Unpack uint8 (n, bytes) to codes (n, bytes · 8 / bits): the low bits of `span` bytes, then their next bits, ….

    The following `span` bytes come after all bits of the first.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    parts = codes.reshape(len(codes), -1, 1, span) >> shifts
    parts &= np.uint8(2**bits - 1)
    return parts.reshape(len(codes), -1)


def pack(codes: np.ndarray, bits: int, span: int) -> np.ndarray:
    """Pack codes (n, values) of at most `bits` bits: the inverse of `unpack`."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    parts = codes.astype(np.uint8).reshape(len(codes), -1, 8 // bits, span) << shifts
    return np.bitwise_or.reduce(parts, axis=2).reshape(len(codes), -1)


def _scaled(codes_nv: np.ndarray, scales_ng: np.ndarray, minima_ng: np.ndarray | None = None) -> np.ndarray:
    """Return codes · scale − minimum, with one scale and minimum for each group of consecutive values."""
    values = codes_nv.astype(np.float32).reshape(*scales_ng.shape, -1)
    values *= scales_ng[..., None]
    if minima_ng is not None:
        values -= minima_ng[..., None]
    return values.reshape(len(codes_nv), -1)


def _float(field: np.ndarray) -> np.ndarray:
    """Return a scalar field as a float32 column."""
    return field.astype(np.float32)[:, None]


def _five_bits(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low | (high << np.uint8(4))


def _q4_0(b: Blocks) -> np.ndarray:
    return _scaled(unpack(b["qs"], 4, 16).astype(np.int8) - np.int8(8), _float(b["d"]))


def _q4_1(b: Blocks) -> np.ndarray:
    return _scaled(unpack(b["qs"], 4, 16), _float(b["d"]), -_float(b["m"]))


def _codes_of_q5(b: Blocks) -> np.ndarray:
    return _five_bits(unpack(b["qs"], 4, 16), np.unpackbits(b["qh"], axis=-1, bitorder="little"))


def _q5_0(b: Blocks) -> np.ndarray:
    return _scaled(_codes_of_q5(b).astype(np.int8) - np.int8(16), _float(b["d"]))


def _q5_1(b: Blocks) -> np.ndarray:
    return _scaled(_codes_of_q5(b), _float(b["d"]), -_float(b["m"]))


def _q8_0(b: Blocks) -> np.ndarray:
    return _scaled(b["qs"], _float(b["d"]))


def _q2_k(b: Blocks) -> np.ndarray:
    scales, minima = b["scales"] & np.uint8(15), b["scales"] >> np.uint8(4)
    return _scaled(unpack(b["qs"], 2, 32), _float(b["d"]) * scales, _float(b["dmin"]) * minima)


def _q3_k(b: Blocks) -> np.ndarray:
    low, high = unpack(b["scales"][:, :8], 4, 8), unpack(b["scales"][:, 8:], 2, 4)
    scales = _five_bits(low, high).astype(np.int8) - np.int8(32)
    codes = unpack(b["qs"], 2, 32).astype(np.int8) - ((unpack(b["hmask"], 1, 32) ^ np.uint8(1)) << np.uint8(2)).astype(
        np.int8
    )
    return _scaled(codes, _float(b["d"]) * scales)


def unpack_scales(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unpack the twelve bytes of q4_k and q5_k, (n, 12), to eight scales and eight minima of six bits."""
    first, second, third = scales[:, :4], scales[:, 4:8], scales[:, 8:]
    high, six = np.uint8(0x30), np.uint8(0x3F)
    upper_scales = (third & np.uint8(15)) | ((first >> np.uint8(2)) & high)
    upper_minima = (third >> np.uint8(4)) | ((second >> np.uint8(2)) & high)
    return np.hstack([first & six, upper_scales]), np.hstack([second & six, upper_minima])


def pack_scales(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Pack eight scales and eight minima of six bits, uint8 (n, 8): the inverse of `unpack_scales`."""
    high, low = np.uint8(0x30), np.uint8(15)
    first = scales[:, :4] | ((scales[:, 4:] & high) << np.uint8(2))
    second = minima[:, :4] | ((minima[:, 4:] & high) << np.uint8(2))
    third = (scales[:, 4:] & low) | ((minima[:, 4:] & low) << np.uint8(4))
    return np.hstack([first, second, third])


def _affine_k(b: Blocks, codes: np.ndarray) -> np.ndarray:
    scales, minima = unpack_scales(b["scales"])
    return _scaled(codes, _float(b["d"]) * scales, _float(b["dmin"]) * minima)


def _q4_k(b: Blocks) -> np.ndarray:
    return _affine_k(b, unpack(b["qs"], 4, 32))


def _q5_k(b: Blocks) -> np.ndarray:
    return _affine_k(b, _five_bits(unpack(b["qs"], 4, 32), unpack(b["qh"], 1, 32)))


def _q6_k(b: Blocks) -> np.ndarray:
    codes = _five_bits(unpack(b["ql"], 4, 64), unpack(b["qh"], 2, 32)).astype(np.int8) - np.int8(32)
    return _scaled(codes, _float(b["d"]) * b["scales"])


def _tq1_0(b: Blocks) -> np.ndarray:
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]  # the products wrap around: base 3 in the upper bits
    parts = [b["qs"][:, None, :32] * powers, b["qs"][:, None, 32:] * powers, b["qh"][:, None] * powers[:4]]
    digits = np.hstack([part.reshape(len(b), -1) for part in parts]).astype(np.uint16) * np.uint16(3)
    return _scaled((digits >> np.uint16(8)).astype(np.int8) - np.int8(1), _float(b["d"]))


def _tq2_0(b: Blocks) -> np.ndarray:
    return _scaled(unpack(b["qs"], 2, 32).astype(np.int8) - np.int8(1), _float(b["d"]))


def _mxfp4(b: Blocks) -> np.ndarray:
    return _scaled(_FP4[unpack(b["qs"], 4, 16)], np.ldexp(np.float32(1), b["e"].astype(np.int32) - 128)[:, None])


def _nvfp4(b: Blocks) -> np.ndarray:
    exponent, mantissa = (b["d"] >> np.uint8(3)).astype(np.int32) & 15, (b["d"] & np.uint8(7)).astype(np.float32)
    scales = np.ldexp(np.where(exponent == 0, mantissa, mantissa + 8), np.maximum(exponent, 1) - 11)
    scales = np.where(b["d"] == 0x7F, np.float32(0), scales).astype(np.float32)
    return _scaled(_FP4[unpack(b["qs"], 4, 8)], scales)


def _iq4_nl(b: Blocks) -> np.ndarray:
    return _scaled(_IQ4[unpack(b["qs"], 4, 16)], _float(b["d"]))


def _iq4_xs(b: Blocks) -> np.ndarray:
    high = (b["scales_h"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16)).astype(np.uint8) & np.uint8(3)
    scales = _five_bits(unpack(b["scales_l"], 4, 1), high).astype(np.int8) - np.int8(32)
    return _scaled(_IQ4[unpack(b["qs"], 4, 16)], _float(b["d"]) * scales)


def _by_package(number: int, name: str, nbytes: int, file_type: int) -> BlockFormat:
    """Return a format whose codebook of vectors is in the package `gguf`, which is imported when it is needed."""

    def decode(b: Blocks) -> np.ndarray:
        try:
            import gguf
        except ImportError as error:
            raise ValueError(f"{name} needs the package gguf: pip install 'anima-jax[gguf]'") from error
        rows = b.view(np.uint8).reshape(len(b), nbytes)
        return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(number))

    return BlockFormat(number, name, 256, np.dtype([("block", "u1", nbytes)]), decode, file_type)


def _row(number: int, name: str, values: int, decode: Callable[[Blocks], np.ndarray], file_type: int, *fields: str):
    """Return a format; a field is `name:dtype` or `name:dtype:length`."""
    layout: list[Any] = []
    for field in fields:
        key, kind, *length = field.split(":")
        layout.append((key, kind, int(length[0])) if length else (key, kind))
    return BlockFormat(number, name, values, np.dtype(layout), decode, file_type)


_ROWS = (
    _row(2, "q4_0", 32, _q4_0, 2, "d:<f2", "qs:u1:16"),
    _row(3, "q4_1", 32, _q4_1, 3, "d:<f2", "m:<f2", "qs:u1:16"),
    _row(6, "q5_0", 32, _q5_0, 8, "d:<f2", "qh:u1:4", "qs:u1:16"),
    _row(7, "q5_1", 32, _q5_1, 9, "d:<f2", "m:<f2", "qh:u1:4", "qs:u1:16"),
    _row(8, "q8_0", 32, _q8_0, 7, "d:<f2", "qs:i1:32"),
    _row(10, "q2_k", 256, _q2_k, 10, "scales:u1:16", "qs:u1:64", "d:<f2", "dmin:<f2"),
    _row(11, "q3_k", 256, _q3_k, 11, "hmask:u1:32", "qs:u1:64", "scales:u1:12", "d:<f2"),
    _row(12, "q4_k", 256, _q4_k, 14, "d:<f2", "dmin:<f2", "scales:u1:12", "qs:u1:128"),
    _row(13, "q5_k", 256, _q5_k, 16, "d:<f2", "dmin:<f2", "scales:u1:12", "qh:u1:32", "qs:u1:128"),
    _row(14, "q6_k", 256, _q6_k, 18, "ql:u1:128", "qh:u1:64", "scales:i1:16", "d:<f2"),
    _row(20, "iq4_nl", 32, _iq4_nl, 25, "d:<f2", "qs:u1:16"),
    _row(23, "iq4_xs", 256, _iq4_xs, 30, "d:<f2", "scales_h:<u2", "scales_l:u1:4", "qs:u1:128"),
    _row(34, "tq1_0", 256, _tq1_0, 36, "qs:u1:48", "qh:u1:4", "d:<f2"),
    _row(35, "tq2_0", 256, _tq2_0, 37, "qs:u1:64", "d:<f2"),
    _row(39, "mxfp4", 32, _mxfp4, 38, "e:u1", "qs:u1:16"),
    _row(40, "nvfp4_ggml", 64, _nvfp4, 39, "d:u1:4", "qs:u1:32"),
    _by_package(16, "iq2_xxs", 66, 19),
    _by_package(17, "iq2_xs", 74, 20),
    _by_package(18, "iq3_xxs", 98, 23),
    _by_package(19, "iq1_s", 50, 24),
    _by_package(21, "iq3_s", 110, 26),
    _by_package(22, "iq2_s", 82, 28),
    _by_package(29, "iq1_m", 56, 31),
)

BLOCK_FORMATS = {row.name: row for row in _ROWS}

BY_NUMBER = {row.number: row for row in _ROWS}
"""ggml's number → block format."""
