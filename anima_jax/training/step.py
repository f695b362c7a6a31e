"""One optimizer step: noising, network, loss, gradients, update, EMA. One jitted function with donated state.

Axes: b batch, l image tokens, n source text tokens, m target text tokens, d features, c the 64 values of a token.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from anima_jax.diffusion.objective import Loss, TimeDistribution, batch_mean, interpolate
from anima_jax.diffusion.randomness import Purpose, example_keys, normal, uniform
from anima_jax.models.dit import CONTEXT_ROWS, AnimaDiT
from anima_jax.models.llm_adapter import Text
from anima_jax.models.parameters import Params, compute_copy, merge


class Batch(NamedTuple):
    """Examples of one step, NumPy or JAX arrays.

    Random numbers depend on `ids_b2` and `epochs_b` (diffusion/randomness.py). `mask_blp` weights the loss of each of a
    token's four latent pixels; None where no example of the run has a mask.
    """

    latents_blc: Any
    grid_b3: Any
    ids_b2: Any
    epochs_b: Any
    text: Text
    mask_blp: Any = None


class TrainState(NamedTuple):
    """What a step changes. `params` are the trained parameters only, float32; `ema` their average, or None."""

    step: Array
    params: Params
    opt_state: Any
    ema: Params | None


class Metrics(NamedTuple):
    """Loss (mean over the batch) and global gradient norm before clipping."""

    loss: Array
    grad_norm: Array


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Everything about a step that is fixed for a run."""

    compute_dtype: Any = jnp.bfloat16
    times: TimeDistribution = TimeDistribution()
    loss: Loss = Loss()
    seed: int = 0
    uncond_fraction: float = 0.0
    ema_decay: float | None = None
    remat: str = "full"


def init_state(params: Params, optimizer: optax.GradientTransformation, config: StepConfig) -> TrainState:
    """The state before the first step. `params` are the parameters to train."""
    params = {path: jnp.asarray(value, jnp.float32) for path, value in params.items()}
    ema = None if config.ema_decay is None else jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)


def batch_loss(model: AnimaDiT, batch: Batch, unconditional: Text | None, config: StepConfig) -> Array:
    """Mean loss of a batch, every random number drawn from its examples' ids.

    `unconditional` is the empty caption, with a batch axis of 1, shown instead of the caption to `uncond_fraction` of
    the examples.
    """
    length = batch.latents_blc.shape[1]

    def keys(purpose):
        return example_keys(config.seed, batch.epochs_b, batch.ids_b2, purpose)

    times_b = config.times.times(uniform(keys(Purpose.TIME)), batch.grid_b3)
    x0_blc = batch.latents_blc.astype(jnp.float32)
    noise_blc = normal(keys(Purpose.NOISE), (length, x0_blc.shape[-1]))
    text = batch.text
    if unconditional is not None and config.uncond_fraction > 0:
        dropped_b = uniform(keys(Purpose.CAPTION_DROPOUT)) < config.uncond_fraction
        text = jax.tree.map(
            lambda empty, given: jnp.where(dropped_b.reshape(-1, *[1] * (given.ndim - 1)), empty, given),
            unconditional,
            text,
        )
    assert model.llm_adapter is not None
    context_bmd = model.llm_adapter(
        text.source_bnd.astype(config.compute_dtype), text.target_ids_bm, text.source_mask_bn, text.target_mask_bm
    )
    velocity_blc = model.velocity(
        interpolate(x0_blc, noise_blc, times_b).astype(config.compute_dtype),
        batch.grid_b3,
        times_b,
        context_bmd,
        zero_context=max(0, CONTEXT_ROWS - context_bmd.shape[1]),
        remat=config.remat,
    )
    return batch_mean(config.loss(velocity_blc, noise_blc - x0_blc, batch.grid_b3, batch.mask_blp))


def train_step(
    state: TrainState,
    frozen: Params,
    batch: Batch,
    unconditional: Text | None,
    *,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    accumulation: int = 1,
) -> tuple[TrainState, Metrics]:
    """One update from one batch, in `accumulation` micro-batches; `frozen` are the parameters that are not trained."""

    def loss_of(params: Params, micro_batch: Batch) -> Array:
        model = merge(graphdef, compute_copy(frozen | params, config.compute_dtype))
        return batch_loss(model, micro_batch, unconditional, config)

    if accumulation == 1:
        loss, grads = jax.value_and_grad(loss_of)(state.params, batch)
    else:
        loss, grads = _accumulate(loss_of, state.params, batch, accumulation)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = jax.tree.map(jnp.add, state.params, updates)
    ema = state.ema
    if ema is not None and config.ema_decay is not None:
        ema = update_ema(ema, params, state.step, config.ema_decay)
    return TrainState(state.step + 1, params, opt_state, ema), Metrics(loss, optax.global_norm(grads))


def _accumulate(loss_of, params: Params, batch: Batch, count: int):
    """Mean loss and gradients over `count` micro-batches. Examples interleave, so that each device keeps its own."""
    micro_batches = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total, micro_batch):
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_of)(params, micro_batch)), None

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zeros, micro_batches)
    return jax.tree.map(lambda x: x / count, total)


def update_ema(ema: Params, params: Params, step: Array, decay: float) -> Params:
    """ema + (1 − d)·(params − ema), where d grows as (1 + step) / (10 + step) up to `decay`."""
    rate = 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda average, value: average + rate * (value - average), ema, params)


def compile_step(graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, config: StepConfig):
    """`train_step` jitted: (state, frozen, batch, unconditional, accumulation) → (state, metrics).

    The old state is donated. A new shape of batch, or another accumulation, compiles a new program.
    """
    run = functools.partial(train_step, graphdef=graphdef, optimizer=optimizer, config=config)

    def step(state, frozen, batch, unconditional, accumulation=1):
        return run(state, frozen, batch, unconditional, accumulation=accumulation)

    return jax.jit(step, donate_argnums=0, static_argnums=4)
