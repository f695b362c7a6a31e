"""--dry_run --compile: the programs of a run, compiled for other devices, and the memory that they need.

The step of the largest tier is compiled, and the sampling program if the run draws samples. Encoders stay on the
devices beside both, and the state of training stays there while samples are drawn.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from anima_jax.config.main import MainConfig
from anima_jax.data.dataset import TrainingData
from anima_jax.models.parameters import cast_to_compute
from anima_jax.parallel import rules
from anima_jax.parallel.mesh import current_mesh, replicas, resolve_sizes
from anima_jax.parallel.topologies import Topology
from anima_jax.sampling.abstract import lowered_sampling
from anima_jax.sampling.control_networks import in_sampling_dtypes
from anima_jax.sampling.program import SHORT_CONTEXT
from anima_jax.sampling.request import SamplingParams
from anima_jax.training import aot, estimate
from anima_jax.training.control import PREFIX
from anima_jax.training.fit import RunVariant
from anima_jax.training.memory import abstract_batch, lowered_step, shapes_in
from anima_jax.training.run import Run
from anima_jax.training.state import ParamPartition, build_optimizer
from anima_jax.training.step import StepConfig


class CompiledRun(NamedTuple):
    """The compiled programs of a run by name, and the bytes that it needs on each device."""

    programs: dict[str, aot.CompiledProgram]
    total: int

    def lines(self) -> list[str]:
        """Return what the compiler says of each program."""
        return [
            line
            for name, program in self.programs.items()
            for line in (
                f"\n{name}, compiled for {program.topology.name} in {program.seconds:.0f} s",
                *aot.report(program),
            )
        ]


class RunCompiler:
    """Compiles the programs of a run, and of its variants, for a topology. `rows` are the text rows of `data`."""

    def __init__(self, run: Run, data: TrainingData, rows: tuple[int, int], topology: Topology):
        self._run, self._data, self._rows, self._topology = run, data, rows, topology

    def __call__(self, variant: RunVariant) -> CompiledRun:
        """Compile a variant of the run. Raises UserError if the compiler cannot, other than for want of memory."""
        config, partition = variant.config, variant.partition
        run, step_config = dataclasses.replace(self._run, config=config), StepConfig.of(config)
        workloads = estimate.step_workloads(run, self._data, *self._rows)
        work = max(workloads, key=lambda work: work.micro_batch * work.tokens)
        batch = abstract_batch(
            work,
            work.batch,
            partition.config,
            jnp.dtype(config.cached_dtype),
            masked=self._data.masked,
            text_ids=partition.text_ids,
        )
        resident = variant.found.rows["encoders"]
        with aot.on_topology(self._topology, resolve_sizes(config.mesh.sizes, self._topology.count)):
            optimizer = build_optimizer(config, partition, self._data.plan)
            step = aot.compile_for(self._topology, lambda: lowered_step(partition, optimizer, step_config, work, batch))
            programs, total = {f"the step of tier {work.tier}": step}, resident + step.memory.total
            if config.sample is not None:
                sampling = aot.compile_for(self._topology, lambda: lowered_samples(config, partition))
                programs["sampling"] = sampling
                own = sampling.memory.total - sampling.memory.arguments
                copies = 0 if sampling.memory.refused else copied_bytes(config, partition)
                total = max(total, resident + step.memory.arguments + copies + own)
        return CompiledRun(programs, total)


def lowered_samples(config: MainConfig, partition: ParamPartition) -> Any:
    """Return the program that draws the run's samples, `at_once` on a device, lowered for the current mesh."""
    sample = config.sample
    assert sample is not None
    mesh, dtype = current_mesh(), config.compute_dtype
    params = partition.frozen | shapes_in(partition.params, jnp.float32)
    shapes = jax.eval_shape(lambda given: cast_to_compute(given, dtype), params)
    placed = rules.placed(shapes, rules.shardings(shapes, shapes, mesh))
    # A token has at least one character, but for the one at the end.
    longest = max(map(len, (*sample.prompts, *sample.negative_prompts)))
    return lowered_sampling(
        placed,
        partition.graphdef,
        dtype,
        SamplingParams(sample.negative_prompts[0], **sample.sampling),
        config.sample_size_wh,
        min(len(sample.prompts), sample.at_once * replicas(mesh.shape)),
        short=longest < SHORT_CONTEXT,
        references=max(map(len, sample.references), default=0),
        control=partition.control if sample.control else None,
    )


def copied_bytes(config: MainConfig, partition: ParamPartition) -> int:
    """Return the bytes of the weights that are copied to draw samples, because they are stored in another dtype.

    A control network is copied as one of the transformer's parts and as the network that acts.
    """
    stored_in = config.param_dtype if config.ema_decay is None else jnp.float32
    stored = partition.frozen | shapes_in(partition.params, stored_in)
    parts = [(stored, cast_to_compute)]
    if partition.control and config.sample and config.sample.control:
        own = {path.removeprefix(PREFIX): leaf for path, leaf in stored.items() if path.startswith(PREFIX)}
        parts.append((own, in_sampling_dtypes))
    total = 0
    for params, cast in parts:
        shapes = jax.eval_shape(functools.partial(cast, dtype=config.compute_dtype), params)
        copies = {path: leaf for path, leaf in shapes.items() if leaf.dtype != params[path].dtype}
        total += rules.shard_bytes(copies, shapes, current_mesh().shape)
    return total
