"""Memory, FLOPs and step time of a run, estimated before anything is loaded.

All numbers follow from shapes. The bytes of activations are those that the backward pass saves, or those that XLA
reports for the compiled step. By default XLA's are not used on a CPU, whose programs keep 16-bit weights in float32.
Axes: b batch, l image tokens, n source and m target text tokens, d features.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from anima_jax.config.main import MainConfig
from anima_jax.data.dataset import TrainingData
from anima_jax.diffusion.objective import PIXELS
from anima_jax.errors import UserError
from anima_jax.models.dit import OUT_CHANNELS, DiTConfig
from anima_jax.models.llm_adapter import Text
from anima_jax.models.parameters import Params, cast_to_compute, merge
from anima_jax.parallel import rules
from anima_jax.parallel.devices import DeviceSpec, local_device_spec
from anima_jax.parallel.mesh import batch_sharding, current_mesh, replicas, replicated
from anima_jax.training import optimizers
from anima_jax.training.evaluate import QUANTILES
from anima_jax.training.flops import Flops, Workload, flops
from anima_jax.training.run import Run
from anima_jax.training.scaling import Seconds, Traffic, step_seconds, traffic
from anima_jax.training.state import ParamPartition, blank_text_encoder, dit_config, prepare
from anima_jax.training.step import (
    StepConfig,
    TrainBatch,
    TrainState,
    compile_step,
    init_state,
    loss_fn,
    opt_state_shardings,
)

GIB = 2**30

Device = Any  # jax.Device, which type checkers do not accept as a class

WORKSPACE = 64 * 2**20
"""Bytes that attention needs at any size: a 16 MiB block each of scores, weights and their two gradients."""


def peak_flops(devices: Sequence[Device], dtype: Any) -> float | None:
    """Return the total peak FLOPs per second of `devices`; None for an unknown kind or a dtype wider than 16 bits."""
    spec = local_device_spec(devices[0])
    return None if spec is None or jnp.dtype(dtype).itemsize > 2 else len(devices) * spec.flops


def abstract_partition(config: MainConfig) -> ParamPartition:
    """Return the partition that `prepare` makes, with shapes in place of arrays. Only file headers are read."""
    prepared, mesh, sizes = list[ParamPartition](), current_mesh(), dit_config(config)

    def arrays() -> tuple[Params, Params]:
        with jax.disable_jit():  # a jit with compiler options cannot be traced
            prepared.append(prepare(config, lambda: blank_text_encoder(config), mesh, sizes=sizes))
        return prepared[0].params, prepared[0].frozen

    params, frozen = jax.eval_shape(arrays)
    return dataclasses.replace(prepared[0], params=params, frozen=frozen)


def example_flops(partition: ParamPartition, config: StepConfig, work: Workload) -> Flops:
    """Return the FLOPs of one example of `work`."""
    return flops(partition.config, partition.params, work, config.remat, config.remat_every, partition.frozen)


def step_workloads(run: Run, data: TrainingData, source_rows: int, target_rows: int) -> list[Workload]:
    """Return the workload of each tier of the batch plan; text is padded to `source_rows` and `target_rows`."""
    return [
        Workload(tier.name, tier.batch_size, accumulation, tier.tokens, size.grid, source_rows, target_rows)
        for tier, accumulation, size in zip(data.plan.tiers, run.accumulations(data), data.largest_sizes, strict=True)
    ]


def abstract_batch(
    work: Workload, size: int, config: DiTConfig, dtype: Any, *, masked: bool = False, text_ids: bool = False
) -> TrainBatch:
    """Return the shapes of `size` examples, latents and text states in `dtype`; `text_ids`: token ids, not states."""

    def shape(dtype: Any, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct((size, *sizes), dtype)

    return TrainBatch(
        latents_blc=shape(dtype, work.tokens, PIXELS * OUT_CHANNELS),
        grid_b3=shape(jnp.int32, 3),
        ids_b2=shape(jnp.uint32, 2),
        epochs_b=shape(jnp.int32),
        text=_abstract_text(work, size, config, dtype, text_ids),
        mask_blp=shape(jnp.float32, work.tokens, PIXELS) if masked else None,
    )


def _abstract_text(work: Workload, size: int, config: DiTConfig, dtype: Any, ids: bool) -> Text:
    assert config.adapter is not None
    source, target = (size, work.source_rows), (size, work.target_rows)
    states = jax.ShapeDtypeStruct((*source, config.adapter.source_width), dtype)
    return Text(
        jax.ShapeDtypeStruct(source, jnp.int32) if ids else states,
        *(jax.ShapeDtypeStruct(rows, jnp.int32) for rows in (source, target, target)),
    )


# memory -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes by purpose: on each device (`rows`) and in host memory per device (`on_host`).

    `measured` says whether the activations are those of the compiled program.
    """

    rows: Mapping[str, int]
    on_host: Mapping[str, int]
    measured: bool = False

    @property
    def total(self) -> int:
        """Bytes per device."""
        return sum(self.rows.values())


def memory(
    partition: ParamPartition,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    work: Workload,
    dtype: Any,
    *,
    sizes: Mapping[str, int] | None = None,
    masked: bool = False,
    moments_on_host: bool = False,
    measure: bool | None = None,
) -> Memory:
    """Return the memory of a run whose largest step is `work`; `dtype` is the dtype of cached examples.

    `partition` may contain shapes. `sizes` are the mesh sizes, by default those of the current mesh. `measure` compiles
    the step for the current mesh to get the exact bytes; by default only without `sizes`, and not on a CPU.
    """
    mesh = current_mesh()
    measure = measure if measure is not None else sizes is None and jax.default_backend() != "cpu"
    sizes = sizes or mesh.shape
    state = jax.eval_shape(lambda params: init_state(params, optimizer, config, mesh), partition.params)
    batch = abstract_batch(work, work.batch, partition.config, dtype, masked=masked, text_ids=partition.text_ids)
    bytes_of = functools.partial(rules.shard_bytes, params=partition.params, sizes=sizes)
    moments, gradients = bytes_of(state.opt_state), bytes_of(_float32_shapes(partition.params))
    rows = {
        "trained parameters": bytes_of(state.params),
        "frozen parameters": rules.shard_bytes(partition.frozen, partition.frozen, sizes),
        "gradients": gradients,
        "optimizer": 0 if moments_on_host else moments,
        "moving average": 0 if state.ema is None else bytes_of(state.ema),
        "batch": num_bytes(batch) // replicas(sizes),
    }
    examples = -(-work.micro_batch // replicas(sizes))
    inputs = _block_inputs_bytes(partition, config, work) // sizes["context"]
    on_host = {"optimizer": moments} if moments_on_host else {}
    on_host |= {"inputs of blocks": examples * inputs} if config.remat == "offload" else {}
    if measure and (temporary := _compiled_bytes(partition, optimizer, config, work, batch, state)) is not None:
        return Memory(rows | {"activations": max(0, temporary - gradients)}, on_host, measured=True)
    if work.accumulation > 1:
        rows["gradients"] *= 2  # the running sum and the gradients of one micro-batch
    copies = jax.eval_shape(lambda params: cast_to_compute(params, config.compute_dtype), state.params)
    rows["compute copies"] = bytes_of(
        {path: copy for path, copy in copies.items() if copy.dtype != state.params[path].dtype}
    )
    rows["gathered weights"] = _gathered_bytes(partition, config, sizes) if sizes["fsdp"] > 1 else 0
    saved = activation_bytes(partition, config, work, dtype, masked=masked) // sizes["context"]
    # Between blocks, every device of the tensor axis has all features; inside a block, only its shard.
    between = 0 if config.remat == "offload" else min(saved, inputs)
    rows["activations"] = WORKSPACE + examples * (between + (saved - between) // sizes["tensor"])
    return Memory(rows, on_host)


def _float32_shapes(params: Params) -> Params:
    return {path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for path, leaf in params.items()}


def _gathered_bytes(partition: ParamPartition, config: StepConfig, sizes: Mapping[str, int]) -> int:
    """Return the bytes of two blocks' weights gathered over `fsdp`: the current block's and the next one's."""
    weights: Params = {**partition.frozen, **partition.params}
    block = {
        path: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), config.compute_dtype)
        for path, leaf in weights.items()
        if path.startswith("blocks.")
    }
    return 2 * rules.shard_bytes(block, block, {**sizes, "fsdp": 1})


def activation_bytes(
    partition: ParamPartition, config: StepConfig, work: Workload, dtype: Any, *, masked: bool = False
) -> int:
    """Return the bytes that the backward pass saves for one example, including those of blocks being recomputed.

    With remat "offload", the inputs of blocks do not count: they are in host memory.
    """

    def saved(**changes: Any) -> int:
        return _saved_bytes(partition, dataclasses.replace(config, **changes), work, dtype, masked)

    blocks, found = partition.config.blocks, saved()
    if config.remat_every > 1:
        found += saved(remat_every=1) // blocks * config.remat_every
    if config.remat != "none":
        found += saved(remat="none", remat_every=1) // blocks
    if config.remat == "offload":
        found -= _block_inputs_bytes(partition, config, work)
    return found


def _block_inputs_bytes(partition: ParamPartition, config: StepConfig, work: Workload) -> int:
    """Return the bytes of one example's tokens at the inputs of all blocks, which "offload" moves to the host."""
    return partition.config.blocks * work.tokens * partition.config.width * jnp.dtype(config.compute_dtype).itemsize


def _saved_bytes(partition: ParamPartition, config: StepConfig, work: Workload, dtype: Any, masked: bool) -> int:
    """Return the bytes that the backward pass saves for two examples minus those for one, so without the weights."""

    def backward(params: Params, frozen: Params, batch: TrainBatch) -> Any:
        def loss_of(params: Params):
            model = merge(partition.graphdef, cast_to_compute(frozen | params, config.compute_dtype))
            return loss_fn(model, batch, None, config)

        return jax.vjp(loss_of, params)[1]

    def of(examples: int) -> int:
        batch = abstract_batch(work, examples, partition.config, dtype, masked=masked, text_ids=partition.text_ids)
        return num_bytes(jax.eval_shape(backward, partition.params, partition.frozen, batch))

    return of(2) - of(1)


def _compiled_bytes(
    partition: ParamPartition,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    work: Workload,
    batch: TrainBatch,
    state: TrainState,
) -> int | None:
    """Return the bytes that the compiled step needs besides its arguments; None if the backend does not report it."""
    dtype, mesh = batch.latents_blc.dtype, current_mesh()
    empty = _abstract_text(work, 1, partition.config, dtype, partition.text_ids) if config.uncond_fraction else None
    shardings = rules.shardings(state, partition.params, mesh)
    moments = opt_state_shardings(optimizer, _float32_shapes(partition.params), mesh)
    shardings = shardings._replace(opt_state=moments)
    arguments = (state, partition.frozen, batch, empty)
    placement = (
        shardings,
        rules.shardings(partition.frozen, partition.frozen, mesh),
        jax.tree.map(lambda _: batch_sharding(mesh, work.batch), batch),
        jax.tree.map(lambda _: replicated(mesh), empty),
    )
    placed = jax.tree.map(lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own), arguments, placement)
    step = compile_step(partition.graphdef, optimizer, config, shardings=shardings)
    found = step.lower(*placed, work.accumulation).compile().memory_analysis()
    return found and found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


def num_bytes(tree: Any) -> int:
    """Return the total bytes of the arrays (or their shapes) in `tree`."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def check_memory(total: int, limit: float | None, device_kind: str) -> None:
    """Raise UserError if `total` bytes exceed the `limit` of a device (None: unknown)."""
    if limit is not None and total > limit:
        raise UserError(
            f"the run needs about {total / GIB:.1f} GiB of memory on each device, {device_kind} has "
            f"{limit / GIB:.1f} GiB; activation_checkpointing = true, a smaller micro_batch_size_per_gpu, an "
            "[adapter], an 8-bit optimizer or a larger fsdp in [mesh] need less"
        )


# the estimate -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Memory of a run's largest step, FLOPs of one example by workload, and training times at the quantiles.

    On several devices also the traffic of each device in a step, by tier, and the step time, by tier and device name.
    """

    memory: Memory
    flops: Mapping[Workload, Flops]
    times: Mapping[str, Sequence[float]]
    traffic: Mapping[str, Traffic]
    seconds: Mapping[tuple[str, str], Seconds]


def estimate(
    config: MainConfig,
    step_config: StepConfig,
    partition: ParamPartition,
    optimizer: optax.GradientTransformation,
    workloads: Sequence[Workload],
    *,
    sizes: Mapping[str, int] | None = None,
    device_specs: Sequence[DeviceSpec] = (),
    masked: bool = False,
    measure: bool | None = None,
) -> Estimate:
    """Estimate the memory, FLOPs and step time of a run; `partition` may contain shapes instead of arrays.

    `sizes` are the mesh sizes, by default those of the current mesh. Step times are computed for the `device_specs`
    with enough memory.
    """
    largest = max(workloads, key=lambda work: work.micro_batch * work.tokens)
    needed = memory(
        partition,
        optimizer,
        step_config,
        largest,
        jnp.dtype(config.cached_dtype),
        sizes=sizes,
        masked=masked,
        moments_on_host=optimizers.on_host(config.optimizer) and jax.default_backend() != "cpu",
        measure=measure,
    )
    flops_of = {work: example_flops(partition, step_config, work) for work in workloads}
    mesh, sent = sizes or current_mesh().shape, dict[Workload, Traffic]()
    if math.prod(mesh.values()) > 1:
        itemsize = jnp.dtype(step_config.compute_dtype).itemsize
        network = (partition.config, partition.params, partition.frozen)
        sent = {work: traffic(*network, mesh, work, remat=step_config.remat, itemsize=itemsize) for work in workloads}
    fitting = [spec for spec in device_specs if spec.memory >= needed.total]
    return Estimate(
        needed,
        flops_of,
        time_quantiles(step_config, workloads),
        {work.tier: one for work, one in sent.items()},
        {
            (work.tier, spec.name): step_seconds(spec, mesh, work, flops_of[work], one)
            for work, one in sent.items()
            for spec in fitting
        },
    )


def time_quantiles(config: StepConfig, workloads: Sequence[Workload]) -> dict[str, list[float]]:
    """Return the training times at the nine quantiles, by tier if they depend on the size, else as one row."""
    by_size = config.times.flux_shift and config.times.shift is None
    grids = {work.tier: work.grid for work in workloads} if by_size else {"all sizes": workloads[0].grid}
    uniform = jnp.array(QUANTILES)
    return {
        name: np.asarray(config.times.times(uniform, jnp.array([grid] * len(QUANTILES)))).tolist()
        for name, grid in grids.items()
    }
