"""Layers that the networks share: linear map, RMS norm, activations, rotary embedding and embedding table.

A layer computes in the dtype of its input activations; parameters are cast to it on use. Norms, activations, rotary
embedding and softmax are computed in float32 inside and round once.
Axes: b batch, l tokens, h heads, k head size; `i`, `o` features in and out.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from anima_jax.models.constraints import constrain, gathers_weights
from anima_jax.models.products import product
from anima_jax.models.quantised import Quantised
from anima_jax.platform import platform

products_saveable = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names("product")
)
"""Remat policy that keeps the products of `linear`."""


def linear(
    x: Array,
    kernel_io: Array | Quantised,
    bias_o: Array | None = None,
    *,
    out_dtype: DTypeLike | None = None,
    kernel_axes: str = "",
) -> Array:
    """Return x @ kernel + bias in the dtype of `x`, accumulated in float32. All products with weight matrices use it.

    `x` is (…, i) and the result (…, o). `out_dtype` overrides the result's dtype: float32 keeps values beyond the range
    of the dtype of `x`. `kernel_axes` are the kernel's axis letters (constraints.py), by which it is gathered from the
    devices that share it, in its storage dtype; without them XLA gathers it where a product needs it.
    """
    narrow = kernel_io.dtype.itemsize < x.dtype.itemsize  # after the cast XLA would gather it in the wider dtype
    kernel_io = gathered(kernel_io, kernel_axes or "io") if kernel_axes or narrow else kernel_io
    if isinstance(kernel_io, Quantised):
        return _linear_quantised(x, kernel_io.astype(x.dtype), bias_o, jnp.dtype(out_dtype or x.dtype))
    stored, kernel_io, out_dtype = kernel_io, kernel_io.astype(x.dtype), jnp.dtype(out_dtype or x.dtype)
    out: Array
    # Remat policies do not see the product inside of a custom gradient: they know it by this name.
    if narrow and stored.dtype == jnp.bfloat16:
        out = checkpoint_name(_matmul_wide(x, stored), "product")
    elif platform() != "cpu" and out_dtype == x.dtype:
        # GPUs and TPUs accumulate a plain 16-bit product in float32, and it is the fast path.
        out = x @ kernel_io
    else:
        out = checkpoint_name(_matmul(x, kernel_io, out_dtype), "product")  # pyright: ignore[reportArgumentType]
    return out if bias_o is None else out + bias_o.astype(out.dtype)


def _linear_quantised(x: Array, kernel_io: Quantised, bias_o: Array | None, out_dtype: Any) -> Array:
    update, kernel_io = kernel_io.update, dataclasses.replace(kernel_io, update=None)
    if kernel_io.compute:
        out = checkpoint_name(product(x, kernel_io, out_dtype), "product")
    else:
        # Without the checkpoint the backward pass would keep every layer's dequantised weights.
        run = jax.checkpoint(lambda x, kernel: linear(x, kernel.values(), out_dtype=out_dtype), prevent_cse=False)
        out = run(x, kernel_io)
    if update is not None:
        out += linear(linear(x, update[0]), update[1], out_dtype=out_dtype)
    return out if bias_o is None else out + bias_o.astype(out.dtype)


def gathered(kernel_io: Any, axes: str) -> Any:
    """Return a kernel, which may be quantised, gathered by its axis letters: once for all products of a pass."""
    if not gathers_weights():
        return kernel_io
    if isinstance(kernel_io, Quantised):
        return jax.tree.map(lambda leaf: constrain(leaf, axes), kernel_io)
    return _gathered(kernel_io, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(kernel_io: Array, axes: str) -> Array:
    """Constrain the kernel but not its gradient, which would be replicated too instead of summed into the shards."""
    return constrain(kernel_io, axes)


_gathered.defvjp(lambda kernel_io, axes: (_gathered(kernel_io, axes), None), lambda axes, _, grad_io: (grad_io,))


@jax.custom_vjp
def _matmul_wide(x: Array, kernel_io: Array) -> Array:
    """Return a product of float32 activations and a bfloat16 kernel, in float32.

    The kernel's gradient is made in bfloat16, its own dtype, so that the devices sum it in bfloat16 too.
    """
    return _matmul(x, kernel_io.astype(x.dtype), x.dtype)  # pyright: ignore[reportReturnType]


def _matmul_wide_backward(residuals: tuple[Array, Array], grad_out: Array) -> tuple[Array, Array]:
    x, kernel_io = residuals
    rows, dtype = tuple(range(x.ndim - 1)), kernel_io.dtype
    grad_x = _contract(grad_out, kernel_io.astype(x.dtype), ((x.ndim - 1,), (1,)), x.dtype)
    if platform() == "cpu":
        return grad_x, _contract(x, grad_out, (rows, rows), dtype)
    # GPUs and TPUs accumulate it in float32.
    return grad_x, jax.lax.dot_general(x.astype(dtype), grad_out.astype(dtype), ((rows, rows), ((), ())))


_matmul_wide.defvjp(lambda x, kernel_io: (_matmul_wide(x, kernel_io), (x, kernel_io)), _matmul_wide_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: Array, kernel_io: Array, out_dtype: Any) -> Array:
    """Return a product of operands of one dtype in `out_dtype`, float32 or their own.

    A CPU uses its fast matrix units only for a float32 result. The backward pass is hand-written because the cotangent
    of 16-bit operands would otherwise be float32, so that both of its products would take the slow path on all
    hardware, and because XLA's own gradient of the kernel is a product of two transposed operands, slow on CPUs.
    """
    return _contract(x, kernel_io, ((x.ndim - 1,), (0,)), out_dtype)


def _matmul_forward(x: Array, kernel_io: Array, out_dtype: Any) -> tuple[Array, tuple[Array, Array]]:
    return _matmul(x, kernel_io, out_dtype), (x, kernel_io)


def _matmul_backward(out_dtype: Any, residuals: tuple[Array, Array], grad_out: Array) -> tuple[Array, Array]:
    del out_dtype
    x, kernel_io = residuals
    grad_out, rows = grad_out.astype(x.dtype), tuple(range(x.ndim - 1))
    grad_x = _contract(grad_out, kernel_io, ((x.ndim - 1,), (1,)), x.dtype)
    if platform() == "cpu":
        # Without the barrier XLA would fuse the input's transpose with what computes it, and walk memory by columns.
        x = jax.lax.optimization_barrier(x)
    return grad_x, _contract(x, grad_out, (rows, rows), x.dtype)


def _contract(a: Array, b: Array, axes: tuple[tuple[int, ...], tuple[int, ...]], out_dtype: Any) -> Array:
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.float32).astype(out_dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(nnx.Module):
    """Linear map with a `kernel` (i, o) and an optional `bias` (o).

    The kernel is initialised with a truncated normal divided by sqrt(i), or with zeros; the bias with zeros.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        use_bias: bool = False,
        zero: bool = False,
        axes: str = "io",
        rngs: nnx.Rngs,
    ):
        self.kernel_axes = axes  # of `linear`
        shape = (features_in, features_out)
        normal = functools.partial(jax.random.truncated_normal, rngs.params(), -2.0, 2.0)
        self.kernel = nnx.Param(jnp.zeros(shape) if zero else normal(shape) / math.sqrt(features_in))
        self.bias = nnx.Param(jnp.zeros(features_out)) if use_bias else None

    def __call__(self, x: Array, *, out_dtype: DTypeLike | None = None) -> Array:
        bias_o = None if self.bias is None else self.bias[...]
        return linear(x, self.kernel[...], bias_o, out_dtype=out_dtype, kernel_axes=self.kernel_axes)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + eps) · scale over the last axis; statistics in float32, result in the dtype of `x`."""

    def __init__(self, features: int, *, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones(features))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        return _rms_normed(x, self.scale[...], self.eps)


@functools.partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def _rms_normed(x: Array, scale: Array, eps: float) -> Array:
    """Return the normed `x`. The backward pass keeps `x` in its own dtype instead of float32 values."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps) * scale).astype(x.dtype)


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """Return x · Φ(x) in the dtype of `x`, with the error function, as torch computes it: in float32, rounded once.

    The backward pass keeps only `x`. In bfloat16, `jax.nn.gelu` would round 2/√π, and its gradient would be biased.
    """
    x32 = x.astype(jnp.float32)
    return (x32 * _normal_cdf(x32)).astype(x.dtype)


def _normal_cdf(x32: Array) -> Array:
    return 0.5 + 0.5 * jax.lax.erf(x32 * math.sqrt(0.5))


def _gelu_backward(x: Array, grad: Array) -> tuple[Array]:
    x32 = x.astype(jnp.float32)
    slope = _normal_cdf(x32) + x32 * jnp.exp(-0.5 * x32 * x32) / math.sqrt(2.0 * math.pi)
    return ((grad.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def silu(x: Array) -> Array:
    """Return x · sigmoid(x), computed in float32, in the dtype of `x`."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


class Embedding(nnx.Module):
    """Table (vocabulary, features) whose rows are looked up by id."""

    def __init__(self, vocabulary: int, features: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (vocabulary, features)))

    def __call__(self, ids: Array) -> Array:
        table = self.embedding[...]
        if isinstance(table, Quantised):
            return table.take(ids)
        # The table is replicated: if it were sharded, XLA would look up the full batch on every device.
        return jnp.take(constrain(table, "vd"), ids, axis=0)


def rotary_angles(positions: Array, head_size: int, theta: float) -> Array:
    """Return the rotary angles position · theta^(−2i/k), (…, k/2), float32, of positions (…)."""
    exponents = jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size
    return positions[..., None].astype(jnp.float32) * theta**-exponents


@jax.custom_vjp
def apply_rotary(x_blhk: Array, angles_bli: Array) -> Array:
    """Rotate each pair (x[i], x[i + k/2]) by its angle ("rotate half"). `angles_bli` is (b or 1, l, k/2), a constant.

    It is computed in float32 and has the dtype of `x_blhk`.
    """
    angles_bl1k = jnp.concatenate([angles_bli, angles_bli], axis=-1)[:, :, None]
    cos, sin = jnp.cos(angles_bl1k), jnp.sin(angles_bl1k)
    return (x_blhk.astype(jnp.float32) * cos + _rotate_half(x_blhk).astype(jnp.float32) * sin).astype(x_blhk.dtype)


def _rotate_half(x_blhk: Array) -> Array:
    """Return (−second half, first half) of the last axis."""
    size = x_blhk.shape[-1]
    if platform() == "tpu":
        # Halves of 64 lanes would make copies in float32; a product with ±1 is exact, and XLA fuses it.
        signs_kk = np.roll(np.diag(np.repeat([1.0, -1.0], size // 2)), size // 2, axis=1)
        precision = None if x_blhk.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
        return jnp.matmul(x_blhk, signs_kk.astype(x_blhk.dtype), precision=precision)
    first, second = jnp.split(x_blhk, 2, axis=-1)
    return jnp.concatenate([-second, first], axis=-1)


def _apply_rotary_backward(angles_bli: Array, grad_blhk: Array) -> tuple[Array, Array]:
    return apply_rotary(grad_blhk, -angles_bli), jnp.zeros_like(angles_bli)


apply_rotary.defvjp(lambda x_blhk, angles_bli: (apply_rotary(x_blhk, angles_bli), angles_bli), _apply_rotary_backward)
