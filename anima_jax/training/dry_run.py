"""--dry_run: tables of a run and of the memory, FLOPs and step time that it needs, computed from shapes alone."""

from collections.abc import Sequence

import jax

from anima_jax.data.dataset import TrainingData
from anima_jax.errors import UserError, did_you_mean
from anima_jax.parallel.devices import DEVICE_SPECS, DeviceSpec, device_bytes, find_device_spec, local_device_spec
from anima_jax.parallel.mesh import current_mesh, resolve_sizes
from anima_jax.text.tokenizers import Tokenizers
from anima_jax.training import estimate, tables
from anima_jax.training.run import Run
from anima_jax.training.state import ParamPartition, build_optimizer
from anima_jax.training.step import StepConfig


def dry_run(
    run: Run,
    partition: ParamPartition,
    data: TrainingData,
    tokenizers: Tokenizers,
    *,
    devices: int | None = None,
    device_kind: str | None = None,
) -> None:
    """Print the tables of a run of `partition` (shapes), on this machine or on `devices` devices of `device_kind`.

    Raises UserError if it does not fit the devices' memory.
    """
    config = run.config
    print(tables.start_up_table(config, partition, data.describe(tokenizers)))
    optimizer = build_optimizer(config, partition, data.plan)
    workloads = estimate.step_workloads(run, data, *data.text_rows(tokenizers))
    device_specs, memory, name = device_specs_of(devices, device_kind)
    sizes = resolve_sizes(config.mesh.sizes, devices) if devices else None
    found = estimate.estimate(
        config,
        StepConfig.of(config),
        partition,
        optimizer,
        workloads,
        sizes=sizes,
        device_specs=device_specs,
        masked=data.masked,
    )
    print(tables.mesh_table(sizes or current_mesh().shape, partition, config.learning_rates, name))
    print(tables.estimate_table(found))
    estimate.check_memory(found.memory.total, memory, name)


def device_specs_of(devices: int | None, device_kind: str | None) -> tuple[Sequence[DeviceSpec], float | None, str]:
    """Return the possible specs of the devices, the memory of each device in bytes (None: unknown), and their name.

    If a number of `devices` is given without a kind on a machine that has only a CPU, every known kind is possible.
    Raises UserError if `device_kind` is not known.
    """
    if device_kind:
        spec = find_device_spec(device_kind)
        if spec is None:
            known = [spec.name for spec in DEVICE_SPECS]
            near = did_you_mean(device_kind, known)
            raise UserError(f"--device_kind {device_kind}: expected one of {', '.join(known)}{near}")
        return [spec], spec.memory, spec.name
    device = jax.local_devices()[0]
    if devices and device.platform == "cpu":
        return DEVICE_SPECS, None, "of any kind; --device_kind names one"
    spec = local_device_spec(device)
    return [spec] if spec else [], device_bytes(device), device.device_kind
