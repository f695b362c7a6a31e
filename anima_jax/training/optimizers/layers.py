"""Transformations that update each layer of stacked parameters as a separate tensor, as it is in the file.

Muon, Adafactor, LAMB and others depend on a tensor's shape or norm, so they are mapped over the layer axis of stacked
parameters. Matrices are transposed in the file, which makes no difference: norms, Newton-Schulz and factored moments
commute with the transpose.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from anima_jax.models.parameters import Params
from anima_jax.platform import platform

ONE_AT_A_TIME = 2**20
"""Layers of at least this many values are updated one at a time, so that only one needs working memory."""


def transformation(init: Callable[..., Any], update: Callable[..., Any]) -> optax.GradientTransformation:
    """Return a transformation with init(params) → state and update(gradients, state, params) → (updates, state)."""
    return optax.GradientTransformation(init, update)


def by_tensor(
    transforms: Mapping[str, optax.GradientTransformation], stacked: Collection[str]
) -> optax.GradientTransformation:
    """Return a transformation that updates each parameter with that of its path; its state is a dict of theirs.

    Parameters in `stacked` are mapped over their first axis, and so are their states, except for counters.
    """
    own = {path: over_layers(tx) if path in stacked else tx for path, tx in transforms.items()}

    def init(params: Params) -> Any:
        return {path: own[path].init(value) for path, value in params.items()}

    def update(grads: Params, state: Any, params: Params) -> tuple[Params, Any]:
        results = {path: own[path].update(grad, state[path], params[path]) for path, grad in grads.items()}
        return {path: result[0] for path, result in results.items()}, {
            path: result[1] for path, result in results.items()
        }

    return transformation(init, update)


def over_layers(transform: optax.GradientTransformation, in_turn: int | None = None) -> optax.GradientTransformation:
    """Map `transform` over an array's first axis, as `each_layer` does."""

    def init(value: Array) -> Any:
        layer = jax.ShapeDtypeStruct(value.shape[1:], value.dtype)
        leaves, treedef = jax.tree.flatten(jax.eval_shape(transform.init, layer))
        # A counter is the same in every layer. Unmapped, it keeps a `lax.cond` on it a branch, not a select.
        axes = [None if leaf.ndim == 0 and jnp.issubdtype(leaf.dtype, jnp.integer) else 0 for leaf in leaves]
        flat = jax.vmap(lambda one: jax.tree.leaves(transform.init(one)), out_axes=axes)(value)
        return jax.tree.unflatten(treedef, flat)

    def update(grad: Array, state: Any, value: Array) -> tuple[Any, Any]:
        def one_layer(layer: Array, kept: tuple[Any, Any], given: tuple[Array, Array]) -> tuple[Any, Any]:
            return transform.update(given[0], kept[1], given[1])

        return each_layer(one_layer, (jnp.zeros_like(value), state), (grad, value), in_turn)

    return transformation(init, update)


def each_layer(function: Callable[..., Any], kept: Any, given: Any, in_turn: float | None = None) -> Any:
    """Return `kept` after function(layer, kept of the layer, given of the layer) → kept, for each layer.

    `kept` and `given` are trees of arrays stacked over layers. Arrays without axes, counters, are the same for all
    layers. Layers of at least `in_turn` values (by default `ONE_AT_A_TIME`) are computed one at a time, and written
    over the old ones: no other stack is made. Arrays of `kept` in host memory come to the device with their layer.
    """
    leaves, treedef = jax.tree.flatten(kept)
    axes = [0 if leaf.ndim else None for leaf in leaves]
    layers, *shape = jax.tree.leaves(given)[0].shape

    def one_layer(layer: Array, own: Sequence[Any], given: Any) -> list[Any]:
        own = [leaf if axis is None else one for leaf, one, axis in zip(leaves, own, axes, strict=True)]
        return jax.tree.leaves(function(layer, jax.tree.unflatten(treedef, own), given))

    def next_layer(layer: Array, written: Sequence[Any]) -> list[Any]:
        def row(leaf: Array) -> Array:
            return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)

        own = [now if axis is None else row(now) for now, axis in zip(written, axes, strict=True)]
        computed = on_device(functools.partial(one_layer, layer), own, jax.tree.map(row, given))
        return [
            new if axis is None else jax.lax.dynamic_update_index_in_dim(now, new, layer, 0)
            for new, now, axis in zip(computed, written, axes, strict=True)
        ]

    def in_turns(leaves: Sequence[Any], given: Any) -> list[Any]:
        stacks = [leaf if axis == 0 else None for leaf, axis in zip(leaves, axes, strict=True)]
        new = jax.lax.map(lambda row: one_layer(*row), (jnp.arange(layers), stacks, given))
        return [leaf if axis == 0 else leaf[0] for leaf, axis in zip(new, axes, strict=True)]

    if math.prod(shape) < (ONE_AT_A_TIME if in_turn is None else in_turn):
        mapped = jax.vmap(one_layer, in_axes=(0, axes, 0), out_axes=axes)
        new = on_device(functools.partial(mapped, jnp.arange(layers)), leaves, given)
    elif platform() == "cpu":  # its compiler would copy the stacks in every turn of a loop that writes over them
        new = on_device(in_turns, leaves, given)
    else:
        new = jax.lax.fori_loop(0, layers, next_layer, leaves)
    return jax.tree.unflatten(treedef, new)


def on_device(function: Callable[[Any, Any], Any], kept: Any, given: Any) -> Any:
    """Return function(kept, given) → kept; arrays of `kept` in host memory are moved to the device and back."""
    spaces = jax.tree.map(lambda leaf: jax.typeof(leaf).memory_space, kept)

    def move(leaf: Array, old: Any, new: Any) -> Array:
        return jax.device_put(leaf, new) if old == jax.memory.Space.Host else leaf

    arrived = jax.tree.map(lambda leaf, space: move(leaf, space, jax.memory.Space.Device), kept, spaces)
    return jax.tree.map(lambda leaf, space: move(leaf, space, space), function(arrived, given), spaces)


def scale_layers(rates: Mapping[str, Sequence[float]]) -> optax.GradientTransformation:
    """Multiply the updates of the parameters in `rates` by a factor per layer."""

    def update(updates: Params, state: Any, params: Params) -> tuple[Params, Any]:
        del params
        own = {path: jnp.asarray(rate).reshape(-1, *[1] * (updates[path].ndim - 1)) for path, rate in rates.items()}
        return updates | {path: updates[path] * rate for path, rate in own.items()}, state

    return transformation(lambda params: optax.EmptyState(), update)


def together(
    transform: optax.GradientTransformation,
    relative: Mapping[str, float],
    decay: Mapping[str, float] | None = None,
    decay_factor: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    """Apply `transform` to all parameters together, for estimates that they share (the distances of Prodigy and DoG).

    The update of each path is multiplied by its `relative` rate. With `decay_factor`, the weights also decay, before
    that multiplication, by `decay` of their path times `decay_factor` of the state before the update.
    """

    def update(grads: Params, state: Any, params: Params) -> tuple[Params, Any]:
        updates: Any
        updates, new = transform.update(grads, state, params)
        if decay is not None and decay_factor is not None:
            factor = decay_factor(state)
            updates = {path: one - factor * decay[path] * params[path] for path, one in updates.items()}
        return {path: relative[path] * one for path, one in updates.items()}, new

    return transformation(transform.init, update)


def in_float32(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Run `transform` on float32 gradients and parameters, so that its moments are float32 for parameters of any dtype.

    No array of the state shares a buffer with another one or with a parameter, so that all can be donated.
    """

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def init(params: Params) -> Any:
        params = wide(params)
        seen = {id(leaf) for leaf in jax.tree.leaves(params)}

        def own(leaf: Any) -> Any:
            shared = id(leaf) in seen
            seen.add(id(leaf))
            return jnp.copy(leaf) if shared else leaf

        state = transform.init(params)  # kept alive, so that no id is reused
        return jax.tree.map(own, state)

    def update(grads: Params, state: Any, params: Params) -> tuple[Any, Any]:
        return transform.update(wide(grads), state, wide(params))

    return transformation(init, update)


def in_host_memory(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keep the state of `transform` in pinned host memory between steps; the update moves it to the device and back."""

    def moved(state: Any, space: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.device_put(leaf, space) if leaf.ndim else leaf, state)

    def init(params: Params) -> Any:
        return moved(transform.init(params), jax.memory.Space.Host)

    def update(grads: Params, state: Any, params: Params) -> tuple[Any, Any]:
        updates, new = transform.update(grads, moved(state, jax.memory.Space.Device), params)
        return updates, moved(new, jax.memory.Space.Host)

    return transformation(init, update)
