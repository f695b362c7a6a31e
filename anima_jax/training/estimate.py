"""Memory, FLOPs and step time of a run, estimated before anything is loaded. All numbers follow from shapes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from anima_jax.checkpoints.models import WAN_VAE, open_network
from anima_jax.config.main import MainConfig
from anima_jax.config.pairs import controls_of
from anima_jax.config.sizes import Size
from anima_jax.data.buckets import Bucketing
from anima_jax.data.dataset import TrainingData
from anima_jax.errors import UserError
from anima_jax.models.parameters import Params, split
from anima_jax.parallel import rules
from anima_jax.parallel.devices import DeviceSpec, local_device_spec
from anima_jax.parallel.mesh import current_mesh, replicas
from anima_jax.platform import hardware
from anima_jax.training import optimizers
from anima_jax.training.evaluate import QUANTILES
from anima_jax.training.flops import Flops, Workload, flops
from anima_jax.training.memory import Besides, Memory, memory, num_bytes, shapes_in
from anima_jax.training.run import Run
from anima_jax.training.scaling import Seconds, Traffic, step_seconds, traffic
from anima_jax.training.state import ParamPartition, blank_text_encoder, dit_config, prepare
from anima_jax.training.step import StepConfig

GIB = 2**30

Device = Any  # jax.Device, which type checkers do not accept as a class


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
    channels = run.config.control_channels
    return [
        Workload(
            *(tier.name, tier.batch_size, accumulation, tier.tokens),
            *(bucket.grid, source_rows, target_rows, tier.full, channels),
        )
        for tier, accumulation, bucket in zip(
            data.plan.tiers, run.accumulations(data), data.largest_buckets, strict=True
        )
    ]


def need(total: float, limit: float, device_name: str) -> str:
    """Return a sentence with the bytes that a run needs and that a device has."""
    has = f"{device_name} has {limit / GIB:.1f} GiB"
    return f"the run needs about {total / GIB:.1f} GiB of memory on each device, {has}"


def check_memory(total: float, limit: float | None, device_name: str, remedy: str) -> None:
    """Raise UserError, which ends with `remedy`, if `total` bytes exceed the `limit` of a device (None: unknown)."""
    if limit is not None and total > limit:
        raise UserError(f"{need(total, limit, device_name)}; {remedy}")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Memory of a run's largest step, FLOPs of one example by workload, and training times at the quantiles.

    `by_platform` is the memory on each platform of the devices that are compared. Also the step time, by workload and
    device, and on several devices the traffic of each device in a step, by tier.
    """

    memory: Memory
    by_platform: Mapping[str, Memory]
    flops: Mapping[Workload, Flops]
    times: Mapping[str, Sequence[float]]
    traffic: Mapping[str, Traffic]
    seconds: Mapping[tuple[Workload, DeviceSpec], Seconds]


def estimate(
    config: MainConfig,
    step_config: StepConfig,
    partition: ParamPartition,
    optimizer: optax.GradientTransformation,
    workloads: Sequence[Workload],
    *,
    sizes: Mapping[str, int] | None = None,
    device_specs: Sequence[DeviceSpec] = (),
    platform: str | None = None,
    masked: bool = False,
    measure: bool | None = None,
) -> Estimate:
    """Estimate the memory, FLOPs and step time of a run; `partition` may contain shapes instead of arrays.

    `sizes` are the mesh sizes, by default those of the current mesh. `platform` is that of the devices that the run is
    judged for, by default this machine's. Step times are computed for the `device_specs`, of any platforms.
    """
    platform = platform or hardware().platform
    mesh = sizes or current_mesh().shape
    by_platform = {
        each: run_memory(
            config,
            step_config,
            partition,
            optimizer,
            workloads,
            sizes=sizes,
            masked=masked,
            platform=each,
            measure=measure if each == platform else False,
        )
        for each in dict.fromkeys([platform, *(spec.platform for spec in device_specs)])
    }
    examples = {work: example_flops(partition, step_config, work) for work in workloads}
    sent = traffic_of(step_config, partition, workloads, mesh)
    return Estimate(
        by_platform[platform],
        by_platform,
        examples,
        time_quantiles(step_config, workloads),
        {work.tier: one for work, one in sent.items() if one.total},
        seconds_of(step_config, by_platform, examples, sent, mesh, device_specs, config.model.compute),
    )


def seconds_of(
    config: StepConfig,
    by_platform: Mapping[str, Memory],
    examples: Mapping[Workload, Flops],
    sent: Mapping[Workload, Traffic],
    sizes: Mapping[str, int],
    device_specs: Sequence[DeviceSpec],
    in_8_bits: str | None = None,
) -> dict[tuple[Workload, DeviceSpec], Seconds]:
    """Return the time of a step of each workload on a mesh of each kind of device.

    `by_platform` is the memory that a step needs, `examples` the FLOPs of an example, `sent` each device's traffic.
    `in_8_bits` is `[model] compute`.
    """
    found: dict[tuple[Workload, DeviceSpec], Seconds] = {}
    for work, example in examples.items():
        for spec in device_specs:
            needed = by_platform[spec.platform]
            found[work, spec] = step_seconds(
                spec,
                sizes,
                work,
                example,
                sent[work],
                dtype=config.compute_dtype,
                in_8_bits=in_8_bits,
                moved=state_bytes_moved(needed, work),
                on_host=needed.on_host,
            )
    return found


def traffic_of(
    config: StepConfig, partition: ParamPartition, workloads: Sequence[Workload], sizes: Mapping[str, int]
) -> dict[Workload, Traffic]:
    """Return what each device of a mesh sends in a step of each workload."""
    if math.prod(sizes.values()) == 1:
        return dict.fromkeys(workloads, Traffic(0, 0, 0, 0))
    network = (partition.config, partition.params, partition.frozen)
    itemsize = jnp.dtype(config.compute_dtype).itemsize
    remat = {"remat": config.remat, "remat_every": config.remat_every}
    return {work: traffic(*network, sizes, work, **remat, itemsize=itemsize) for work in workloads}


def run_memory(
    config: MainConfig,
    step_config: StepConfig,
    partition: ParamPartition,
    optimizer: optax.GradientTransformation,
    workloads: Sequence[Workload],
    *,
    platform: str,
    sizes: Mapping[str, int] | None = None,
    masked: bool = False,
    measure: bool | None = None,
) -> Memory:
    """Return the memory of the largest step of `workloads` on devices of `platform`, with all that the run needs."""
    return memory(
        partition,
        optimizer,
        step_config,
        max(workloads, key=lambda work: work.micro_batch * work.tokens),
        jnp.dtype(config.cached_dtype),
        sizes=sizes,
        masked=masked,
        besides=besides_of(config, sizes or current_mesh().shape, platform),
        measure=measure,
    )


def state_bytes_moved(needed: Memory, work: Workload) -> int:
    """Return the bytes that a step reads and writes besides activations: weights by each pass, the optimizer's state.

    Weights are read in the forward and backward pass and to recompute; parameters, moments and the average are read and
    written once, gradients written and read twice (for their norm).
    """
    rows = needed.rows
    weights = rows["frozen parameters"] + (rows.get("compute copies", 0) or rows["trained parameters"])
    updated = rows["trained parameters"] + rows["optimizer"] + rows["moving average"]
    return 3 * work.accumulation * weights + 2 * updated + 3 * rows["gradients"]


def besides_of(config: MainConfig, sizes: Mapping[str, int], platform: str) -> Besides:
    """Return what a run of this configuration needs besides its training step on a mesh of these sizes."""
    row = optimizers.find(config.optimizer.type)
    run, forward = Run(config, 1), 0
    for each in config.eval_datasets:
        for source in each.data.sources:
            frames = 1 + (len(controls_of(source)) if config.edit else 0)
            tokens = [run.eval_micro_batch(size) * size.tokens for size in Bucketing.of(source).sizes]
            forward = max(forward, frames * max(tokens))
    if config.sample:
        width, height = config.sample_size_wh
        guided = 1 if config.sample.guidance_scale == 1 else 2
        images = min(config.sample.at_once, -(-len(config.sample.prompts) // replicas(sizes)))
        frames = 1 + max(map(len, config.sample.references), default=0)
        forward = max(forward, guided * images * Size(width, height, 1).tokens * frames)
    return Besides(
        _encoder_bytes(config, sizes),
        forward,
        platform,
        together=row.shared,
        host_moments=optimizers.on_host(config.optimizer) and platform != "cpu",
    )


def _encoder_bytes(config: MainConfig, sizes: Mapping[str, int]) -> int:
    """Return the bytes of the encoders that stay on a device, to draw samples or to encode captions in every step."""
    cached = config.model.cache_text_embeddings or config.trains_text_encoder
    return 0 if config.sample is None and cached else _networks_bytes(config, tuple(sizes.items()))


def _networks_bytes(config: MainConfig, sizes: tuple[tuple[str, int], ...]) -> int:
    """Return the bytes of the text encoder, and of the VAE if samples are drawn, on a device of such a mesh."""
    found = 0
    if config.sample is not None:
        with open_network(WAN_VAE, config.model.vae_files, allow_unused=config.allow_unused) as vae:
            found = num_bytes(shapes_in(vae.abstract, config.compute_dtype))
    if config.trains_text_encoder:  # it is among the parameters
        return found
    text = jax.eval_shape(lambda: split(blank_text_encoder(config))[1])
    return found + rules.shard_bytes(text, text, dict(sizes))


def time_quantiles(config: StepConfig, workloads: Sequence[Workload]) -> dict[str, list[float]]:
    """Return the training times at the nine quantiles, by tier if they depend on the size, else as one row."""
    by_size = config.times.flux_shift and config.times.shift is None
    grids = {work.tier: work.grid for work in workloads} if by_size else {"all sizes": workloads[0].grid}
    uniform = jnp.array(QUANTILES)
    return {
        name: np.asarray(config.times.times(uniform, jnp.array([grid] * len(QUANTILES)))).tolist()
        for name, grid in grids.items()
    }
