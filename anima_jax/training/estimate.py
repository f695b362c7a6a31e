"""What a run will take, known before anything is loaded: bytes on the device, FLOPs a step, and the times it draws.

Everything is computed from shapes. Bytes are counted from what the backward pass keeps, or, where the back end's own
analysis means something, are those of the compiled program. (XLA's on a CPU is not an accelerator's: it holds 16-bit
weights in float32.)
Axes: b batch, l image tokens, n source and m target text tokens, d features.
"""

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from anima_jax.config.main import MainConfig
from anima_jax.config.network import NetworkSizes
from anima_jax.data.dataset import TrainingData
from anima_jax.diffusion.objective import PIXELS
from anima_jax.errors import UserError
from anima_jax.models.dit import OUT_CHANNELS, DiTConfig
from anima_jax.models.llm_adapter import Text
from anima_jax.models.parameters import Params, cast_to_compute, merge
from anima_jax.parallel import rules
from anima_jax.parallel.devices import DeviceSpec, local_device_spec
from anima_jax.parallel.mesh import batch_sharding, current_mesh, replicas, replicated
from anima_jax.training.evaluate import QUANTILES
from anima_jax.training.flops import Flops, Workload, flops
from anima_jax.training.run import Run
from anima_jax.training.scaling import Seconds, Traffic, step_seconds, traffic
from anima_jax.training.state import ParamPartition, blank_text_encoder, dit_config, prepare
from anima_jax.training.step import StepConfig, TrainBatch, compile_step, init_state, loss_fn, opt_state_shardings

GIB = 2**30

Device = Any  # jax.Device, which type checkers do not take for a class

WORKSPACE = 64 * 2**20
"""Bytes that a block of attention takes whatever the sizes: scores, weights and both their gradients, 16 MiB each."""


def peak_flops(devices: Sequence[Device], dtype: Any) -> float | None:
    """FLOPs a second that these can do at most; None for an unknown kind, or for a dtype of more than 16 bits."""
    kind = local_device_spec(devices[0])
    return None if kind is None or jnp.dtype(dtype).itemsize > 2 else len(devices) * kind.flops


def abstract_trained(config: MainConfig) -> ParamPartition:
    """What `prepare` would give, with shapes in place of arrays: of a file the header alone is read."""
    sizes = NetworkSizes.model_validate(dataclasses.asdict(dit_config(config)))
    model = config.model.model_copy(update={"transformer_path": None, "llm_adapter_path": None, "config": sizes})
    prepared, mesh = list[ParamPartition](), current_mesh()

    def arrays() -> tuple[Params, Params]:
        with jax.disable_jit():  # a jit with options for its compiler cannot be traced
            abstract = config.model_copy(update={"model": model})
            prepared.append(prepare(abstract, lambda: blank_text_encoder(config), mesh))
        return prepared[0].params, prepared[0].frozen

    params, frozen = jax.eval_shape(arrays)
    return dataclasses.replace(prepared[0], params=params, frozen=frozen)


# The work of a step


def trained_flops(trained: ParamPartition, settings: StepConfig, work: Workload) -> Flops:
    """FLOPs of one example of `work` in this run."""
    return flops(trained.config, trained.params, work, settings.remat, settings.remat_every, trained.frozen)


def step_workloads(run: Run, data: TrainingData, source_rows: int, target_rows: int) -> list[Workload]:
    """The work of each tier of a plan; captions are padded to these rows."""
    return [
        Workload(tier.name, tier.batch_size, accumulation, tier.tokens, size.grid, source_rows, target_rows)
        for tier, accumulation, size in zip(data.plan.tiers, run.accumulations(data), data.largest_sizes, strict=True)
    ]


def abstract_batch(
    work: Workload, size: int, config: DiTConfig, dtype: Any, *, masked: bool = False, text_ids: bool = False
) -> TrainBatch:
    """Shapes of `size` examples; latents and text states in `dtype`. With `text_ids`, ids stand for text states."""

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


# Bytes


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device by what they are for, and those that wait in its host's memory.

    `measured` says that the activations are those of the compiled program.
    """

    rows: Mapping[str, int]
    on_host: Mapping[str, int]
    measured: bool = False

    @property
    def total(self) -> int:
        """Bytes on a device."""
        return sum(self.rows.values())


def memory(
    trained: ParamPartition,
    optimizer: optax.GradientTransformation,
    settings: StepConfig,
    work: Workload,
    dtype: Any,
    *,
    sizes: Mapping[str, int] | None = None,
    masked: bool = False,
    moments_on_host: bool = False,
    measure: bool | None = None,
) -> Memory:
    """Bytes of a run whose largest step is `work`. `trained` may hold shapes; `dtype` is that of cached examples.

    `sizes` are those of the mesh, by default of the one that is set. `measure` compiles the step for this back end and
    the mesh that is set, to be exact; unset, where that back end is no CPU.
    """
    mesh = current_mesh()
    measure = measure if measure is not None else sizes is None and jax.default_backend() != "cpu"
    sizes = sizes or mesh.shape
    state = jax.eval_shape(lambda params: init_state(params, optimizer, settings, mesh), trained.params)
    batch = abstract_batch(work, work.batch, trained.config, dtype, masked=masked, text_ids=trained.text_ids)
    held = functools.partial(rules.shard_bytes, params=trained.params, sizes=sizes)
    moments, on_host = held(state.opt_state), {}
    gradients = held({path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for path, leaf in trained.params.items()})
    examples = -(-work.micro_batch // replicas(sizes))
    rows = {
        "trained parameters": held(state.params),
        "frozen parameters": rules.shard_bytes(trained.frozen, trained.frozen, sizes),
        "gradients": gradients,
        "optimizer": 0 if moments_on_host else moments,
        "moving average": 0 if state.ema is None else held(state.ema),
        "a batch": num_bytes(batch) // replicas(sizes),
    }
    inputs = _block_inputs_bytes(trained, settings, work) // sizes["context"]
    if moments_on_host:
        on_host["optimizer"] = moments
    if settings.remat == "offload":
        on_host["inputs of blocks"] = examples * inputs
    if measure and (temporary := _compiled_bytes(trained, optimizer, settings, work, batch, state)) is not None:
        return Memory(rows | {"activations": max(0, temporary - gradients)}, on_host, measured=True)
    if work.accumulation > 1:
        rows["gradients"] *= 2  # the sum so far, and a micro-batch's own
    copies = jax.eval_shape(lambda params: cast_to_compute(params, settings.compute_dtype), state.params)
    rows["compute copies"] = held(
        {path: copy for path, copy in copies.items() if copy.dtype != state.params[path].dtype}
    )
    if sizes["fsdp"] > 1:
        rows["gathered weights"] = _gathered_bytes(trained, settings, sizes)
    kept = activation_bytes(trained, settings, work, dtype, masked=masked) // sizes["context"]
    # Between blocks every device of the tensor axis has all features, inside them its part.
    between = 0 if settings.remat == "offload" else min(kept, inputs)
    rows["activations"] = WORKSPACE + examples * (between + (kept - between) // sizes["tensor"])
    return Memory(rows, on_host)


def _gathered_bytes(trained: ParamPartition, settings: StepConfig, sizes: Mapping[str, int]) -> int:
    """Bytes of two blocks' weights, whole but for `tensor`: the one that is computed and the one that comes next."""
    weights: Params = {**trained.frozen, **trained.params}
    block = {
        path: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), settings.compute_dtype)
        for path, leaf in weights.items()
        if path.startswith("blocks.")
    }
    return 2 * rules.shard_bytes(block, block, {**sizes, "fsdp": 1})


def activation_bytes(
    trained: ParamPartition, settings: StepConfig, work: Workload, dtype: Any, *, masked: bool = False
) -> int:
    """Bytes that the backward pass keeps of one example, and of the blocks that it computes again at a time."""

    def kept(**changes: Any) -> int:
        return _kept_bytes(trained, dataclasses.replace(settings, **changes), work, dtype, masked)

    blocks, found = trained.config.blocks, kept()
    if settings.remat_every > 1:
        found += kept(remat_every=1) // blocks * settings.remat_every
    if settings.remat != "none":
        found += kept(remat="none", remat_every=1) // blocks
    if settings.remat == "offload":
        found -= _block_inputs_bytes(trained, settings, work)
    return found


def _block_inputs_bytes(trained: ParamPartition, settings: StepConfig, work: Workload) -> int:
    """Bytes of one example's tokens before each block, which "offload" moves to the host."""
    return trained.config.blocks * work.tokens * trained.config.width * jnp.dtype(settings.compute_dtype).itemsize


def _kept_bytes(trained: ParamPartition, settings: StepConfig, work: Workload, dtype: Any, masked: bool) -> int:
    """What the backward pass keeps of one example: what two examples keep beyond one, which leaves out the weights."""

    def backward(params: Params, frozen: Params, batch: TrainBatch) -> Any:
        def loss_of(params: Params):
            model = merge(trained.graphdef, cast_to_compute(frozen | params, settings.compute_dtype))
            return loss_fn(model, batch, None, settings)

        return jax.vjp(loss_of, params)[1]

    shapes = (
        jax.eval_shape(
            backward,
            trained.params,
            trained.frozen,
            abstract_batch(work, size, trained.config, dtype, masked=masked, text_ids=trained.text_ids),
        )
        for size in (1, 2)
    )
    one, two = map(num_bytes, shapes)
    return two - one


def _compiled_bytes(trained, optimizer, settings, work, batch, state) -> int | None:
    """Bytes that the compiled step needs on a device beside its arguments; None if the back end does not say."""
    dtype, mesh = batch.latents_blc.dtype, current_mesh()
    unconditional = (
        _abstract_text(work, 1, trained.config, dtype, trained.text_ids) if settings.uncond_fraction else None
    )

    def placed(tree: Any, places: Any) -> Any:
        return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)

    wide = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for path, leaf in trained.params.items()}
    places = rules.shardings(state, trained.params, mesh)
    places = places._replace(opt_state=opt_state_shardings(optimizer, wide, mesh))
    step = compile_step(trained.graphdef, optimizer, settings, shardings=places)
    arguments = (
        placed(state, places),
        placed(trained.frozen, rules.shardings(trained.frozen, trained.frozen, mesh)),
        placed(batch, jax.tree.map(lambda _: batch_sharding(mesh, work.batch), batch)),
        placed(unconditional, jax.tree.map(lambda _: replicated(mesh), unconditional)),
    )
    found = step.lower(*arguments, work.accumulation).compile().memory_analysis()
    if found is None:
        return None
    return found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


def num_bytes(tree: Any) -> int:
    """Bytes of the arrays, or shapes of arrays, in `tree`."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def device_bytes(device: Device) -> int | None:
    """Memory that a program may take on the device; on a CPU this machine's, or its container's. None if unknown."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # control groups, versions 2 and 1
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(pathlib.Path("/sys/fs/cgroup", name).read_text()))
    return min(limits)


def check_memory(total: int, limit: float | None, device_kind: str) -> None:
    """Raise UserError if `total` bytes are more than the `limit` of a device (None: not known)."""
    if limit is not None and total > limit:
        raise UserError(
            f"the run needs about {total / GIB:.1f} GiB of memory on each device, {device_kind} has "
            f"{limit / GIB:.1f} GiB; activation_checkpointing = true, a smaller micro_batch_size_per_gpu, an "
            "[adapter], an optimizer of 8 bits or a larger fsdp in [mesh] need less"
        )


# For a person


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a run will take: memory (of its largest step), each tier's work, and the quantiles of its times.

    On several devices also what each of them sends in a step of each tier, and how long that step should take on each
    kind of device, by tier and kind.
    """

    memory: Memory
    flops: Mapping[Workload, Flops]
    times: Mapping[str, Sequence[float]]
    traffic: Mapping[str, Traffic]
    seconds: Mapping[tuple[str, str], Seconds]

    def __str__(self) -> str:
        lines = [f"{'memory of a device':<22} {'GiB':>10}"]
        lines += [f"{name:<22} {size / GIB:>10.3f}" for name, size in self.memory.rows.items() if size]
        origin = "as compiled" if self.memory.measured else "counted from shapes"
        lines.append(f"{'total':<22} {self.memory.total / GIB:>10.3f}  ({origin})")
        lines += [f"{name:<22} {size / GIB:>10.3f}  (host)" for name, size in self.memory.on_host.items()]
        lines.append("")
        lines.append(f"{'TFLOPs a step':<22} {'forward':>10} {'backward':>10} {'recomputed':>10} {'all':>10}")
        for work, one in self.flops.items():
            parts = [work.batch * part / 1e12 for part in one]
            lines.append(f"{work.tier:<22} " + " ".join(f"{part:>10.4g}" for part in [*parts, sum(parts)]))
        if self.traffic:
            heads = [f"{axis:>10}" for axis in (*Traffic._fields, "all")]
            lines += ["", f"{'GB sent by a device':<22} {' '.join(heads)}"]
            for tier, sent in self.traffic.items():
                lines.append(f"{tier:<22} " + " ".join(f"{size / 1e9:>10.3f}" for size in [*sent, sent.total]))
        for (tier, kind), each in self.seconds.items():
            parts = ", ".join(f"{name} {value:.3g}" for name, value in each._asdict().items() if value)
            lines.append(
                f"{tier}: {each.least:.3g} to {each.most:.3g} s a step on {kind} (seconds of {parts}; see "
                "docs/scaling.md)"
            )
        lines += ["", "t at quantile          " + " ".join(f"{q:>5.1f}" for q in QUANTILES)]
        lines += [f"{name:<22} " + " ".join(f"{t:>5.3f}" for t in times) for name, times in self.times.items()]
        return "\n".join(lines)


def estimate(
    config: MainConfig,
    settings: StepConfig,
    trained: ParamPartition,
    optimizer: optax.GradientTransformation,
    tiers: Sequence[Workload],
    *,
    sizes: Mapping[str, int] | None = None,
    kinds: Sequence[DeviceSpec] = (),
    masked: bool = False,
    measure: bool | None = None,
) -> Estimate:
    """What the run will take; `trained` may hold shapes instead of arrays.

    `sizes` are those of a mesh that need not be here, by default of the one that is set; `kinds` are what its devices
    may be: those that have the memory are timed.
    """
    largest = max(tiers, key=lambda work: work.micro_batch * work.tokens)
    on_host = config.optimizer.type == "offload" and jax.default_backend() != "cpu"
    dtype, options = jnp.dtype(config.cached_dtype), {"masked": masked, "moments_on_host": on_host, "measure": measure}
    counted = {work: trained_flops(trained, settings, work) for work in tiers}
    mesh, sent = sizes or current_mesh().shape, {}
    if math.prod(mesh.values()) > 1:
        weights, itemsize = (trained.config, trained.params, trained.frozen), jnp.dtype(settings.compute_dtype).itemsize
        sent = {work: traffic(*weights, mesh, work, remat=settings.remat, itemsize=itemsize) for work in tiers}
    held = memory(trained, optimizer, settings, largest, dtype, sizes=sizes, **options)
    return Estimate(
        held,
        counted,
        time_quantiles(settings, tiers),
        {work.tier: each for work, each in sent.items()},
        {
            (work.tier, kind.name): step_seconds(kind, mesh, work, counted[work], each)
            for work, each in sent.items()
            for kind in kinds
            if kind.memory >= held.total
        },
    )


def time_quantiles(settings: StepConfig, tiers: Sequence[Workload]) -> dict[str, list[float]]:
    """Training times at the nine quantiles; for each tier where they depend on the size."""
    by_size = settings.times.flux_shift and settings.times.shift is None
    shown = {work.tier: work.grid for work in tiers} if by_size else {"every size": tiers[0].grid}
    uniform = jnp.array(QUANTILES)
    return {
        name: np.asarray(settings.times.times(uniform, jnp.array([grid] * len(QUANTILES)))).tolist()
        for name, grid in shown.items()
    }
