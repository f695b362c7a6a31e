"""The train step: noising, network, loss, gradients, update and EMA in one jitted function with donated state.

`train_step` calls `loss_fn`, in micro-batches, and `apply_gradients`. If the loss or gradient is not finite, the step
changes only the counters and the loss scale; the device decides that, without the host.

Axes: b batch, l image tokens, n source text tokens or context rows, m target text tokens, d features, c the 64 values
of a token.
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
from anima_jax.compiler import compiler_options
from anima_jax.config.main import MainConfig
from anima_jax.diffusion import references
from anima_jax.diffusion.objective import Loss, TimeDistribution, batch_mean, interpolate
from anima_jax.diffusion.randomness import Purpose, example_keys, normal, uniform
from anima_jax.errors import UserError
from anima_jax.models import control
from anima_jax.models.dit import CONTEXT_ROWS, AnimaDiT
from anima_jax.models.llm_adapter import Text
from anima_jax.models.parameters import Params, cast_to_compute, merge
from anima_jax.parallel import rules
from anima_jax.parallel.mesh import current_mesh, replicated
from anima_jax.platform import hardware
from anima_jax.text.states import text_dtype
from anima_jax.training import loss_scale, optimizers
from anima_jax.training.loss_scale import LossScale
from anima_jax.training.rounding import stochastic_round
from anima_jax.training.selfcheck import GroupNorms, group_norms

_ROUNDING = zlib.crc32(b"stochastic rounding")
"""Folded into the keys of rounding, so that they differ from those of examples, where an epoch comes first."""


class TrainBatch(NamedTuple):
    """The examples of one step, as NumPy or JAX arrays.

    Random numbers depend on `ids_b2` and `epochs_b` (diffusion/randomness.py). `text.source_bnd` contains states of the
    text encoder, or token ids (b, n) if the encoder is trained. `mask_blp` weights the loss of each of the four latent
    pixels of a token; None if no example of the run has a mask. `control_blp` are the 16 × 16 pixels of a token of the
    control picture, 3 or 4 channels of 0 to 255 (`ControlNetwork.embed_patches`); None without control. `full` is an
    empty tuple if no example of the tier has padding tokens, for a program without masks in self-attention; None if any
    may have. With `StepConfig.edit`, the first frame of an example's grid is the picture; the others are references.
    """

    latents_blc: Any
    grid_b3: Any
    ids_b2: Any
    epochs_b: Any
    text: Text
    mask_blp: Any = None
    control_blp: Any = None
    full: Any = None


class TrainState(NamedTuple):
    """The state that a step updates. `params` are the trained parameters only; `ema` is their float32 average or None.

    `step` counts all steps, including those whose update was skipped: `skipped` is the number of the latest ones in a
    row, `total_skipped` the number of all. `loss_scale` is None unless the compute dtype is float16; a step that was
    skipped because the scale was too large is counted in `total_skipped`, but not in `skipped`.
    """

    step: Array
    params: Params
    opt_state: Any
    ema: Params | None
    skipped: Array
    total_skipped: Array
    loss_scale: LossScale | None = None


class Metrics(NamedTuple):
    """Loss (mean over the batch), global gradient norm before clipping, and whether both are `finite`.

    `skipped` and `total_skipped` are those of `TrainState` after this step. `loss_scale` is the scale with which the
    step was computed, None without one. `norms` are the norms of the gradient and update of each parameter group, if
    `train_step` is given the groups.
    """

    loss: Array
    grad_norm: Array
    finite: Array
    skipped: Array
    total_skipped: Array
    loss_scale: Array | None = None
    norms: GroupNorms | None = None

    @property
    def scalars(self) -> dict[str, Array]:
        """All metrics but the norms and those that are None, by name."""
        return {name: value for name, value in self._asdict().items() if name != "norms" and value is not None}


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Settings of the compiled step: hashable, and equal for configurations that compile to the same program."""

    compute_dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.float32
    times: TimeDistribution = TimeDistribution()
    loss: Loss = Loss()
    seed: int = 0
    uncond_fraction: float = 0.0
    ema_decay: float | None = None
    dropout: float = 0.0
    rank_dropout: float = 0.0
    control_strength: float = 1.0
    remat: str = "full"
    remat_every: int = 1
    scan_unroll: int = 1
    edit: bool = False

    @classmethod
    def of(cls, config: MainConfig) -> "StepConfig":
        """Return the step settings of a run's configuration."""
        model, adapter, (loss, parameter) = config.model, config.adapter, config.loss
        return cls(
            compute_dtype=jnp.dtype(config.compute_dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            times=TimeDistribution(model.timestep_sample_method, model.sigmoid_scale, model.shift, model.flux_shift),
            loss=Loss(loss, parameter, model.multiscale_loss_weight or 0.0),
            dropout=adapter.dropout if adapter else 0.0,
            rank_dropout=adapter.rank_dropout if adapter else 0.0,
            control_strength=adapter.multiplier if adapter else 1.0,
            **{name: getattr(config, name) for name in _SAME_NAME},
        )


_SAME_NAME = ("seed", "uncond_fraction", "ema_decay", "remat", "remat_every", "scan_unroll", "edit")
"""Fields of `StepConfig` that have the same name in the configuration."""


def trained_weights(state: TrainState) -> Params:
    """Return the trained weights, or with a schedule-free optimizer the averaged ones."""
    averaged = optimizers.averaged(state.opt_state, state.params)
    return state.params if averaged is None else averaged


def init_state(
    params: Params, optimizer: optax.GradientTransformation, config: StepConfig, mesh: Mesh | None = None
) -> TrainState:
    """Return the state before the first step; `params`, the trained parameters, are stored in `param_dtype`.

    Their average and the optimizer's state have the same sharding, on `mesh` (by default the current one).
    """
    mesh = mesh or current_mesh()
    params = {path: jnp.asarray(value, config.param_dtype) for path, value in params.items()}
    ema = None if config.ema_decay is None else jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
    counters = [np.zeros((), np.int32)] * 3
    (step, skipped, total_skipped), scale = jax.device_put(
        (counters, loss_scale.initial(config.compute_dtype)), replicated(mesh)
    )
    # Moments have the dtype of the parameters from which they are initialised, and should be float32.
    wide = as_float32(params)
    opt_state = jax.jit(optimizer.init, out_shardings=opt_state_shardings(optimizer, wide, mesh))(wide)
    return TrainState(step, params, opt_state, ema, skipped, total_skipped, scale)


def opt_state_shardings(optimizer: optax.GradientTransformation, params: Params, mesh: Mesh) -> Any:
    """Return the shardings of the optimizer's state for float32 `params` (or shapes); some are in host memory.

    Raises UserError if the mesh's devices are GPUs that are not in this machine: JAX knows no host memory of theirs.
    """
    jaxpr, shapes = jax.make_jaxpr(optimizer.init, return_shape=True)(params)
    shardings, treedef = jax.tree.flatten(rules.shardings(shapes, params, mesh))
    shardings = [
        sharding.with_memory_kind("pinned_host") if leaf.memory_space == jax.memory.Space.Host else sharding
        for sharding, leaf in zip(shardings, jaxpr.out_avals, strict=True)
    ]
    offloaded = any(leaf.memory_space == jax.memory.Space.Host for leaf in jaxpr.out_avals)
    if offloaded and not any(sharding.memory_kind for sharding in shardings):
        raise UserError(
            f"moments in host memory: JAX cannot compile them for {hardware().kind}s that are not in this machine; "
            "--dry_run without --compile counts them"
        )
    return jax.tree.unflatten(treedef, shardings)


def as_float32(params: Params) -> Params:
    """Return the parameters in float32, unchanged if they already are."""
    return {path: value.astype(jnp.float32) for path, value in params.items()}


def example_losses(model: AnimaDiT, batch: TrainBatch, noise_blc: Array, times_b: Array, config: StepConfig) -> Array:
    """Return the loss of each example, (b,), at these times and with this noise.

    With `config.edit`, the references stay clean and have the picture's time, and only the picture's tokens count.
    """
    x0_blc, text, dtype = batch.latents_blc.astype(jnp.float32), batch.text, text_dtype(config.compute_dtype)
    if model.text_encoder is not None:  # it is trained, so the batch contains token ids
        states_bnd = model.text_encoder(text.source_bnd, text.source_mask_bn, dtype=dtype)
        text = text._replace(source_bnd=states_bnd)
    assert model.llm_adapter is not None
    context_bnd = model.llm_adapter(
        text.source_bnd.astype(dtype), text.target_ids_bm, text.source_mask_bn, text.target_mask_bm
    )
    noisy_blc, scored_b3 = interpolate(x0_blc, noise_blc, times_b), batch.grid_b3
    if config.edit:
        noisy_blc, scored_b3 = references.with_clean(noisy_blc, x0_blc, batch.grid_b3), references.picture_of(scored_b3)
    controls: tuple[control.ControlTerm, ...] = ()
    if model.control is not None and batch.control_blp is not None:
        pixels_blp = batch.control_blp.astype(jnp.float32) / 127.5 - 1.0
        embedding_ble = model.control.embed_patches(pixels_blp, batch.grid_b3)
        controls = ((model.control, embedding_ble, config.control_strength),)
    velocity_blc = model.velocity(
        noisy_blc.astype(config.compute_dtype),
        batch.grid_b3,
        times_b,
        context_bnd,
        padded=batch.full is None,
        zero_context=max(0, CONTEXT_ROWS - context_bnd.shape[1]),
        controls=controls,
        remat=config.remat,
        remat_every=config.remat_every,
        scan_unroll=config.scan_unroll,
    )
    return config.loss(velocity_blc, noise_blc - x0_blc, scored_b3, batch.mask_blp)


def loss_fn(model: AnimaDiT, batch: TrainBatch, unconditional: Text | None, config: StepConfig) -> Array:
    """Return the mean loss of a batch. The random numbers of an example follow from the seed, its id and its epoch.

    `unconditional` is the empty caption, with a batch axis of 1, which replaces a caption with probability
    `uncond_fraction`; None drops no caption.
    """

    def keys_b(purpose: Purpose) -> Array:
        return example_keys(config.seed, batch.epochs_b, batch.ids_b2, purpose)

    if config.dropout or config.rank_dropout:
        modules.drop(model, keys_b(Purpose.ADAPTER_DROPOUT), config.dropout, config.rank_dropout)
        if model.control is not None:
            control.drop(model.control, keys_b(Purpose.ADAPTER_DROPOUT), config.dropout)
    times_b = config.times.times(uniform(keys_b(Purpose.TIME)), batch.grid_b3)
    noise_blc = normal(keys_b(Purpose.NOISE), batch.latents_blc.shape[1:])
    if unconditional is not None and config.uncond_fraction > 0:
        dropped_b = uniform(keys_b(Purpose.CAPTION_DROPOUT)) < config.uncond_fraction
        batch = batch._replace(text=_drop_captions(batch.text, dropped_b, unconditional))
    return batch_mean(example_losses(model, batch, noise_blc, times_b, config))


def _drop_captions(text: Text, dropped_b: Array, unconditional: Text) -> Text:
    """Return `text` with the rows of `dropped_b` replaced by `unconditional`, padded with zeros to the same length."""

    def replaced(given: Array, empty: Array) -> Array:
        empty = jnp.pad(empty, [(0, 0), (0, given.shape[1] - empty.shape[1]), *[(0, 0)] * (given.ndim - 2)])
        return jnp.where(dropped_b.reshape(-1, *[1] * (given.ndim - 1)), empty, given)

    return jax.tree.map(replaced, text, unconditional)


def train_step(
    state: TrainState,
    frozen: Params,
    batch: TrainBatch,
    unconditional: Text | None,
    accumulation: int = 1,
    *,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    groups: Mapping[str, str] | None = None,
) -> tuple[TrainState, Metrics]:
    """Return the state updated with one batch, in `accumulation` micro-batches, and the metrics of the step.

    `frozen` are the frozen parameters. If `groups` maps the path of each trained parameter to its group, the metrics
    include the norms of the groups.
    """
    loss, grads = loss_and_gradients(
        state.params,
        frozen,
        batch,
        unconditional,
        graphdef=graphdef,
        config=config,
        accumulation=accumulation,
        scale=state.loss_scale,
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
    scale: LossScale | None = None,
) -> tuple[Array, Params]:
    """Return the mean loss of a batch and its gradients, computed in `accumulation` micro-batches.

    Gradients of matrices are in the compute dtype, as the backward pass computes them; in float32 if they are summed
    over micro-batches or there is a loss scale. Inside, loss and gradients are multiplied by the scale: `scale`, or if
    None the initial one of the compute dtype.
    """
    scale = scale or loss_scale.initial(config.compute_dtype)

    @jax.value_and_grad
    def scaled_value_and_grad(params: Params, micro_batch: TrainBatch) -> Array:
        # Frozen weights keep their storage dtype: each linear layer dequantises its own.
        model = merge(graphdef, frozen | params)
        loss = loss_fn(model, micro_batch, unconditional, config)
        return loss if scale is None else loss * scale.scale

    def value_and_grad(params: Params, micro_batch: TrainBatch) -> tuple[Array, Params]:
        found = scaled_value_and_grad(params, micro_batch)
        if scale is None:
            return found
        return jax.tree.map(lambda x, divisor=scale.scale: x.astype(jnp.float32) / divisor, found)

    params = cast_to_compute(as_float32(params), config.compute_dtype)
    if accumulation == 1:
        return value_and_grad(params, batch)
    # A micro-batch is every `accumulation`-th example, so that examples stay on their devices.
    micro_batches = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total, micro_batch):
        return jax.tree.map(jnp.add, total, value_and_grad(params, micro_batch)), None

    zeros = (jnp.zeros(()), jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params))
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
    """Return the state and metrics of a step with this loss and these gradients, which are not multiplied by the scale.

    If they are not finite, only the counters and the loss scale change.
    """
    grad_norms = optimizers.norms_of(grads)
    grad_norm = optax.global_norm(grad_norms)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), _ROUNDING), state.step)

    def finish(path: str, layer: Array | None, old: Array, change: Array, average: Array | None) -> Any:
        value = old + change
        if jnp.dtype(config.param_dtype) != jnp.float32:
            # To nearest, updates smaller than half of bfloat16's spacing (0.4 % of a weight) would always be lost.
            own = jax.random.fold_in(key, zlib.crc32(path.encode()))
            value = stochastic_round(value, own if layer is None else jax.random.fold_in(own, layer))
        if average is not None and config.ema_decay is not None:
            average = update_ema(average, value.astype(jnp.float32), state.step, config.ema_decay)
        return value, average

    params, opt_state, ema, changes = optimizers.apply(
        optimizer,
        grads,
        grad_norm,
        (state.params, state.opt_state, state.ema),
        ~finite,
        finish,
        measure=groups is not None,
    )
    norms = None
    if groups is not None and changes is not None:
        norms = GroupNorms(group_norms(grad_norms, groups), group_norms(changes, groups))
    scale, overflowed = state.loss_scale, loss_scale.overflowed(state.loss_scale, loss, finite)
    skipped = jnp.where(finite, 0, state.skipped + 1 - overflowed)
    total_skipped = state.total_skipped + 1 - finite
    new_scale = scale and loss_scale.adjusted(scale, loss, finite)
    new = TrainState(state.step + 1, params, opt_state, ema, skipped, total_skipped, new_scale)
    return new, Metrics(loss, grad_norm, finite, skipped, total_skipped, scale and scale.scale, norms)


def update_ema(ema: Any, params: Any, step: Array, decay: float) -> Any:
    """Return ema + (1 − d)·(params − ema), where d grows as (1 + step) / (10 + step) up to `decay`."""
    rate = 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda average, value: average + rate * (value - average), ema, params)


def compile_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    groups: Mapping[str, str] | None = None,
    shardings: Any = None,
):
    """Return the jitted `train_step`: (state, frozen, batch, unconditional, accumulation) → (state, metrics).

    The old state is donated; `shardings` are those of its leaves, which the new state keeps. Each batch shape and
    `accumulation` compiles a program of its own, with the `compiler_options` of their mesh.
    """
    step = functools.partial(train_step, graphdef=graphdef, optimizer=optimizer, config=config, groups=groups)
    mesh = None if shardings is None else shardings.step.mesh
    out_shardings = None if mesh is None else (shardings, replicated(mesh))
    options = compiler_options(mesh)
    return jax.jit(step, donate_argnums=0, static_argnums=4, out_shardings=out_shardings, compiler_options=options)
