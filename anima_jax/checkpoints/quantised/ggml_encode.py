"""Encoding of float32 weights in GGML's block formats.

The formats with one scale per 32 values are encoded as `gguf.quants` does, bit for bit. Those with 256 values per block
(k-quants) have scales of scales: each group's scale and minimum are searched for the least squared error (several ways
of rounding, and for each the scale and minimum that fit its codes best), rounded to their few bits, and the codes
are then chosen anew. Axes: n blocks, g groups of a block, v values of a group.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from anima_jax.checkpoints.quantised.ggml import BLOCK_FORMATS, PLAIN, BlockFormat, dequantise, pack, pack_scales
from anima_jax.checkpoints.quantised.parts import Parts
from anima_jax.checkpoints.quantised.quantiser import Quantiser

CHUNK = 2**17
"""Values that are encoded at a time: the intermediate results then stay in the processor's cache."""

_LARGEST = 1e12  # beyond the range of every format; the search squares the values

Fields = Mapping[str, np.ndarray]
"""Field of the format's layout → its values, one row per block."""


def quantise(values: np.ndarray, form: BlockFormat) -> np.ndarray:
    """Encode values, any shape, whose last axis is a multiple of `form.values`, to uint8 (blocks, bytes of a block).

    Raises ValueError for NaN, infinity, or values beyond the format's range.
    """
    encode = ENCODERS[form.name]
    rows = values.reshape(-1, form.values)
    out = np.empty((len(rows), form.nbytes), np.uint8)
    step = max(1, CHUNK // form.values)
    for first in range(0, len(rows), step):
        part = rows[first : first + step].astype(np.float32)
        largest = float(np.abs(part).max(initial=0))
        if not np.isfinite(largest):
            raise ValueError(f"NaN or infinite values, which {form.name} does not have")
        blocks = np.zeros(len(part), form.layout)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            for name, field in encode(part).items():
                if largest > _LARGEST or not np.isfinite(field).all():
                    raise ValueError(f"values up to {largest:.6g}, beyond the range of {form.name}")
                blocks[name] = field
        out[first : first + step] = blocks.view(np.uint8).reshape(-1, form.nbytes)
    return out


def _inverse(scale: np.ndarray) -> np.ndarray:
    return np.where(scale == 0, np.float32(0), 1 / scale)


def _half(scale: np.ndarray) -> np.ndarray:
    return scale.astype(np.float16)


def _symmetric(bits: int) -> Callable[[np.ndarray], Fields]:
    """Return the encoder of q4_0 and q5_0: the value of largest magnitude has the lowest code."""
    half = 2 ** (bits - 1)

    def encode(x: np.ndarray) -> Fields:
        extreme = np.take_along_axis(x, np.abs(x).argmax(-1, keepdims=True), -1)
        scale = extreme / -half
        codes = np.clip((x * _inverse(scale) + np.float32(half + 0.5)).astype(np.uint8), 0, 2**bits - 1)
        return {"d": _half(scale)[:, 0], **_packed(codes, bits)}

    return encode


def _affine(bits: int) -> Callable[[np.ndarray], Fields]:
    """Return the encoder of q4_1 and q5_1: the lowest code is the minimum, the highest the maximum."""

    def encode(x: np.ndarray) -> Fields:
        low = x.min(-1, keepdims=True)
        scale = (x.max(-1, keepdims=True) - low) / (2**bits - 1)
        codes = np.clip(((x - low) * _inverse(scale) + np.float32(0.5)).astype(np.uint8), 0, 2**bits - 1)
        return {"d": _half(scale)[:, 0], "m": _half(low)[:, 0], **_packed(codes, bits)}

    return encode


def _packed(codes: np.ndarray, bits: int) -> Fields:
    fields = {"qs": pack(codes & np.uint8(15), 4, 16)}
    return fields | {"qh": np.packbits(codes >> np.uint8(4), axis=-1, bitorder="little")} if bits == 5 else fields


def _q8_0(x: np.ndarray) -> Fields:
    scale = np.abs(x).max(-1, keepdims=True) / 127
    scaled = x * _inverse(scale)
    magnitude = np.abs(scaled)
    whole = np.floor(magnitude)
    whole += magnitude - whole >= 0.5  # ties away from zero
    return {"d": _half(scale)[:, 0], "qs": np.copysign(whole, scaled).astype(np.int8)}


# ---- k-quants --------------------------------------------------------------------------------------------------------


def _sum(a_ngv: np.ndarray, b_ngv: np.ndarray) -> np.ndarray:
    return np.einsum("ngv,ngv->ng", a_ngv, b_ngv)


def _fit_affine(x_ngv: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the scale and minimum ≥ 0 of each group for which scale · code − minimum is nearest to its values.

    Codes are 0 … `most`; those of several numbers of steps between the extremes are tried.
    """
    low = np.minimum(x_ngv.min(-1), 0)
    width = x_ngv.max(-1) - low
    per_width = _inverse(width)
    above = x_ngv - low[..., None]
    size, sum_x = x_ngv.shape[-1], x_ngv.sum(-1)
    best = np.full(low.shape, -np.inf, np.float32)
    scale, offset = np.zeros_like(low), np.zeros_like(low)
    codes = np.empty_like(above)
    for steps in most + np.arange(-2, 2, 0.4, dtype=np.float32):
        np.multiply(above, (per_width * steps)[..., None], out=codes)
        np.rint(codes, out=codes)
        np.minimum(codes, most, out=codes)
        sum_q, sum_qq, sum_qx = codes.sum(-1), _sum(codes, codes), _sum(codes, x_ngv)
        slope = (size * sum_qx - sum_q * sum_x) * _inverse(size * sum_qq - sum_q * sum_q)
        base = (sum_x - slope * sum_q) / size
        no_minimum = base > 0
        slope = np.where(no_minimum, sum_qx * _inverse(sum_qq), slope)
        base = np.where(no_minimum, 0, base)
        # ‖x‖² less the squared error
        gain = slope * (2 * sum_qx - slope * sum_qq - 2 * base * sum_q) + base * (2 * sum_x - size * base)
        better = gain > best
        best, scale, offset = (
            np.where(better, gain, best),
            np.where(better, slope, scale),
            np.where(better, base, offset),
        )
    return np.maximum(scale, 0), -offset


def _rounded(scales_ng: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a block's float16 scale of scales, (n,), and its scales as multiples 0 … `most` of it.

    The largest scale is tried as several multiples, from `most` downwards: the others may then round better.
    """
    per_largest = _inverse(scales_ng.max(-1))
    best, unit = np.full(len(scales_ng), np.inf, np.float32), np.zeros(len(scales_ng), np.float32)
    multiples = np.zeros_like(scales_ng)
    for steps in most - np.arange(10, dtype=np.float32):
        found = np.clip(np.rint(scales_ng * (per_largest * steps)[:, None]), 0, most)
        fitted = (found * scales_ng).sum(-1) * _inverse((found * found).sum(-1))
        error = np.square(scales_ng - fitted[:, None] * found).sum(-1)
        better = error < best
        best, unit = np.where(better, error, best), np.where(better, fitted, unit)
        multiples = np.where(better[:, None], found, multiples)
    return _half(unit), multiples


def _affine_k(bits: int) -> Callable[[np.ndarray], Fields]:
    """Return the encoder of q4_k and q5_k: eight groups of 32 values with scales and minima of six bits."""
    most = 2**bits - 1

    def encode(x: np.ndarray) -> Fields:
        x_ngv = x.reshape(len(x), 8, 32)
        scale, minimum = _fit_affine(x_ngv, most)
        (unit, scales), (unit_of_minima, minima) = _rounded(scale, 63), _rounded(minimum, 63)
        codes = _codes(x_ngv, unit, scales, unit_of_minima, minima, most)
        unit, unit_of_minima = _refit(x_ngv, codes, scales, minima)
        codes = _codes(x_ngv, unit, scales, unit_of_minima, minima, most).astype(np.uint8).reshape(len(x), -1)
        fields = {"d": unit, "dmin": unit_of_minima, "qs": pack(codes & np.uint8(15), 4, 32)}
        fields["scales"] = pack_scales(scales.astype(np.uint8), minima.astype(np.uint8))
        return fields | {"qh": pack(codes >> np.uint8(4), 1, 32)} if bits == 5 else fields

    return encode


def _codes(
    x_ngv: np.ndarray, unit: np.ndarray, scales: np.ndarray, unit_of_minima: np.ndarray, minima: np.ndarray, most: int
) -> np.ndarray:
    """Return the codes 0 … `most` nearest to the values, for given scales and minima."""
    step, base = unit.astype(np.float32)[:, None] * scales, unit_of_minima.astype(np.float32)[:, None] * minima
    codes = x_ngv + base[..., None]
    codes *= _inverse(step)[..., None]
    return np.clip(np.rint(codes, out=codes), 0, most, out=codes)


def _refit(
    x_ngv: np.ndarray, codes: np.ndarray, scales: np.ndarray, minima: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scales of scales and of minima that fit a block's codes best, as float16."""
    size = x_ngv.shape[-1]
    aa = (scales * scales * _sum(codes, codes)).sum(-1)
    ab = (scales * minima * codes.sum(-1)).sum(-1)
    bb = size * (minima * minima).sum(-1)
    ax, bx = (scales * _sum(codes, x_ngv)).sum(-1), (minima * x_ngv.sum(-1)).sum(-1)
    per = _inverse(aa * bb - ab * ab)
    d = np.where(bb == 0, ax * _inverse(aa), (ax * bb - ab * bx) * per)
    m = np.where(bb == 0, 0, (ab * ax - aa * bx) * per)
    return _half(d), _half(m)


def _q6_k(x: np.ndarray) -> Fields:
    """Encode sixteen groups of 16 values with scales of eight bits, without minima."""
    x_ngv = x.reshape(len(x), 16, 16)
    extreme = np.take_along_axis(x_ngv, np.abs(x_ngv).argmax(-1, keepdims=True), -1)
    per_extreme = _inverse(extreme)
    best = np.full(x_ngv.shape[:2], -1, np.float32)
    scale = np.zeros_like(best)
    for steps in np.arange(31, 33.1, 0.2, dtype=np.float32):
        codes = np.clip(np.rint(x_ngv * (per_extreme * -steps)), -32, 31)
        sum_qx, sum_qq = _sum(codes, x_ngv), _sum(codes, codes)
        slope = sum_qx * _inverse(sum_qq)
        better = slope * sum_qx > best
        best, scale = np.where(better, slope * sum_qx, best), np.where(better, slope, scale)
    extreme_scale = np.take_along_axis(scale, np.abs(scale).argmax(-1, keepdims=True), -1)[:, 0]
    unit = _half(extreme_scale / -128)
    scales = np.clip(np.rint(scale * _inverse(unit.astype(np.float32))[:, None]), -128, 127)
    step = unit.astype(np.float32)[:, None] * scales
    codes = np.clip(np.rint(x_ngv * _inverse(step)[..., None]), -32, 31)
    codes = (codes + 32).astype(np.uint8).reshape(len(x), -1)
    low, high = pack(codes & np.uint8(15), 4, 64), pack(codes >> np.uint8(4), 2, 32)
    return {"ql": low, "qh": high, "scales": scales.astype(np.int8), "d": unit}


ENCODERS: dict[str, Callable[[np.ndarray], Fields]] = {
    "q8_0": _q8_0,
    "q6_k": _q6_k,
    "q5_k": _affine_k(5),
    "q4_k": _affine_k(4),
    "q4_0": _symmetric(4),
    "q4_1": _affine(4),
    "q5_0": _symmetric(5),
    "q5_1": _affine(5),
}
"""Block formats that can be written."""


def _quantiser(form: BlockFormat) -> Quantiser:
    def rows(values_oi: np.ndarray, largest: float) -> Parts:
        return {"blocks": quantise(values_oi, form).reshape(len(values_oi), -1)}

    return Quantiser(
        rows,
        lambda parts, shape: dequantise(parts["blocks"], form).reshape(shape),
        {"blocks": (np.dtype(np.uint8), lambda o, i: (o, i // form.values * form.nbytes))},
        (1, form.values),
        embeddings=True,
    )


def _plain(dtype: np.dtype[Any]) -> Quantiser:
    def rows(values_oi: np.ndarray, largest: float) -> Parts:
        with np.errstate(over="ignore"):
            values = values_oi.astype(dtype)
        if not np.isfinite(values).all():
            raise ValueError(f"values up to {largest:.6g}, beyond the range of {dtype}")
        return {"blocks": values}

    return Quantiser(
        rows,
        lambda parts, shape: parts["blocks"].astype(np.float32),
        {"blocks": (dtype, lambda o, i: (o, i))},
        embeddings=True,
    )


QUANTISERS = {
    "f16": _plain(PLAIN[1]),
    "bf16": _plain(PLAIN[30]),
    **{name: _quantiser(BLOCK_FORMATS[name]) for name in ENCODERS},
}
"""Type of a GGUF file's matrices → how to quantise to it."""
