"""A small run for the tests to kill: state, data plan, saving and resuming are the trainer's, the model is not."""

import json
import math
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from anima_jax.data.batch_plan import BatchPlan, Tier
from anima_jax.training.intervals import Every
from anima_jax.training.resume import Checkpointer, run_metadata
from anima_jax.training.step import TrainState

STEPS = 60
PLAN = BatchPlan([Tier("64", np.arange(10), 16, 4), Tier("96", np.arange(10, 17), 36, 2)], seed=3)
IDS = np.arange(17) * 1000 + 7
SHAPES = {"blocks.mlp.kernel": (4, 64, 256), "blocks.self_attn.kernel": (4, 64, 128), "x_embedder.kernel": (64, 128)}
GROUPS = dict(zip(SHAPES, ("mlp", "self_attn", "base"), strict=True))

# Moments, two counters, an accumulator that only every other step empties, and a rate that follows the count.
OPTIMIZER = optax.MultiSteps(optax.adamw(optax.linear_schedule(1e-2, 0.0, STEPS)), every_k_schedule=2)


@jax.jit
def fresh_state() -> TrainState:
    """The state that every run starts from."""
    params = {
        path: jnp.sin(jnp.arange(math.prod(shape), dtype=jnp.float32)).reshape(shape) for path, shape in SHAPES.items()
    }
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, OPTIMIZER.init(params), params, zero, zero)


def loss_of(params, ids_b, epochs_b):
    """A distance to waves that the examples' ids and epochs determine, as noise is in diffusion."""
    wave = jnp.sin(ids_b + 0.1 * epochs_b).sum()
    return sum(jnp.mean(jnp.sin(value - wave) ** 2) for value in params.values())


def step(state: TrainState, ids_b, epochs_b):
    """One step of training and its loss."""
    loss, grads = jax.value_and_grad(loss_of)(state.params, ids_b, epochs_b)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = jax.tree.map(lambda average, value: average + 0.1 * (value - average), state.ema, params)
    return state._replace(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        ema=ema,
        total_skipped=state.total_skipped + (loss > 0.6),
    ), loss


def resumable(folder: pathlib.Path, **options) -> Checkpointer:
    return Checkpointer(folder, PLAN, run_metadata(fresh_state().params, GROUPS, PLAN, IDS, {}), keep=2, **options)


def run(folder: pathlib.Path, pause_s: float = 0.0) -> None:
    """Train in `folder` to the end, from its newest checkpoint if it has one; each loss is a line of `losses`."""
    jax.config.update("jax_platforms", "cpu")
    checkpointer, state = resumable(folder), fresh_state()
    try:
        if checkpointer.checkpoints.latest() is not None:
            state, messages = checkpointer.restore(state, OPTIMIZER.init)
            assert messages == []
        jitted = jax.jit(step, donate_argnums=0)
        with open(folder / "losses", "a", encoding="ascii") as log:
            for number in range(checkpointer.start.step, STEPS):
                batch = PLAN.batch(checkpointer.start.position_after(number).data_step)
                state, loss = jitted(state, IDS[batch.indices], batch.epochs)
                log.write(f"\n{json.dumps([number, float(loss).hex()])}")
                log.flush()
                time.sleep(pause_s)
                if (number + 1) % 5 == 0 or Every(epochs=1).due(checkpointer.point_after(number + 1, STEPS)):
                    checkpointer.save(number + 1, state)
        assert checkpointer.save(STEPS, state, wait=True)
    finally:
        checkpointer.close()


def main(folder: str, pause_s: float) -> None:
    """What a child process runs; a killed one cannot tell its parent anything else."""
    run(pathlib.Path(folder), pause_s)
    os._exit(0)
