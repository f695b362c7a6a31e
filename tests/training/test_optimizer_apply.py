"""The update in place equals the optimizer's own update."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from anima_jax.parallel.mesh import current_mesh
from anima_jax.platform import compiling_for
from anima_jax.training import optimizers
from anima_jax.training.optimizers import layers, table
from anima_jax.training.step import StepConfig, apply_gradients, init_state
from tests.training.test_optimizer_table import GRADIENTS, QUICK, SHAPES, START, build


def add(path, layer, old, change, average):
    return old + change, average


def state_after_two_steps(name, *, in_place):
    """Return parameters and state; `in_place` by `apply`, else by optax's interface."""
    rates = None if name.startswith("schedule_free") else {"blocks.mlp.layer1.kernel": (0.5, 2.0)}
    optimizer = build(name, clip_norm=0.05, layer_rates=rates)

    def step(params, state, grads):
        if in_place:
            norm = optax.global_norm(optimizers.norms_of(grads))
            found = optimizers.apply(optimizer, grads, norm, (params, state, None), jnp.array(False), add)
            return found.params, found.opt_state
        grads = {path: grad.astype(jnp.float32) for path, grad in grads.items()}
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params: Any = jax.tree.map(jnp.asarray, START)
    state, step = optimizer.init(params), jax.jit(step, compiler_options=QUICK)
    for grads in GRADIENTS[:2]:
        params, state = step(params, state, jax.tree.map(lambda grad: jnp.asarray(grad, jnp.bfloat16), grads))
    return params, state


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "muon", "schedule_free_adamw", "prodigy"])
def test_an_update_in_place_equals_the_optimizers_own(name, monkeypatch):
    """Gradients in bfloat16 are widened, which is exact, and clipped by their norm in float32."""
    monkeypatch.setattr(layers, "ONE_AT_A_TIME", 2000)  # the largest stack in turn, two together
    expected = state_after_two_steps(name, in_place=False)
    with compiling_for("gpu"):
        found = state_after_two_steps(name, in_place=True)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        # Sums of another order; a code of 8 bits may then be rounded to its neighbour.
        tolerance = {"rtol": 1e-3, "atol": 1e-3} if name == "adamw8bit" else {"rtol": 2e-5, "atol": 1e-7}
        if jnp.issubdtype(one.dtype, jnp.integer) and one.ndim:
            assert np.mean(one != other) < 0.01
        else:
            np.testing.assert_allclose(np.float32(one), np.float32(other), **tolerance)


@pytest.mark.parametrize("name", [row.name for row in table.ROWS])
def test_every_optimizer_is_applied_to_bfloat16_parameters_by_layer(name, monkeypatch):
    """Traced, not run: the loop over layers takes every state, and changes neither shapes nor dtypes."""
    monkeypatch.setattr(layers, "ONE_AT_A_TIME", 2000)
    optimizer, config = build(name, clip_norm=1.0), StepConfig(param_dtype=jnp.bfloat16, ema_decay=0.9)
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in SHAPES.items()}
    init = functools.partial(init_state, optimizer=optimizer, config=config, mesh=current_mesh())
    state = jax.eval_shape(init, params)
    grads = {path: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for path, shape in SHAPES.items()}
    groups = dict.fromkeys(SHAPES, "all")
    step = functools.partial(apply_gradients, optimizer=optimizer, config=config, groups=groups)
    with compiling_for("gpu"):
        new, metrics = jax.eval_shape(step, state, jnp.zeros(()), grads)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(new)] == [(a.shape, a.dtype) for a in jax.tree.leaves(state)]
    assert metrics.norms is not None
