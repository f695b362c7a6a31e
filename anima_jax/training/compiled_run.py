"""--dry_run --compile: the programs of a run, compiled for other devices, and the memory that they need.

The step of the largest tier is compiled, and the sampling program if the run draws samples. Encoders stay on the
devices beside both, and the state of training stays there while samples are drawn.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from anima_jax.data.dataset import TrainingData
from anima_jax.parallel.mesh import resolve_sizes
from anima_jax.parallel.topologies import Topology
from anima_jax.training import aot, estimate
from anima_jax.training.fit import RunVariant
from anima_jax.training.memory import abstract_batch, lowered_step
from anima_jax.training.run import Run
from anima_jax.training.state import build_optimizer
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
        with aot.on_topology(self._topology, resolve_sizes(config.mesh.sizes, self._topology.count)):
            optimizer = build_optimizer(config, partition, self._data.plan)
            step = aot.compile_for(self._topology, lambda: lowered_step(partition, optimizer, step_config, work, batch))
        resident = variant.found.rows["encoders"]
        return CompiledRun({f"the step of tier {work.tier}": step}, resident + step.memory.total)
