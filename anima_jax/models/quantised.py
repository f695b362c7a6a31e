"""Frozen weights in 8 or 4 bits, dequantised or multiplied one layer at a time in the scan over a network's blocks.

`Quantised` takes the place of an array in a `Params` dictionary and in an `nnx.Param`: the scan slices it per layer,
and `linear` and the embedding table (layers.py) dequantise it, or multiply its codes as they are (products.py). There
are three kinds of storage:

float8   8-bit floats times a power of two per output channel, which scales the channel into the range where float8 has
         its full precision. Values that were already float8 are stored exactly.
int8     integers in ±127 times the channel's peak / 127.
nf4      4-bit NormalFloat (arXiv 2305.14314): a float32 peak per 64 consecutive inputs, whose first 32 codes are in the
         lower halves of 32 bytes and the others in the upper ones: to unpack them moves no rows within a TPU's tiles.

Weights of files (checkpoints/) may have scales for blocks of inputs in the first two, too, and kernels of rotated
inputs (`rotation`).
Axes: n layers, i features in, o features out, r rank.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from anima_jax.errors import UserError
from anima_jax.models.parameters import Params, merge, split

STORED = {
    "float8": jnp.float8_e4m3fn,
    "float8_e4m3fn": jnp.float8_e4m3fn,
    "float8_e5m2": jnp.float8_e5m2,
    "int8": jnp.int8,
    "nf4": jnp.uint8,
}
"""Storage name in the configuration → dtype of the codes."""

COMPUTED = {"int8": ("int8",), "fp8": ("float8", "float8_e4m3fn", "float8_e5m2")}
"""Product with 8-bit operands → storages whose codes it multiplies, the default one first."""

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

    Kernels (…, i, o) have scales (…, 1, o), or (…, i / n, o) for blocks of n inputs; in nf4 they have codes
    (…, i / 2, o) and scales (…, i / 64, o). `rows` is i; nf4 pads it to a multiple of 64. Embedding tables (v, o) have
    one scale per row, (v, 1). With a `rotation` the codes are those of the kernel whose inputs `rotated` has rotated.
    `compute` is a key of `COMPUTED` if `linear` multiplies the codes as they are. `update` are factors (…, i, r) and
    (…, r, o) whose product is added to the kernel.
    """

    codes: Array
    scales: Array
    rows: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    rotation: int = dataclasses.field(default=0, metadata={"static": True})
    compute: str | None = dataclasses.field(default=None, metadata={"static": True})
    update: tuple[Array, Array] | None = None

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
        """Bytes of codes, scales and update."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def astype(self, dtype: Any) -> "Quantised":
        """Return the same codes with another dtype for the values."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def __getitem__(self, layer: Any) -> "Quantised":
        """Return one layer of stacked kernels, still quantised; `[...]` returns all layers."""
        if layer is Ellipsis:
            return self
        return jax.tree.map(lambda leaf: leaf[layer], self)

    def take(self, ids: Array) -> Array:
        """Return the dequantised rows (…, o) of an embedding table for `ids`."""
        scales = jnp.take(self.scales, ids, axis=0)
        return (jnp.take(self.codes, ids, axis=0).astype(jnp.float32) * scales).astype(self.dtype)

    def values(self) -> Array:
        """Return the dequantised array."""
        values = self._stored_values()
        if self.rotation:
            values = rotated(values.swapaxes(-1, -2), self.rotation).swapaxes(-1, -2)
        if self.update is not None:
            a, b = (factor.astype(jnp.float32) for factor in self.update)
            values += jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return values.astype(self.dtype)

    def _stored_values(self) -> Array:
        """Return codes times scales, float32."""
        if self.codes.dtype != STORED["nf4"]:
            if self.scales.shape[-2] in (1, self.rows):
                return self.codes.astype(jnp.float32) * self.scales
            blocks = self.codes.reshape(*self.scales.shape[:-1], -1, self.codes.shape[-1])
            return (blocks.astype(jnp.float32) * self.scales[..., None, :]).reshape(self.codes.shape)
        *stack, packed, features_out = self.codes.shape
        blocks = self.codes.reshape(*stack, -1, NF4_BLOCK // 2, features_out)
        levels = _nf4_levels(jnp.concatenate([blocks & 15, blocks >> 4], axis=-2))
        values = (levels * self.scales[..., None, :]).reshape(*stack, 2 * packed, features_out)
        return values[..., : self.rows, :]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        return np.asarray(self.values(), dtype)


@functools.lru_cache(maxsize=4)
def hadamard(size: int) -> np.ndarray:
    """Return the regular Hadamard matrix of a power of 4, float32, divided by √size: symmetric, its own inverse.

    It is a Kronecker power of that of 4 with −1 on the other diagonal: `_build_hadamard` in comfy-kitchen's
    backends/eager/convrot_w4a4.py.
    """
    four = np.ones((4, 4), np.float32) - 2 * np.eye(4, dtype=np.float32)[::-1]
    found = np.ones((1, 1), np.float32)
    while len(found) < size:
        found = np.kron(found, four)
    if len(found) != size:
        raise ValueError(f"a rotation of {size}, expected a power of 4")
    return found / np.float32(np.sqrt(size))


def rotated(x: Array, size: int) -> Array:
    """Return `x` (…, i) with each `size` consecutive features multiplied by `hadamard(size)`, float32."""
    groups = x.reshape(*x.shape[:-1], -1, size)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    matrix = jnp.asarray(hadamard(size), x.dtype)
    found = jnp.matmul(groups, matrix, precision=precision, preferred_element_type=jnp.float32)
    return found.reshape(x.shape)


def quantise(values: Array, storage: str, *, table: bool = False) -> Quantised:
    """Quantise kernels (…, i, o), or an embedding `table` (v, o), to `storage`, a key of `STORED`.

    The result keeps the dtype of `values`. Raises ValueError for a table in nf4.
    """
    if table and storage == "nf4":
        raise ValueError("nf4 stores kernels, not tables of rows")
    return _quantise(values, storage, -1 if table else -2)


def quantise_transformer(path: str, values: Array, storage: str, compute: str | None = None) -> Array | Quantised:
    """Quantise a frozen parameter of the transformer if diffusion-pipe's `transformer_dtype` applies to it.

    It applies to tensors that are not 1-D in the file and not in `KEPT_IN_TRANSFORMER`. Other parameters are returned
    unchanged, as is an embedding table with nf4. `compute` is that of `with_compute`.
    """
    table = path.endswith(".embedding")
    if not in_transformer_dtype(path) or (table and storage == "nf4"):
        return values
    return with_compute(path, quantise(values, storage, table=table), compute)


def with_compute(path: str, stored: Quantised, compute: str | None) -> Quantised:
    """Return a parameter of the transformer whose codes `linear` multiplies as `compute` says, if they are in a block.

    Only the MLPs of the blocks are multiplied so. In attention, rounding the activations costs a TPU more than the
    products save: XLA fuses the norms of queries and keys into a product in bfloat16, and heads are hard to round.
    """
    if compute is None or not _MULTIPLIED.fullmatch(path):
        return stored
    return dataclasses.replace(stored, compute=compute)


_MULTIPLIED = re.compile(r"blocks\.mlp\.\w+\.kernel")


def storage_for(storage: str | None, compute: str | None) -> str | None:
    """Return the storage of weights that are multiplied as `compute` says: `storage`, or the default if it is None.

    Raises UserError if the codes of `storage` cannot be multiplied so.
    """
    if compute is None:
        return storage
    if storage is not None and storage not in COMPUTED[compute]:
        raise UserError(
            f"compute = '{compute}' multiplies weights stored as {' or '.join(COMPUTED[compute])}, "
            f"found transformer_dtype = '{storage}'"
        )
    return storage or COMPUTED[compute][0]


def storage_of(dtype: Any) -> str:
    """Return the storage whose codes have this dtype."""
    return next(name for name, own in STORED.items() if np.dtype(own) == dtype)


def in_transformer_dtype(path: str) -> bool:
    """Return whether `transformer_dtype` applies to this parameter of the transformer."""
    return path.endswith((".kernel", ".embedding")) and not any(part in path for part in KEPT_IN_TRANSFORMER)


def quantise_text_encoder(model: nnx.Module, storage: str) -> Any:
    """Return the text encoder with its linear layers quantised to `storage`; token table and norms are unchanged."""
    graphdef, params = split(model)
    kernels: Params = {
        path: quantise(v.values() if isinstance(v, Quantised) else v, storage)
        for path, v in params.items()
        if path.endswith(".kernel")
    }
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
