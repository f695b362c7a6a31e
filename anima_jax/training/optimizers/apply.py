"""An optimizer's step on parameters, moments and moving average in place, one layer of one parameter at a time.

Besides its state, a step then needs the gradients, in the dtype in which they were computed, and working memory for one
layer: gradients are widened and clipped, updates added and rounded inside the loop over the layers.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from anima_jax.models.parameters import Params
from anima_jax.platform import platform
from anima_jax.training.optimizers.layers import each_layer, on_device

Finish = Callable[[str, Array | None, Array, Array, Array | None], tuple[Array, Array | None]]
"""(path, layer or None, old value, change, old average) → new value and average; all but the new value in float32."""


class SeparateOptimizer(optax.GradientTransformation):
    """A transformation made of one per parameter, which `apply` uses in place.

    `transforms` map one tensor of the file each; parameters in `stacked` have a leading axis of layers. Gradients are
    clipped to a global norm of `clip_norm` (0: not at all); `layer_rates` are factors of the updates, one a layer.
    An `elementwise` update is the same by layer or all at once, which a CPU's compiler does in place.
    """

    transforms: Mapping[str, optax.GradientTransformation]
    stacked: Collection[str]
    clip_norm: float
    layer_rates: Mapping[str, Sequence[float]]
    elementwise: bool

    @classmethod
    def of(
        cls,
        whole: optax.GradientTransformation,
        transforms: Mapping[str, optax.GradientTransformation],
        stacked: Collection[str],
        clip_norm: float,
        layer_rates: Mapping[str, Sequence[float]],
        elementwise: bool,
    ) -> "SeparateOptimizer":
        """Return `whole`, which does the same to a tree of parameters, with its parts."""
        self = cls(*whole)
        self.transforms, self.stacked, self.clip_norm, self.layer_rates = transforms, stacked, clip_norm, layer_rates
        self.elementwise = elementwise
        return self

    def change(self, path: str, layer: Any, grad: Array, state: Any, value: Array, norm: Array) -> tuple[Array, Any]:
        """Return the change of a float32 value, or of one layer of it, and the new state; `norm` is the global one."""
        if self.clip_norm > 0:  # as optax.clip_by_global_norm
            grad = jax.lax.select(norm < self.clip_norm, grad, grad / norm * self.clip_norm)
        change: Any
        change, state = self.transforms[path].update(grad, state, value)
        if path in self.layer_rates:
            change = change * jnp.asarray(self.layer_rates[path])[0 if layer is None else layer]
        return change, state


class Applied(NamedTuple):
    """Parameters, optimizer state and moving average after a step, and the norm of each parameter's change if asked."""

    params: Params
    opt_state: Any
    ema: Params | None
    changes: Params | None


def norms_of(values: Params) -> Params:
    """Return the norm of each array, computed in float32."""
    return {path: _norm(value) for path, value in values.items()}


def _norm(value: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(value.astype(jnp.float32))))


def apply(
    optimizer: Any,
    grads: Params,
    norm: Array,
    old: tuple[Params, Any, Params | None],
    keep: Array,
    finish: Finish,
    *,
    measure: bool = False,
) -> Applied:
    """Return what the optimizer makes of `old`: parameters, state and average. `finish` adds the change to a value.

    `grads`, of any dtype, have the global norm `norm`. Where `keep` is true, everything stays as it is. With `measure`
    the changes are measured. Any `optax.GradientTransformation` is applied; only a `SeparateOptimizer` by layer.
    """
    if not isinstance(optimizer, SeparateOptimizer):
        return _together(optimizer, grads, old, keep, finish, measure)
    params, (first, states, *rest), ema = old
    new, in_turn = {}, math.inf if optimizer.elementwise and platform() == "cpu" else None
    for path, value in params.items():
        one = functools.partial(_one, optimizer, path, norm, keep, finish)
        stacked = path in optimizer.stacked
        change = jnp.zeros(len(value) if stacked else ()) if measure else None
        kept = (value, states[path], ema and ema[path], change)
        if stacked:
            new[path] = each_layer(one, kept, grads[path], in_turn)
        else:
            new[path] = on_device(functools.partial(one, None), kept, grads[path])
    values, own, averages, changes = ({path: found[index] for path, found in new.items()} for index in range(4))
    return Applied(values, (first, own, *rest), ema and averages, norms_of(changes) if measure else None)


def _one(
    optimizer: SeparateOptimizer,
    path: str,
    norm: Array,
    keep: Array,
    finish: Finish,
    layer: Array | None,
    kept: tuple[Array, Any, Array | None, Array | None],
    grad: Array,
) -> Any:
    """Return value, state, average and norm of the change after a step, of a parameter or of one layer of it."""
    value, state, average, change = kept
    wide = value.astype(jnp.float32)
    update, state = optimizer.change(path, layer, grad.astype(jnp.float32), state, wide, norm)
    value, average = finish(path, layer, wide, update, average)
    if change is not None:
        change = _norm(value.astype(jnp.float32) - wide)
    return _select(keep, kept, (value, state, average, change))


def _together(
    optimizer: Any,
    grads: Params,
    old: tuple[Params, Any, Any],
    keep: Array,
    finish: Finish,
    measure: bool,
) -> Applied:
    """Return the same for an optimizer that updates all parameters together."""
    params, state, ema = old
    grads, wide = ({path: leaf.astype(jnp.float32) for path, leaf in tree.items()} for tree in (grads, params))
    updates, state = optimizer.update(grads, state, wide)
    found = {path: finish(path, None, wide[path], update, ema and ema[path]) for path, update in updates.items()}
    values, averages = ({path: one[index] for path, one in found.items()} for index in (0, 1))
    values, state, averages = _select(keep, old, (values, state, ema and averages))
    changes = {path: value.astype(jnp.float32) - wide[path] for path, value in values.items()} if measure else {}
    return Applied(values, state, averages, norms_of(changes) if measure else None)


def _select(keep: Array, old: Any, new: Any) -> Any:
    """Return `old` or `new`. A select, not a branch: with a branch, the host would wait for the condition."""
    return jax.tree.map(lambda one, other: jnp.where(keep, one, other), old, new)
