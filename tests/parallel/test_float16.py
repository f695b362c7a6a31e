"""float16 on a mesh: loss scale, skipped steps and state as on one device, with 8-bit moments and rounded weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anima_jax.checkpoints.names import dit, file_tensors
from anima_jax.config.optimizer import OptimizerConfig
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT
from anima_jax.parallel import rules
from anima_jax.parallel.mesh import make_mesh, rows_of_process, shard_local_rows
from anima_jax.training import optimizers
from anima_jax.training.loss_scale import LossScale
from anima_jax.training.step import StepConfig, apply_gradients, init_state, train_step
from tests.models.networks import quick_jit, random_params
from tests.parallel.meshes import CONFIG, MESHES
from tests.parallel.test_sharded import BATCH, ONE, SIZES, examples

STEPS, LR = 5, 1e-3

# Little to compile.
SMALL = dataclasses.replace(CONFIG, blocks=2, adapter=dataclasses.replace(CONFIG.adapter, blocks=1))


def trained(sizes, name):
    """Return scale, skipped steps and loss of each step, and the movement of weights and of their average."""
    mesh = make_mesh(sizes, jax.devices()[: 1 if sizes == ONE else 8])
    graphdef, abstract = parameters.abstract(lambda rngs: AnimaDiT(SMALL, rngs=rngs))
    params = random_params(abstract)
    tensors = file_tensors(dit.RULES, {path: np.broadcast_to(np.float32(0), x.shape) for path, x in params.items()})
    rates = optimizers.LearningRates(dict.fromkeys([group for group, _ in optimizers.GROUPS], LR))
    optimizer = optimizers.build(OptimizerConfig(type=name, lr=LR), rates, tensors, clip_norm=1.0)
    config = StepConfig(compute_dtype=jnp.float16, param_dtype=jnp.bfloat16, ema_decay=0.9)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, rules.shardings(params, params, mesh))
        state = init_state(placed, optimizer, config)
        scale = jax.device_put(LossScale(np.float32(2**18), np.int32(0)), state.step.sharding)
        state = state._replace(loss_scale=scale)
        start = {path: np.asarray(value, np.float32) for path, value in state.params.items()}
        step = functools.partial(train_step, graphdef=graphdef, optimizer=optimizer, config=config)
        step = quick_jit(step, static_argnums=4, out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None))
        batch, figures = shard_local_rows(examples(SIZES), mesh, rows_of_process(mesh, BATCH), BATCH), []
        for _ in range(STEPS):
            state, metrics = step(state, {}, batch, None, 2)
            figures.append((float(metrics.loss_scale), int(metrics.skipped), int(metrics.total_skipped)))
        moved = [
            np.concatenate([(np.asarray(tree[path], np.float32) - start[path]).ravel() for path in start])
            for tree in (state.params, state.ema)
        ]
        return figures, float(metrics.loss), moved


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw8bit"])
def test_float16_with_8_bit_moments_scales_skips_and_moves_as_on_one_device(on_eight, name):
    figures, loss, moved = trained(ONE, name)
    ours, our_loss, we_moved = on_eight(trained, MESHES[4], name)
    assert ours == figures
    assert [int(np.log2(scale)) for scale, _, _ in ours] == [18, 17, 16, 15, 15]
    assert ours[-1][1:] == (0, 3)
    assert our_loss == pytest.approx(loss, rel=1e-3)
    # float16's sums in another order change gradients by about 1e-3, which turns some roundings of weights and moments.
    for own, expected in zip(we_moved, moved, strict=True):
        assert np.vdot(own, expected) > 0.99 * np.linalg.norm(own) * np.linalg.norm(expected)
        assert np.linalg.norm(own) == pytest.approx(np.linalg.norm(expected), rel=0.01)


SHAPES = {"blocks.mlp.layer1.kernel": (2, 64, 128), "blocks.self_attn.q_norm.scale": (2, 16)}


def applied(sizes, name):
    """Return scales and counters of five steps, of which one overflows in one element, and the bits of the state."""
    mesh = make_mesh(sizes, jax.devices()[: 1 if sizes == ONE else 8])
    tensors = file_tensors(dit.RULES, {path: np.broadcast_to(np.float32(0), shape) for path, shape in SHAPES.items()})
    rates = optimizers.LearningRates(dict.fromkeys([group for group, _ in optimizers.GROUPS], LR))
    optimizer = optimizers.build(OptimizerConfig(type=name, lr=LR), rates, tensors, clip_norm=0.0)
    config = StepConfig(compute_dtype=jnp.float16, param_dtype=jnp.bfloat16, ema_decay=0.9)
    drawn = [
        {path: np.random.default_rng(n).normal(size=shape).astype("f4") for path, shape in SHAPES.items()}
        for n in range(6)
    ]
    drawn[3]["blocks.mlp.layer1.kernel"][1, 3, 100] = np.inf
    with jax.set_mesh(mesh):
        place = functools.partial(jax.device_put, device=rules.shardings(drawn[0], drawn[0], mesh))
        state = init_state(place(drawn[0]), optimizer, config)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = functools.partial(apply_gradients, optimizer=optimizer, config=config)
        step, figures = quick_jit(step, out_shardings=(shardings, None)), []
        for grads in drawn[1:]:
            state, metrics = step(state, jnp.float32(1), place(grads))
            figures.append((float(metrics.loss_scale), int(metrics.skipped), int(metrics.total_skipped)))
    return figures, [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize("name", ["adamw8bit", "lion8bit", "adafactor"])
def test_an_overflow_on_one_device_skips_the_step_on_all_and_the_state_is_that_of_one_device(on_eight, name):
    """Bit for bit in 8 bits, because random numbers of rounding follow from the element, and the updates are of each
    element alone; adafactor's means are sums in another order."""
    figures, state = on_eight(applied, MESHES[4], name)
    expected, alone = applied(ONE, name)
    assert figures == expected == [(2.0**16, 0, 0)] * 2 + [(2.0**16, 0, 1)] + [(2.0**15, 0, 1)] * 2
    for own, leaf in zip(state, alone, strict=True):
        if name == "adafactor":
            own, leaf = own.astype(np.float32), leaf.astype(np.float32)  # noqa: PLW2901 - the same, wider
            assert np.linalg.norm(own - leaf) <= 1e-3 * np.linalg.norm(leaf)
        else:
            np.testing.assert_array_equal(own, leaf)
