"""The scan over stacked blocks whose backward pass writes a block's gradients over its weights.

`jax.lax.scan` would have the stack of weights and the stack of their gradients in memory at once. Here the backward
pass replaces the weights of a block by their gradients as soon as it has used them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero


def scan_in_place(run: Callable[[Array, Any], Array], x: Array, stack: Any, *, unroll: int = 1) -> Array:
    """Return x after `run(x, layer)` for each layer of `stack`, a pytree of arrays with a leading axis of layers.

    The backward pass keeps what that of `run` keeps, which is for a `jax.checkpoint` the input and what its policy
    saves. `run` may close over arrays.
    """
    leaves, treedef = jax.tree.flatten(stack)

    def flat(x: Array, leaves: Sequence[Array]) -> Array:
        return run(x, jax.tree.unflatten(treedef, leaves))

    layer = [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in leaves]
    converted, closed_over = jax.closure_convert(flat, x, layer)
    return _scan(converted, unroll, x, leaves, closed_over)


def first_and_rest(run: Callable[[Array, Any], Array], x: Array, stack: Any) -> tuple[Array, Callable[[Array], Array]]:
    """Return x after `run` of the first layer of `stack`, and the function that runs the other layers on its result.

    No part of the stack is copied: each layer is read where it is.
    """

    def layer(number: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), stack)

    layers = len(jax.tree.leaves(stack)[0])
    return run(x, layer(0)), lambda x: jax.lax.fori_loop(1, layers, lambda number, x: run(x, layer(number)), x)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Given:
    """Stands for an array that the backward pass of a layer needs and is given: the one of this name."""

    name: str


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(run: Callable[..., Array], unroll: int, x: Array, leaves: list[Array], closed_over: list[Array]) -> Array:
    return jax.lax.scan(lambda x, own: (run(x, own, *closed_over), None), x, leaves, unroll=unroll)[0]


def _forward(run: Callable[..., Array], unroll: int, x: Any, leaves: list[Any], closed_over: list[Any]) -> Any:
    wanted, fixed = _parted(leaves)
    shared, known = _parted(closed_over)

    def body(x: Array, layer: list[Any]) -> tuple[Array, Any]:
        own, fixed = layer

        def one_layer(x: Array, own: list[Any], shared: list[Any]) -> Array:
            return run(x, _either(own, fixed), *_either(shared, known))

        out, pull_back = jax.vjp(one_layer, x, own, shared)
        names = {id(array): name for name, array in _named(own, fixed, shared, known).items()}
        return out, jax.tree.map(lambda leaf: _Given(names[id(leaf)]) if id(leaf) in names else leaf, pull_back)

    out, kept = jax.lax.scan(body, x.value, [wanted, fixed], unroll=unroll)
    return out, (kept, wanted, fixed, shared, known)


def _backward(run: Callable[..., Array], unroll: int, kept: tuple[Any, ...], grad: Any) -> tuple[Any, ...]:
    del run
    pull_backs, wanted, fixed, shared, known = kept
    if isinstance(grad, SymbolicZero):
        zero: Any = grad
        grad = jnp.zeros(zero.shape, zero.dtype)

    def body(carry: tuple[Any, ...], layer: tuple[Any, ...]) -> tuple[tuple[Any, ...], None]:
        (grad, stacks, sums), (number, pull_back, fixed) = carry, layer
        own = jax.tree.map(lambda stack: jax.lax.dynamic_index_in_dim(stack, number, keepdims=False), stacks)
        arrays = _named(own, fixed, shared, known)
        pull_back = jax.tree.map(
            lambda leaf: arrays[leaf.name] if isinstance(leaf, _Given) else leaf,
            pull_back,
            is_leaf=lambda leaf: isinstance(leaf, _Given),
        )
        grad, gradients, more = pull_back(grad)
        stacks = jax.tree.map(
            lambda stack, one: jax.lax.dynamic_update_index_in_dim(stack, one, number, 0), stacks, gradients
        )
        return (grad, stacks, jax.tree.map(jnp.add, sums, more)), None

    layers = next(len(leaf) for leaf in jax.tree.leaves((wanted, fixed)))
    start = (grad, wanted, jax.tree.map(jnp.zeros_like, shared))
    (grad, stacks, sums), _ = jax.lax.scan(
        body, start, (jnp.arange(layers), pull_backs, fixed), reverse=True, unroll=unroll
    )
    return grad, stacks, sums


def _parted(arrays: list[Any]) -> list[list[Any]]:
    """Return the arrays of which a gradient is wanted, and the others, each with None in the others' places."""
    return [[array.value if array.perturbed == wanted else None for array in arrays] for wanted in (True, False)]


def _either(some: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    return [other if one is None else one for one, other in zip(some, others, strict=True)]


def _named(*groups: Sequence[Any]) -> Mapping[str, Any]:
    return {
        f"{group} {place}": array
        for group, arrays in enumerate(groups)
        for place, array in enumerate(arrays)
        if array is not None
    }


_scan.defvjp(_forward, _backward, symbolic_zeros=True)
