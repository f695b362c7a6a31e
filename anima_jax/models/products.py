"""Products of activations with weights in 8 bits, both as they are stored (W8A8).

Each token's activations get one scale, each output channel of the weights has one: y = (q · codes) · s_token ·
s_channel, with sums of integers in int32, and of 8-bit floats in float32. Hardware without such products (platform.py)
multiplies the same codes in bfloat16 or float32, which hold them exactly, with sums in float32. The gradient of the
activations is that of the dequantised weights, in the activations' dtype (straight through); the weights have none.
Axes: … tokens, i features in, o features out.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

from anima_jax.models.quantised import Quantised, rotated
from anima_jax.platform import hardware, platform

_OPERANDS = {"int8": (jnp.int8, jnp.int32), "fp8": (jnp.float8_e4m3fn, jnp.float32)}
"""Product → dtype of the activations' codes and of the sums."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Array, kernel_io: Quantised, out_dtype: Any) -> Array:
    """Return `x` (…, i) times the kernel in `out_dtype`, as its `compute` says, without its `update`.

    The kernel's dtype is that of `x`.
    """
    out = _product(x, kernel_io, out_dtype)
    # XLA would have the tokens in the lanes of a TPU, as it likes them in attention, and take twice as long for the
    # product. In training the copies that this needs cost more than it saves.
    return with_layout_constraint(out, Layout(tuple(range(out.ndim)))) if platform() == "tpu" else out


def _product(x: Array, kernel_io: Quantised, out_dtype: Any) -> Array:
    codes, scales = quantised_rows(x, kernel_io.compute or "int8", kernel_io.rotation)
    sums = _sums(codes, kernel_io.codes, kernel_io.compute or "int8")
    return (sums.astype(jnp.float32) * (scales * kernel_io.scales)).astype(out_dtype)


def quantised_rows(x: Array, compute: str, rotation: int = 0) -> tuple[Array, Array]:
    """Return the codes of `x` (…, i), rotated if the weights are, and the scale of each row (…, 1), float32."""
    dtype = _OPERANDS[compute][0]
    values = rotated(x, rotation) if rotation else x.astype(jnp.float32)
    largest = 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    scales = jnp.maximum(jnp.max(jnp.abs(values), axis=-1, keepdims=True) / largest, 1e-30)
    values /= scales
    return (jnp.round(values) if dtype == jnp.int8 else values).astype(dtype), scales


def _sums(a: Array, b_io: Array, compute: str) -> Array:
    """Return the product of codes (…, i) and (i, o)."""
    here, sums = hardware(), _OPERANDS[compute][1]
    if compute not in here.narrow_products:
        dtype = sums = jnp.float32
        if here.platform != "cpu":
            dtype = jnp.bfloat16
        a, b_io = a.astype(dtype), b_io.astype(dtype)
    return jax.lax.dot_general(a, b_io, (((a.ndim - 1,), (0,)), ((), ())), preferred_element_type=sums)


def _backward(out_dtype: Any, kernel_io: Quantised, grad: Array) -> tuple[Array, None]:
    del out_dtype
    # The scales are multiplied with the gradient, not with every weight: the codes are exact in 16 bits.
    # They are relative to a power of two, so that small gradients do not vanish in float16.
    unit = jnp.ldexp(jnp.float32(1), jnp.frexp(jnp.max(kernel_io.scales))[1])
    scaled = (grad.astype(jnp.float32) * (kernel_io.scales / unit)).astype(kernel_io.dtype)
    sums = jax.lax.dot_general(
        scaled,
        kernel_io.codes.astype(kernel_io.dtype),
        (((grad.ndim - 1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    grad_x = (sums * unit).astype(kernel_io.dtype)
    return (rotated(grad_x, kernel_io.rotation).astype(grad_x.dtype) if kernel_io.rotation else grad_x), None


product.defvjp(lambda x, kernel_io, out_dtype: (_product(x, kernel_io, out_dtype), kernel_io), _backward)
