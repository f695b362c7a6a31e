"""What a run will take, known before anything is loaded: bytes on the device, FLOPs a step, and the times it draws.

Everything is computed from shapes. Bytes are counted from what the backward pass keeps, or, where the back end's own
analysis means something, are those of the compiled program. (XLA's on a CPU is not an accelerator's: it holds 16-bit
weights in float32.)
Axes: b batch, l image tokens, n source and m target text tokens, d features.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from anima_jax.config.main import MainConfig
from anima_jax.config.network import NetworkSizes
from anima_jax.diffusion.objective import PIXELS
from anima_jax.errors import UserError
from anima_jax.models.dit import OUT_CHANNELS, DiTConfig
from anima_jax.models.llm_adapter import Text
from anima_jax.models.parameters import Params, compute_copy, merge
from anima_jax.training.data import TrainingData
from anima_jax.training.evaluate import QUANTILES
from anima_jax.training.flops import Flops, Work, flops
from anima_jax.training.state import Trained, blank_text_encoder, dit_config, prepare
from anima_jax.training.step import Batch, StepConfig, batch_loss, compile_step, init_state

GIB = 2**30

Device = Any  # jax.Device, which type checkers do not take for a class

PEAK_FLOPS = (
    (r"B200|GB200", 2250e12),
    (r"H100 PCIe", 756e12),
    (r"H100|H200|GH200", 989e12),
    (r"A100|A800", 312e12),
    (r"L40S", 362e12),
    (r"\bL4\b", 121e12),
    (r"RTX 5090", 209.5e12),
    (r"RTX 4090", 165.2e12),
    (r"RTX 3090", 71e12),
    (r"TPU7x", 2307e12),
    (r"TPU v6", 918e12),
    (r"TPU v5p|TPU v5$", 459e12),
    (r"TPU v5", 197e12),
    (r"TPU v4", 275e12),
    (r"TPU v3", 61.5e12),
    (r"TPU v2", 22.5e12),
)
"""Dense 16-bit FLOPs a second with float32 sums, from the makers' data sheets, by `device_kind`: the first that fits.

A device of JAX is one core on TPU v2 and v3, half a chip.
"""

WORKSPACE = 64 * 2**20
"""Bytes that a block of attention takes whatever the sizes: scores, weights and both their gradients, 16 MiB each."""


def peak_flops(device: Device, dtype: Any) -> float | None:
    """FLOPs a second that this device can do at most; None for an unknown one, or for a dtype of more than 16 bits."""
    if jnp.dtype(dtype).itemsize > 2:
        return None
    return next((peak for kind, peak in PEAK_FLOPS if re.search(kind, device.device_kind)), None)


def abstract_trained(config: MainConfig) -> Trained:
    """What `prepare` would give, with shapes in place of arrays: of a file the header alone is read."""
    sizes = NetworkSizes.model_validate(dataclasses.asdict(dit_config(config)))
    model = config.model.model_copy(update={"transformer_path": None, "llm_adapter_path": None, "config": sizes})
    prepared: list[Trained] = []

    def arrays() -> tuple[Params, Params]:
        with jax.disable_jit():  # a jit with options for its compiler cannot be traced
            abstract = config.model_copy(update={"model": model})
            prepared.append(prepare(abstract, lambda: blank_text_encoder(config)))
        return prepared[0].params, prepared[0].frozen

    params, frozen = jax.eval_shape(arrays)
    return dataclasses.replace(prepared[0], params=params, frozen=frozen)


# The work of a step


def trained_flops(trained: Trained, settings: StepConfig, work: Work) -> Flops:
    """FLOPs of one example of `work` in this run."""
    return flops(trained.config, trained.params, work, settings.remat, settings.remat_every, trained.frozen)


def works(data: TrainingData, source_rows: int, target_rows: int) -> list[Work]:
    """The work of each tier of a plan; captions are padded to these rows."""
    found = []
    for tier, accumulation in zip(data.plan.tiers, data.accumulations, strict=True):
        sizes = (data.examples[index].bucket.size for index in tier.indices)
        grid = max(sizes, key=lambda size: size.tokens).grid
        found.append(Work(tier.name, tier.batch_size, accumulation, tier.tokens, grid, source_rows, target_rows))
    return found


def abstract_batch(
    work: Work, size: int, config: DiTConfig, dtype: Any, *, masked: bool = False, text_ids: bool = False
) -> Batch:
    """Shapes of `size` examples; latents and text states in `dtype`. With `text_ids`, ids stand for text states."""

    def shape(dtype: Any, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct((size, *sizes), dtype)

    return Batch(
        latents_blc=shape(dtype, work.tokens, PIXELS * OUT_CHANNELS),
        grid_b3=shape(jnp.int32, 3),
        ids_b2=shape(jnp.uint32, 2),
        epochs_b=shape(jnp.int32),
        text=_abstract_text(work, size, config, dtype, text_ids),
        mask_blp=shape(jnp.float32, work.tokens, PIXELS) if masked else None,
    )


def _abstract_text(work: Work, size: int, config: DiTConfig, dtype: Any, ids: bool) -> Text:
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
    """Bytes on the device by what they are for, and those that wait in the host's memory.

    `measured` says that the activations are those of the compiled program.
    """

    rows: Mapping[str, int]
    on_host: Mapping[str, int]
    measured: bool = False

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.rows.values())


def memory(
    trained: Trained,
    optimizer: optax.GradientTransformation,
    settings: StepConfig,
    work: Work,
    dtype: Any,
    *,
    masked: bool = False,
    moments_on_host: bool = False,
    measure: bool | None = None,
) -> Memory:
    """Bytes of a run whose largest step is `work`. `trained` may hold shapes; `dtype` is that of cached examples.

    `measure` compiles the step for this back end, to be exact; unset, where that back end is no CPU.
    """
    state = jax.eval_shape(lambda params: init_state(params, optimizer, settings), trained.params)
    batch = abstract_batch(work, work.batch, trained.config, dtype, masked=masked, text_ids=trained.text_ids)
    moments, on_host = num_bytes(state.opt_state), {}
    rows = {
        "trained parameters": num_bytes(state.params),
        "frozen parameters": num_bytes(trained.frozen),
        "gradients": 4 * sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "optimizer": 0 if moments_on_host else moments,
        "moving average": num_bytes(state.ema),
        "a batch": num_bytes(batch),
    }
    if moments_on_host:
        on_host["optimizer"] = moments
    if settings.remat == "offload":
        on_host["inputs of blocks"] = work.micro_batch * _block_inputs_bytes(trained, settings, work)
    if measure is None:
        measure = jax.default_backend() != "cpu"
    if measure and (temporary := _compiled_bytes(trained, optimizer, settings, work, batch, state)) is not None:
        return Memory(rows | {"activations": max(0, temporary - rows["gradients"])}, on_host, measured=True)
    if work.accumulation > 1:
        rows["gradients"] *= 2  # the sum so far, and a micro-batch's own
    copies = jax.eval_shape(lambda params: compute_copy(params, settings.compute_dtype), state.params)
    rows["compute copies"] = sum(
        num_bytes(copy) for path, copy in copies.items() if copy.dtype != state.params[path].dtype
    )
    kept = activation_bytes(trained, settings, work, dtype, masked=masked)
    rows["activations"] = WORKSPACE + work.micro_batch * kept
    return Memory(rows, on_host)


def activation_bytes(trained: Trained, settings: StepConfig, work: Work, dtype: Any, *, masked: bool = False) -> int:
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


def _block_inputs_bytes(trained: Trained, settings: StepConfig, work: Work) -> int:
    """Bytes of one example's tokens before each block, which "offload" moves to the host."""
    return trained.config.blocks * work.tokens * trained.config.width * jnp.dtype(settings.compute_dtype).itemsize


def _kept_bytes(trained: Trained, settings: StepConfig, work: Work, dtype: Any, masked: bool) -> int:
    """What the backward pass keeps of one example: what two examples keep beyond one, which leaves out the weights."""

    def backward(params: Params, frozen: Params, batch: Batch) -> Any:
        def loss_of(params: Params):
            model = merge(trained.graphdef, compute_copy(frozen | params, settings.compute_dtype))
            return batch_loss(model, batch, None, settings)

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
    """Bytes that the compiled step needs beside its arguments; None if the back end does not say."""
    dtype = batch.latents_blc.dtype
    unconditional = (
        _abstract_text(work, 1, trained.config, dtype, trained.text_ids) if settings.uncond_fraction else None
    )
    step = compile_step(trained.graphdef, optimizer, settings)
    found = step.lower(state, trained.frozen, batch, unconditional, work.accumulation).compile().memory_analysis()
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


def check_memory(total: int, device: Device) -> None:
    """Raise UserError if `total` bytes are more than the device has."""
    limit = device_bytes(device)
    if limit is not None and total > limit:
        raise UserError(
            f"the run needs about {total / GIB:.1f} GiB of memory, {device.device_kind} has {limit / GIB:.1f} GiB; "
            "activation_checkpointing = true, a smaller micro_batch_size_per_gpu, an [adapter] or "
            "an optimizer of 8 bits need less"
        )


# For a person


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a run will take: memory (of its largest step), each tier's work, and the quantiles of its times."""

    memory: Memory
    flops: Mapping[Work, Flops]
    times: Mapping[str, Sequence[float]]

    def __str__(self) -> str:
        lines = [f"{'memory':<22} {'GiB':>10}"]
        lines += [f"{name:<22} {size / GIB:>10.3f}" for name, size in self.memory.rows.items() if size]
        origin = "as compiled" if self.memory.measured else "counted from shapes"
        lines.append(f"{'total':<22} {self.memory.total / GIB:>10.3f}  ({origin})")
        lines += [f"{name:<22} {size / GIB:>10.3f}  (host)" for name, size in self.memory.on_host.items()]
        lines.append("")
        lines.append(f"{'TFLOPs a step':<22} {'forward':>10} {'backward':>10} {'recomputed':>10} {'all':>10}")
        for work, one in self.flops.items():
            parts = [work.batch * part / 1e12 for part in one]
            lines.append(f"{work.tier:<22} " + " ".join(f"{part:>10.4g}" for part in [*parts, sum(parts)]))
        lines += ["", "t at quantile          " + " ".join(f"{q:>5.1f}" for q in QUANTILES)]
        lines += [f"{name:<22} " + " ".join(f"{t:>5.3f}" for t in times) for name, times in self.times.items()]
        return "\n".join(lines)


def estimate(
    config: MainConfig,
    settings: StepConfig,
    trained: Trained,
    optimizer: optax.GradientTransformation,
    tiers: Sequence[Work],
    *,
    masked: bool = False,
    measure: bool | None = None,
) -> Estimate:
    """What the run will take; `trained` may hold shapes instead of arrays."""
    largest = max(tiers, key=lambda work: work.micro_batch * work.tokens)
    on_host = config.optimizer.type == "offload" and jax.default_backend() != "cpu"
    dtype, options = jnp.dtype(config.cached_dtype), {"masked": masked, "moments_on_host": on_host, "measure": measure}
    return Estimate(
        memory(trained, optimizer, settings, largest, dtype, **options),
        {work: trained_flops(trained, settings, work) for work in tiers},
        time_quantiles(settings, tiers),
    )


def time_quantiles(settings: StepConfig, tiers: Sequence[Work]) -> dict[str, list[float]]:
    """Training times at the nine quantiles; for each tier where they depend on the size."""
    by_size = settings.times.flux_shift and settings.times.shift is None
    shown = {work.tier: work.grid for work in tiers} if by_size else {"every size": tiers[0].grid}
    uniform = jnp.array(QUANTILES)
    return {
        name: np.asarray(settings.times.times(uniform, jnp.array([grid] * len(QUANTILES)))).tolist()
        for name, grid in shown.items()
    }
