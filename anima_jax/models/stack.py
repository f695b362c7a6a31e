"""The scan over stacked blocks that recomputes each block in the backward pass and writes gradients over weights.

`jax.lax.scan` with `jax.checkpoint` would have the stack of weights and the stack of their gradients in memory at once.
Here the backward pass replaces the weights of a block by their gradients as soon as it has used them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero


def scan_recomputing(run: Callable[[Array, Any], Array], x: Array, stack: Any, *, unroll: int = 1) -> Array:
    """Return x after `run(x, layer)` for each layer of `stack`, a pytree of arrays with a leading axis of layers.

    The backward pass keeps the inputs of the layers and recomputes everything else. `run` may close over arrays.
    """
    leaves, treedef = jax.tree.flatten(stack)

    def flat(x: Array, leaves: Sequence[Array]) -> Array:
        return run(x, jax.tree.unflatten(treedef, leaves))

    layer = [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in leaves]
    converted, closed_over = jax.closure_convert(flat, x, layer)
    return _scan(converted, unroll, x, leaves, closed_over)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(run: Callable[..., Array], unroll: int, x: Array, leaves: list[Array], closed_over: list[Array]) -> Array:
    return jax.lax.scan(lambda x, own: (run(x, own, *closed_over), None), x, leaves, unroll=unroll)[0]


def _forward(run: Callable[..., Array], unroll: int, x: Any, leaves: list[Any], closed_over: list[Any]) -> Any:
    wanted, fixed = _parted(leaves)
    shared, known = _parted(closed_over)
    values = [leaf.value for leaf in closed_over]

    def body(x: Array, own: list[Array]) -> tuple[Array, Array]:
        return run(x, own, *values), x

    out, inputs = jax.lax.scan(body, x.value, [leaf.value for leaf in leaves], unroll=unroll)
    return out, (inputs, wanted, fixed, shared, known)


def _backward(run: Callable[..., Array], unroll: int, kept: tuple[Any, ...], grad: Any) -> tuple[Any, ...]:
    inputs, wanted, fixed, shared, known = kept
    grad = jnp.zeros(inputs.shape[1:], inputs.dtype) if isinstance(grad, SymbolicZero) else grad

    def body(carry: tuple[Any, ...], layer: tuple[Any, ...]) -> tuple[tuple[Any, ...], None]:
        (grad, stacks, sums), (number, x, fixed) = carry, layer

        def again(x: Array, own: list[Any], shared: list[Any]) -> Array:
            return run(x, _either(own, fixed), *_either(shared, known))

        own = jax.tree.map(lambda stack: jax.lax.dynamic_index_in_dim(stack, number, keepdims=False), stacks)
        grad, gradients, more = jax.vjp(again, x, own, shared)[1](grad)
        stacks = jax.tree.map(
            lambda stack, one: jax.lax.dynamic_update_index_in_dim(stack, one, number, 0), stacks, gradients
        )
        return (grad, stacks, jax.tree.map(jnp.add, sums, more)), None

    start = (grad, wanted, jax.tree.map(jnp.zeros_like, shared))
    layers = (jnp.arange(len(inputs)), inputs, fixed)
    (grad, stacks, sums), _ = jax.lax.scan(body, start, layers, reverse=True, unroll=unroll)
    return grad, stacks, sums


def _parted(arrays: list[Any]) -> list[list[Any]]:
    """Return the arrays of which a gradient is wanted, and the others, each with None in the others' places."""
    return [[array.value if array.perturbed == wanted else None for array in arrays] for wanted in (True, False)]


def _either(some: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    return [other if one is None else one for one, other in zip(some, others, strict=True)]


_scan.defvjp(_forward, _backward, symbolic_zeros=True)
