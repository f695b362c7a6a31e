"""Frozen weights in 8 or 4 bits, dequantised one layer at a time inside the scan over a network's blocks.

`Quantised` takes the place of an array in a `Params` dictionary and in an `nnx.Param`: the scan slices it per layer,
and `linear` and the embedding table (layers.py) dequantise it. There are three kinds of storage:

float8   8-bit floats times a power of two per output channel, which scales the channel into the range where float8 has
         its full precision. Values that were already float8 are stored exactly.
int8     integers in ±127 times the channel's peak / 127.
nf4      4-bit NormalFloat (arXiv 2305.14314): a float32 peak per 64 consecutive inputs, whose first 32 codes are in the
         lower halves of 32 bytes and the others in the upper ones: to unpack them moves no rows within a TPU's tiles.

Axes: n layers, i features in, o features out.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from anima_jax.models.parameters import Params, merge, split

STORED = {
    "float8": jnp.float8_e4m3fn,
    "float8_e4m3fn": jnp.float8_e4m3fn,
    "float8_e5m2": jnp.float8_e5m2,
    "int8": jnp.int8,
    "nf4": jnp.uint8,
}
"""Storage name in the configuration → dtype of the codes."""

KEPT_IN_TRANSFORMER = ("x_embedder", "t_embedder", "t_embedding_norm", "final_layer")
"""Parts that keep their dtype: `KEEP_IN_HIGH_PRECISION` in diffusion-pipe's models/cosmos_predict2.py."""

NF4_BLOCK = 64
NF4_LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
"""The 16 values of NormalFloat4 (arXiv 2305.14314, appendix E): quantiles of a normal distribution, including 0."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """Weights stored as `codes` and `scales`, which other code uses like an array of `dtype`.

    Kernels (…, i, o) have scales (…, 1, o); in nf4 they have codes (…, i / 2, o) and scales (…, i / 64, o). `rows` is
    i; nf4 pads it to a multiple of 64. Embedding tables (v, o) have one scale per row, (v, 1).
    """

    codes: Array
    scales: Array
    rows: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantised array."""
        return (*self.codes.shape[:-2], self.rows, self.codes.shape[-1])

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def size(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.size * self.codes.dtype.itemsize + self.scales.size * self.scales.dtype.itemsize

    def astype(self, dtype: Any) -> "Quantised":
        """Return the same codes with another dtype for the values."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def __getitem__(self, layer: Any) -> "Quantised":
        """Return one layer of stacked kernels, still quantised; `[...]` returns all layers."""
        if layer is Ellipsis:
            return self
        return dataclasses.replace(self, codes=self.codes[layer], scales=self.scales[layer])

    def take(self, ids: Array) -> Array:
        """Return the dequantised rows (…, o) of an embedding table for `ids`."""
        scales = jnp.take(self.scales, ids, axis=0)
        return (jnp.take(self.codes, ids, axis=0).astype(jnp.float32) * scales).astype(self.dtype)

    def values(self) -> Array:
        """Return the dequantised array."""
        if self.codes.dtype != STORED["nf4"]:
            return (self.codes.astype(jnp.float32) * self.scales).astype(self.dtype)
        *stack, packed, features_out = self.codes.shape
        blocks = self.codes.reshape(*stack, -1, NF4_BLOCK // 2, features_out)
        levels = _nf4_levels(jnp.concatenate([blocks & 15, blocks >> 4], axis=-2))
        values = (levels * self.scales[..., None, :]).reshape(*stack, 2 * packed, features_out)
        return values[..., : self.rows, :].astype(self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        return np.asarray(self.values(), dtype)


def quantise(values: Array, storage: str, *, table: bool = False) -> Quantised:
    """Quantise kernels (…, i, o), or an embedding `table` (v, o), to `storage`, a key of `STORED`.

    The result keeps the dtype of `values`. Raises ValueError for a table in nf4.
    """
    if table and storage == "nf4":
        raise ValueError("nf4 stores kernels, not tables of rows")
    return _quantise(values, storage, -1 if table else -2)


def quantise_transformer(path: str, values: Array, storage: str) -> Array | Quantised:
    """Quantise a frozen parameter of the transformer if diffusion-pipe's `transformer_dtype` applies to it.

    It applies to tensors that are not 1-D in the file and not in `KEPT_IN_TRANSFORMER`. Other parameters are returned
    unchanged.
    """
    if not in_transformer_dtype(path):
        return values
    return quantise(values, storage, table=path.endswith(".embedding"))


def in_transformer_dtype(path: str) -> bool:
    """Return whether `transformer_dtype` applies to this parameter of the transformer."""
    return path.endswith((".kernel", ".embedding")) and not any(part in path for part in KEPT_IN_TRANSFORMER)


def quantise_text_encoder(model: nnx.Module, storage: str) -> Any:
    """Return the text encoder with its linear layers quantised to `storage`; token table and norms are unchanged."""
    graphdef, params = split(model)
    kernels: Params = {path: quantise(v, storage) for path, v in params.items() if path.endswith(".kernel")}
    return merge(graphdef, params | kernels)


@jax.jit(static_argnums=(1, 2))
def _quantise(values: Array, storage: str, axis: int) -> Quantised:
    encode: Callable[..., tuple[Array, Array]] = {"int8": _int8, "nf4": _nf4}.get(storage, _float8)
    codes, scales = encode(values.astype(jnp.float32), STORED[storage], axis)
    return Quantised(codes, scales, values.shape[-2], values.dtype)


def _peak(values: Array, axis: int) -> Array:
    """Return the largest magnitude along `axis`, or 1 where all values are zero."""
    peak = jnp.max(jnp.abs(values), axis=axis, keepdims=True)
    return jnp.where(peak > 0, peak, 1.0)


def _int8(values: Array, dtype: Any, axis: int) -> tuple[Array, Array]:
    scales = jnp.maximum(_peak(values, axis) / 127.0, jnp.finfo(jnp.float32).tiny)  # less would be rounded to 0
    return jnp.round(values / scales).astype(dtype), scales


def _float8(values: Array, dtype: Any, axis: int) -> tuple[Array, Array]:
    """Return codes and scales; a scale is the smallest power of two, of those in float32, ≥ peak / largest float8."""
    largest, exponent_of_largest = np.frexp(np.float32(jnp.finfo(dtype).max))
    mantissa, exponent = jnp.frexp(_peak(values, axis))
    exponent = exponent - exponent_of_largest + (mantissa > largest)
    scales = jnp.ldexp(jnp.ones_like(mantissa), jnp.maximum(exponent, jnp.finfo(jnp.float32).minexp))
    return (values / scales).astype(dtype), scales


def _nf4(values: Array, dtype: Any, axis: int) -> tuple[Array, Array]:
    *stack, rows, features_out = values.shape
    padding = [(0, 0)] * len(stack) + [(0, -rows % NF4_BLOCK), (0, 0)]
    blocks = jnp.pad(values, padding).reshape(*stack, -1, NF4_BLOCK, features_out)
    peaks = _peak(blocks, axis)
    midpoints = jnp.asarray((NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2.0)
    low, high = jnp.split(jnp.searchsorted(midpoints, blocks / peaks).astype(dtype), 2, axis=-2)
    return (low | high << 4).reshape(*stack, -1, features_out), peaks[..., 0, :]


def _nf4_levels(codes: Array) -> Array:
    """Return the level of each code. Four selections by the code's bits cost a TPU less than a look-up."""
    levels: list[Any] = list(NF4_LEVELS)
    for bit in (1, 2, 4, 8):
        levels = [jnp.where(codes & bit, odd, even) for even, odd in zip(levels[::2], levels[1::2], strict=True)]
    return levels[0]
