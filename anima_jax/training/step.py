"""One optimizer step: noising, network, loss, gradients, update, EMA. One jitted function with donated state.

A step whose loss or gradient is not finite changes nothing but its counters; that is decided on the device.

Axes: b batch, l image tokens, n source text tokens, m target text tokens, d features, c the 64 values of a token.
"""

import dataclasses
import functools
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from anima_jax.adapters import modules
from anima_jax.diffusion.objective import Loss, TimeDistribution, batch_mean, interpolate
from anima_jax.diffusion.randomness import Purpose, example_keys, normal, uniform
from anima_jax.models.dit import CONTEXT_ROWS, AnimaDiT
from anima_jax.models.llm_adapter import Text
from anima_jax.models.parameters import Params, cast_to_compute, merge
from anima_jax.parallel import rules
from anima_jax.parallel.mesh import current_mesh, replicated
from anima_jax.training.rounding import stochastic_round
from anima_jax.training.selfcheck import GroupNorms, group_norms

_ROUNDING = zlib.crc32(b"stochastic rounding")
"""What sets the keys of rounding apart from those of examples, whose first number is an epoch."""


class TrainBatch(NamedTuple):
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
    """What a step changes. `params` are the trained parameters only; `ema` their average in float32, or None.

    `step` counts every step, also those whose update was left out: the last `skipped` in a row, `total_skipped` in all.
    """

    step: Array
    params: Params
    opt_state: Any
    ema: Params | None
    skipped: Array
    total_skipped: Array


class Metrics(NamedTuple):
    """Loss (mean over the batch) and global gradient norm before clipping; whether both are `finite`.

    `skipped` counts the updates skipped in a row, this step's included: 0 if this one was applied. `norms` are those of
    each parameter group's gradient and update, if the groups are given.
    """

    loss: Array
    grad_norm: Array
    finite: Array
    skipped: Array
    norms: GroupNorms | None = None


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Everything about a step that is fixed for a run."""

    compute_dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.float32
    times: TimeDistribution = TimeDistribution()
    loss: Loss = Loss()
    seed: int = 0
    uncond_fraction: float = 0.0
    ema_decay: float | None = None
    dropout: float = 0.0
    rank_dropout: float = 0.0
    remat: str = "full"
    remat_every: int = 1
    scan_unroll: int = 1


def init_state(
    params: Params, optimizer: optax.GradientTransformation, config: StepConfig, mesh: Mesh | None = None
) -> TrainState:
    """The state before the first step. `params` are the parameters to train; they are stored in `param_dtype`.

    What is made of a parameter lies on the mesh (by default the one that is set) as the parameter does.
    """
    mesh = mesh or current_mesh()
    params = {path: jnp.asarray(value, config.param_dtype) for path, value in params.items()}
    ema = None if config.ema_decay is None else jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
    step, skipped, total_skipped = jax.device_put([np.zeros((), np.int32)] * 3, replicated(mesh))
    # Moments take the dtype of what they are made for: float32 whatever the parameters are stored in.
    wide = as_float32(params)
    opt_state = jax.jit(optimizer.init, out_shardings=optimizer_places(optimizer, wide, mesh))(wide)
    return TrainState(step, params, opt_state, ema, skipped, total_skipped)


def optimizer_places(optimizer: optax.GradientTransformation, params: Params, mesh: Mesh) -> Any:
    """Where the optimizer's state of float32 parameters (or their shapes) lies: in the host's memory too."""
    jaxpr, shapes = jax.make_jaxpr(optimizer.init, return_shape=True)(params)
    places, treedef = jax.tree.flatten(rules.shardings(shapes, params, mesh))
    places = [
        place.with_memory_kind("pinned_host") if leaf.memory_space == jax.memory.Space.Host else place
        for place, leaf in zip(places, jaxpr.out_avals, strict=True)
    ]
    return jax.tree.unflatten(treedef, places)


def as_float32(params: Params) -> Params:
    """The parameters in float32: themselves, unless they are stored in less."""
    return {path: value.astype(jnp.float32) for path, value in params.items()}


def losses(
    model: AnimaDiT, batch: TrainBatch, unconditional: Text | None, noise_blc: Array, times_b: Array, config: StepConfig
) -> Array:
    """Loss of each example, (b,), at these times and with this noise.

    `unconditional` is the empty caption, with a batch axis of 1, shown instead of the caption to `uncond_fraction` of
    the examples; None shows every caption.
    """
    x0_blc = batch.latents_blc.astype(jnp.float32)
    text = batch.text
    if unconditional is not None and config.uncond_fraction > 0:
        dropped_b = uniform(_keys(batch, Purpose.CAPTION_DROPOUT, config)) < config.uncond_fraction
        text = jax.tree.map(functools.partial(_dropped, dropped_b), unconditional, text)
    if model.text_encoder is not None:
        # It is trained: what stands in the place of its states are token ids.
        states_bnd = model.text_encoder(text.source_bnd, text.source_mask_bn, dtype=config.compute_dtype)
        text = text._replace(source_bnd=states_bnd)
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
        remat_every=config.remat_every,
        scan_unroll=config.scan_unroll,
    )
    return config.loss(velocity_blc, noise_blc - x0_blc, batch.grid_b3, batch.mask_blp)


def _dropped(dropped_b: Array, empty: Array, given: Array) -> Array:
    """`empty`, padded with zeros to the rows of `given`, where `dropped_b` says so."""
    empty = jnp.pad(empty, [(0, 0), (0, given.shape[1] - empty.shape[1]), *[(0, 0)] * (given.ndim - 2)])
    return jnp.where(dropped_b.reshape(-1, *[1] * (given.ndim - 1)), empty, given)


def batch_loss(model: AnimaDiT, batch: TrainBatch, unconditional: Text | None, config: StepConfig) -> Array:
    """Mean loss of a batch, every random number drawn from its examples' ids. `unconditional` as in `losses`."""
    if config.dropout or config.rank_dropout:
        modules.drop(model, _keys(batch, Purpose.ADAPTER_DROPOUT, config), config.dropout, config.rank_dropout)
    times_b = config.times.times(uniform(_keys(batch, Purpose.TIME, config)), batch.grid_b3)
    noise_blc = normal(_keys(batch, Purpose.NOISE, config), batch.latents_blc.shape[1:])
    return batch_mean(losses(model, batch, unconditional, noise_blc, times_b, config))


def _keys(batch: TrainBatch, purpose: Purpose, config: StepConfig) -> Array:
    return example_keys(config.seed, batch.epochs_b, batch.ids_b2, purpose)


def train_step(
    state: TrainState,
    frozen: Params,
    batch: TrainBatch,
    unconditional: Text | None,
    *,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    groups: Mapping[str, str] | None = None,
    accumulation: int = 1,
) -> tuple[TrainState, Metrics]:
    """One update from one batch, in `accumulation` micro-batches; `frozen` are the parameters that are not trained."""
    loss, grads = loss_and_gradients(
        state.params, frozen, batch, unconditional, graphdef=graphdef, config=config, accumulation=accumulation
    )
    return apply_gradients(state, loss, grads, optimizer=optimizer, config=config, groups=groups)


def loss_and_gradients(
    params: Params,
    frozen: Params,
    batch: TrainBatch,
    unconditional: Text | None,
    *,
    graphdef: nnx.GraphDef,
    config: StepConfig,
    accumulation: int = 1,
) -> tuple[Array, Params]:
    """Mean loss of a batch and its gradients, float32, in `accumulation` micro-batches."""

    def loss_of(params: Params, micro_batch: TrainBatch) -> Array:
        # Frozen weights stay as they are stored: the linear operation makes them numbers, a layer at a time.
        model = merge(graphdef, frozen | cast_to_compute(params, config.compute_dtype))
        return batch_loss(model, micro_batch, unconditional, config)

    params = as_float32(params)
    if accumulation == 1:
        return jax.value_and_grad(loss_of)(params, batch)
    # Examples interleave, so that each device keeps its own.
    micro_batches = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total, micro_batch):
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_of)(params, micro_batch)), None

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zeros, micro_batches)
    return jax.tree.map(lambda x: x / accumulation, total)


def apply_gradients(
    state: TrainState,
    loss: Array,
    grads: Params,
    *,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    groups: Mapping[str, str] | None = None,
) -> tuple[TrainState, Metrics]:
    """The state after a step with this loss and these gradients: the update, or none if they are not finite."""
    grad_norm = optax.global_norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    old = as_float32(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, old)
    params = _stored(jax.tree.map(jnp.add, old, updates), state.step, config)
    ema = state.ema
    if ema is not None and config.ema_decay is not None:
        ema = update_ema(ema, as_float32(params), state.step, config.ema_decay)
    # A select, not a branch: on an accelerator a branch would have the host wait for the condition.
    params, opt_state, ema = jax.tree.map(
        functools.partial(_where, finite),
        (params, opt_state, ema),
        (state.params, state.opt_state, state.ema),
    )
    norms = None
    if groups is not None:
        change = jax.tree.map(jnp.subtract, as_float32(params), old)
        norms = GroupNorms(group_norms(grads, groups), group_norms(change, groups))
    missed = 1 - finite.astype(jnp.int32)
    skipped = (state.skipped + 1) * missed
    state = TrainState(state.step + 1, params, opt_state, ema, skipped, state.total_skipped + missed)
    return state, Metrics(loss, grad_norm, finite, skipped, norms)


def _where(condition: Array, new: Array, old: Array) -> Array:
    """`jnp.where`, also of moments that live in host memory: the choice is made on the device."""
    if jax.typeof(old).memory_space != jax.memory.Space.Host:
        return jnp.where(condition, new, old)
    new, old = (jax.device_put(x, jax.memory.Space.Device) for x in (new, old))
    return jax.device_put(jnp.where(condition, new, old), jax.memory.Space.Host)


def _stored(params: Params, step: Array, config: StepConfig) -> Params:
    """Updated float32 parameters in the dtype that they are stored in, bfloat16 rounded at random.

    To nearest, a step smaller than half of bfloat16's spacing (0.4 % of a weight) would always be lost.
    """
    if jnp.dtype(config.param_dtype) == jnp.float32:
        return params
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), _ROUNDING), step)
    return {
        path: stochastic_round(value, jax.random.fold_in(key, zlib.crc32(path.encode())))
        for path, value in params.items()
    }


def update_ema(ema: Params, params: Params, step: Array, decay: float) -> Params:
    """ema + (1 − d)·(params − ema), where d grows as (1 + step) / (10 + step) up to `decay`."""
    rate = 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda average, value: average + rate * (value - average), ema, params)


def compile_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    groups: Mapping[str, str] | None = None,
    shardings: Any = None,
):
    """`train_step` jitted: (state, frozen, batch, unconditional, accumulation) → (state, metrics).

    The old state is donated; `shardings` are those of its leaves, which the new one keeps. A new shape of batch, or
    another accumulation, compiles a new program. With `groups`, the trained parameters' by path, every step measures
    their norms.
    """
    run = functools.partial(train_step, graphdef=graphdef, optimizer=optimizer, config=config, groups=groups)

    def step(state, frozen, batch, unconditional, accumulation=1):
        return run(state, frozen, batch, unconditional, accumulation=accumulation)

    places = None if shardings is None else (shardings, replicated(shardings.step.mesh))
    return jax.jit(step, donate_argnums=0, static_argnums=4, out_shardings=places)
