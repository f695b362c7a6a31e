"""The plan of a run, made in a process of its own: `python -m anima_jax.serving.starting.planning TOML [KEY=VALUE …]`.

It prints a line of JSON: the devices of this machine, the keys with which the run fits them, and how long it takes.
Only this process touches the devices: a GPU's memory, and a TPU altogether, belong to one process at a time.
"""

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from anima_jax.checkpoints.hub import headers_only
from anima_jax.config.load import load_config
from anima_jax.config.main import MainConfig
from anima_jax.data.dataset import TrainingData, read_data
from anima_jax.data.problems import Problems
from anima_jax.errors import UserError, command_line
from anima_jax.parallel import devices
from anima_jax.parallel.mesh import make_mesh, replicas
from anima_jax.text.tokenizers import load_tokenizers
from anima_jax.training import command, estimate, fit, optimizers, tables
from anima_jax.training.dry_run import run_steps
from anima_jax.training.run import Run
from anima_jax.training.state import build_optimizer
from anima_jax.training.step import StepConfig
from anima_jax.training.target import Target, local_bytes

MODULE = __name__


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """The devices, and what a run needs and takes on them.

    `memory` are the bytes of a device (None: unknown), `needed` those that the run needs with `keys`, which replace
    keys of its TOML; `keys` is None if no setting fits. `reasons` says what keys do to the numbers of the run.
    `seconds` are the least and most of the whole run, `steps` is the number of its steps, `data` describes its data.
    """

    device: str
    platform: str
    devices: int
    memory: float | None
    needed: float
    keys: dict[str, Any] | None
    reasons: list[str]
    seconds: tuple[float, float]
    steps: int
    data: str


def plan_run(path: str, overrides: Sequence[str] = ()) -> RunPlan:
    """Return the plan of the run that the TOML at `path` describes, with keys replaced, on this machine's devices.

    The examples of a step stay about as many on several devices. Raises UserError as a dry run does.
    """

    def load(more: Sequence[str] = ()) -> MainConfig:
        return load_config(path, [*overrides, *given, *more], check_optimizer=optimizers.check)

    given: list[str] = []
    config = load()
    mesh = make_mesh(config.mesh.sizes)
    copies = replicas(mesh.shape)
    spread: dict[str, Any] = {}
    if copies > 1 and isinstance(config.micro_batch_size_per_gpu, int):
        spread = {"micro_batch_size_per_gpu": max(1, config.micro_batch_size_per_gpu // copies)}
        given = fit.overrides_of(spread)
        config = load()
    with headers_only(), jax.set_mesh(mesh):
        run = Run(config, copies)
        data = read_data(config, Problems(), batch_size_of=run.global_batch, keep=False)
        tokenizers = load_tokenizers(config.model.tokenizers)
        rows, partition = data.text_rows(tokenizers), estimate.abstract_partition(config)
        device = jax.local_devices()[0]
        spec = devices.local_device_spec(device) or _measured(device, config.compute_dtype)
        target = Target(None, [spec], local_bytes(), device.device_kind, named=False)
        variants = fit.RunVariants(
            run, partition, data, rows, load, devices=math.prod(mesh.shape.values()), platform=device.platform
        )
        keys: fit.Keys | None = fit.float16_keys(config, target)
        if target.memory is not None:
            keys = fit.fitting_keys(variants, target.memory, given=keys)
        variant = variants.of(keys or {})
        assert variant is not None
        return RunPlan(
            device=device.device_kind,
            platform=device.platform,
            devices=jax.device_count(),
            memory=target.memory,
            needed=variant.found.total,
            keys=None if keys is None else {**spread, **keys},
            reasons=fit.changes(keys or {}),
            seconds=_seconds(run, variant, data, rows, target),
            steps=sum(run_steps(config, data).values()),
            data=data.describe(tokenizers),
        )


def _seconds(
    run: Run, variant: fit.RunVariant, data: TrainingData, rows: tuple[int, int], target: Target
) -> tuple[float, float]:
    """Return the least and most seconds of the whole run with the variant's settings."""
    config = variant.config
    run = dataclasses.replace(run, config=config)
    found = estimate.estimate(
        config,
        StepConfig.of(config),
        variant.partition,
        build_optimizer(config, variant.partition, data.plan),
        estimate.step_workloads(run, data, *rows),
        device_specs=target.specs,
        platform=target.platform,
        masked=data.masked,
        measure=False,
    )
    least, most, _ = tables.run_time(found, run_steps(config, data), target.specs[0])
    return least, most


def _measured(device: Any, dtype: Any) -> devices.DeviceSpec:
    """Return the specification of an unknown device: its speed in a matrix product, and that of its memory."""
    side, size = 1024, 2**24
    square = jnp.ones((side, side), dtype)
    vector = jnp.ones(size, jnp.float32)
    flops = 2 * side**3 / _fastest(jax.jit(jnp.dot), square, square)
    bandwidth = 3 * 4 * size / _fastest(jax.jit(jnp.add), vector, vector)
    speed = (flops, flops, local_bytes() or 0.0, bandwidth, bandwidth, 1, bandwidth)
    return devices.DeviceSpec(device.device_kind, *speed, platform=device.platform)


def _fastest(function: Any, *arguments: Any, times: int = 3) -> float:
    """Return the seconds of the fastest of several calls, after one that compiles."""
    found = []
    jax.block_until_ready(function(*arguments))
    for _ in range(times):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        found.append(time.perf_counter() - start)
    return min(found)


@command_line
def main() -> None:
    """Print the plan of the TOML and the keys on the command line as JSON."""
    if len(sys.argv) < 2:
        raise UserError("expected the path of a TOML")
    command.log_to_console()
    devices.use_device_memory()
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the plan
        plan = plan_run(sys.argv[1], sys.argv[2:])
    print(json.dumps(dataclasses.asdict(plan)))


if __name__ == "__main__":
    main()
