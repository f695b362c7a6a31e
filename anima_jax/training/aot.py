"""The programs of a run, compiled for devices that are not in this machine, and what the compilers say of them.

Nothing runs. Memory is exact. Times are XLA's static estimate, which only its compiler for TPUs makes: it leaves out
attention kernels, whose time here follows from their FLOPs, and waiting for other devices.
"""

import collections
import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from anima_jax.errors import UserError
from anima_jax.parallel.mesh import make_mesh
from anima_jax.parallel.topologies import Topology
from anima_jax.platform import compiling_for
from anima_jax.training.estimate import GIB
from anima_jax.training.hlo import Collective, Program, collectives
from anima_jax.training.hlo_costs import Cost, InstructionCost, by_source, rows_of

CLOCKS = {
    "TPU v2": 0.7e9,
    "TPU v3": 0.94e9,
    "TPU v4": 1.05e9,
    "TPU v5e": 1.5e9,
    "TPU v5p": 1.75e9,
    "TPU v6e": 1.75e9,
}
"""Cycles per second: the peak FLOP/s divided by those of the matrix units in a cycle."""

KERNEL_RATE = 0.6
"""Fraction of the peak FLOP/s at which attention kernels are assumed to run."""


@dataclasses.dataclass(frozen=True)
class CompiledMemory:
    """Bytes of a compiled program on each device, and in host memory per device.

    `outputs` are those that do not take the place of an argument. A program that does not fit a TPU has no other
    figure than `total`: the compiler gives up.
    """

    arguments: int = 0
    outputs: int = 0
    temporaries: int = 0
    code: int = 0
    on_host: int = 0
    refused: int = 0

    @property
    def total(self) -> int:
        """Bytes on each device."""
        return self.refused or self.arguments + self.outputs + self.temporaries + self.code

    @classmethod
    def of(cls, compiled: Any) -> "CompiledMemory":
        """Return the memory of a compiled JAX program."""
        found = compiled.memory_analysis()
        host = found.host_argument_size_in_bytes + found.host_temp_size_in_bytes
        return cls(
            found.argument_size_in_bytes,
            found.output_size_in_bytes - found.alias_size_in_bytes,
            found.temp_size_in_bytes,
            found.generated_code_size_in_bytes,
            host + found.host_output_size_in_bytes - found.host_alias_size_in_bytes,
        )


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A program compiled for a topology: its memory and text, and the seconds that compiling took.

    `text` is empty if the program does not fit a TPU.
    """

    topology: Topology
    memory: CompiledMemory
    text: str
    seconds: float

    def program(self) -> Program:
        """Return the program, read."""
        return Program(self.text)


@contextlib.contextmanager
def on_topology(topology: Topology, sizes: dict[str, int]) -> Iterator[None]:
    """Build the block's programs for a mesh of the topology's devices.

    Raises UserError if its compiler is missing or if a mesh of these sizes does not have that many devices.
    """
    mesh = make_mesh(sizes, topology.devices())
    with compiling_for(topology.hardware), jax.set_mesh(mesh):
        yield


def compile_for(
    topology: Topology, lower: Callable[[], Any], options: Mapping[str, Any] | None = None
) -> CompiledProgram:
    """Compile what `lower` returns, a lowered program, with more `options` of the compiler.

    Raises UserError if that is not possible for another reason than memory.
    """
    start = time.monotonic()
    try:
        compiled = lower().compile(compiler_options=dict(options) if options else None)
    except UserError:
        raise
    except Exception as error:  # of many kinds: Mosaic's, XLA's, those of kernels that the device does not have
        used = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", str(error))
        if used is None:
            raise UserError(f"--compile {topology.name}: {' '.join(str(error).split())[:400]}") from error
        needed = int(float(used[1]) * 1024 ** " KMGT".index(used[2] or " "))
        return CompiledProgram(topology, CompiledMemory(refused=needed), "", time.monotonic() - start)
    return CompiledProgram(topology, CompiledMemory.of(compiled), compiled.as_text(), time.monotonic() - start)


# what a program costs --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a program on a device: without kernels by XLA's cycles, and of kernels by their FLOPs.

    `bound` is the roofline's: for each instruction the larger of FLOPs at the peak rate and bytes at full bandwidth.
    """

    cycles: float
    without_kernels: float | None
    kernels: float
    bound: float

    @property
    def total(self) -> float | None:
        """Seconds of the program, None if the compiler estimates no cycles."""
        return None if self.without_kernels is None else self.without_kernels + self.kernels


def times_of(rows: Sequence[InstructionCost], topology: Topology) -> Times:
    """Return the time of a program with these rows, by the rate of bfloat16."""
    spec = topology.spec
    peak, clock = spec.peak_flops(jnp.bfloat16), CLOCKS.get(spec.name)
    cycles = sum(row.cost.cycles for row in rows if not row.kernel)
    bound = sum(max(row.cost.flops / peak, row.cost.nbytes / spec.memory_bandwidth) for row in rows)
    kernels = sum(row.cost.flops for row in rows if row.kernel) / (KERNEL_RATE * peak)
    return Times(cycles, cycles / clock if clock and cycles else None, kernels, bound)


# tables ----------------------------------------------------------------------------------------------------------


def memory_lines(memory: CompiledMemory) -> list[str]:
    """Return a table of a program's memory in GiB."""
    if memory.refused:
        return [f"memory: {memory.total / GIB:.2f} GiB on each device, more than the compiler allows"]
    names = ("arguments", "outputs", "temporaries", "code")
    parts = [f"{name} {getattr(memory, name) / GIB:.3f}" for name in names]
    host = f"; in host memory {memory.on_host / GIB:.3f}" if memory.on_host else ""
    return [f"memory: {memory.total / GIB:.2f} GiB on each device: {', '.join(parts)}{host}"]


def time_lines(rows: Sequence[InstructionCost], topology: Topology) -> list[str]:
    """Return FLOPs and bytes of a program, and its time where the compiler estimates it."""
    total = sum((row.cost for row in rows), Cost())
    kernels = sum(row.cost.flops for row in rows if row.kernel)
    found = times_of(rows, topology)
    lines = [
        f"work: {total.flops / 1e12:.2f} TFLOP on each device ({kernels / 1e12:.2f} in attention kernels), "
        f"{total.nbytes / 1e9:.1f} GB of memory traffic; at peak rates at least {found.bound:.4g} s"
    ]
    if found.total is not None:
        lines.append(
            f"time: {found.total:.4g} s: {found.without_kernels:.4g} s by XLA's {found.cycles:.4g} cycles, and "
            f"{found.kernels:.4g} s for kernels at {KERNEL_RATE:.0%} of the peak FLOP/s"
        )
    return lines


def collective_lines(found: Sequence[Collective], least: float = 0.005) -> list[str]:
    """Return the collectives with at least this share of the bytes, after the totals by kind."""
    if not found:
        return []
    by_kind: dict[tuple[str, str, bool], float] = collections.defaultdict(float)
    for one in found:
        by_kind[one.kind, one.dtype, one.blocking] += one.sent
    total = sum(one.sent for one in found)
    blocking = sum(one.sent for one in found if one.blocking)
    lines = [
        f"collectives: each device sends {total / 1e9:.3f} GB in a step, {blocking / 1e9:.3f} GB of it while it waits"
    ]
    for (kind, dtype, waits), sent in sorted(by_kind.items(), key=lambda item: -item[1]):
        lines.append(f"  {sent / 1e9:9.3f} GB  {kind} {dtype} {_how(waits)}")
    lines.append("  by shape:")
    for one in found:
        if one.sent >= least * total:
            lines.append(
                f"  {one.sent / 1e9:9.3f} GB  {one.kind} {one.arrays} of {one.group} devices × {one.times}"
                f"{' in a loop' if one.loops else ''}, {_how(one.blocking)}  {one.source}"
            )
    return lines


def _how(blocking: bool) -> str:
    return "blocking" if blocking else "async"


def dearest_lines(rows: Sequence[InstructionCost], topology: Topology, count: int = 15) -> list[str]:
    """Return the instructions that take longest by the compiler's cycles, or where it has none, the most bytes."""
    found = times_of(rows, topology)
    clock, spec = CLOCKS.get(topology.spec.name), topology.spec
    peak = spec.peak_flops(jnp.bfloat16)
    lines = ["dearest instructions:"]
    for row in rows[:count]:
        cost = row.cost
        bound = max(cost.flops / peak, cost.nbytes / spec.memory_bandwidth)
        if found.without_kernels and clock:
            share = f"{cost.cycles / max(found.cycles, 1):6.1%} {cost.cycles / clock * 1e3:8.2f} ms"
        else:
            share = f"{cost.nbytes / 1e9:8.2f} GB"
        lines.append(
            f"  {share} (bound {bound * 1e3:.2f} ms) × {row.runs} {row.instruction.name} "
            f"{' '.join(map(str, row.instruction.arrays[:2]))} {row.phase} {row.source}"
        )
    return lines


def source_lines(rows: Sequence[InstructionCost], topology: Topology, count: int = 10) -> list[str]:
    """Return the lines of this package whose instructions take most cycles; none where the compiler has none."""
    clock = CLOCKS.get(topology.spec.name)
    total = sum(row.cost.cycles for row in rows)
    if not clock or not total:
        return []
    return ["by source line:"] + [
        f"  {cost.cycles / total:6.1%} {cost.cycles / clock * 1e3:8.2f} ms {cost.nbytes / 1e9:8.2f} GB "
        f"{cost.flops / 1e12:7.2f} TFLOP {phase} {source}"
        for (source, phase), cost in list(by_source(rows).items())[:count]
    ]


def report(found: CompiledProgram, *, dearest: int = 15) -> list[str]:
    """Return all tables of a compiled program."""
    lines = memory_lines(found.memory)
    if not found.text:
        return lines
    program = found.program()
    rows = rows_of(program)
    return [
        *lines,
        *time_lines(rows, found.topology),
        *collective_lines(collectives(program)),
        *dearest_lines(rows, found.topology, dearest),
        *source_lines(rows, found.topology),
    ]
