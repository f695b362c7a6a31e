"""FLOPs, bytes and the compiler's estimated cycles of a compiled program, from its text (hlo.py)."""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from anima_jax.training.hlo import Array, Instruction, Program

_FREE = {
    *("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "constant", "call", "iota"),
    *("after-all", "partition-id", "replica-id", "copy-done", "slice-done", "async-start", "async-done", "opt-barrier"),
}
"""Opcodes that compute nothing themselves."""

KERNEL_TARGETS = ("tpu_custom_call", "__cudnn$fmha")
"""Targets of custom calls that are attention kernels; XLA has no estimate of their time."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of instructions: FLOPs of matrix products, bytes of main memory, estimated cycles (0: not estimated)."""

    flops: float = 0.0
    nbytes: float = 0.0
    cycles: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.nbytes + other.nbytes, self.cycles + other.cycles)

    def times(self, number: int) -> "Cost":
        """Return the cost of `number` runs."""
        return Cost(self.flops * number, self.nbytes * number, self.cycles * number)


@dataclasses.dataclass(frozen=True)
class InstructionCost:
    """An instruction of the program outside fusions: how often it runs, its total cost, and where it comes from."""

    instruction: Instruction
    runs: int
    cost: Cost
    kernel: bool
    source: str

    @property
    def phase(self) -> str:
        """The part of a training step that it belongs to, as far as its name says."""
        name = self.instruction.op_name
        if "rematted" in name:
            return "recomputed"
        return "backward" if "transpose(jvp" in name else "forward" if "jvp" in name else ""


def rows_of(program: Program) -> list[InstructionCost]:
    """Return the instructions that cost something, the dearest by the compiler's cycles (else by bytes) first."""
    cost_of, found = _Costs(program), dict[str, InstructionCost]()
    for visit in program.walk():
        one = visit.instruction
        if visit.fused or one.opcode in _FREE:
            continue
        cost, kernel = cost_of(one)
        if cost == Cost():
            continue
        old = found.get(one.name)
        runs, total = (old.runs, old.cost) if old else (0, Cost())
        found[one.name] = InstructionCost(
            one, runs + visit.times, total + cost.times(visit.times), kernel, old.source if old else program.source(one)
        )
    return sorted(found.values(), key=lambda row: (-row.cost.cycles, -row.cost.nbytes))


class _Costs:
    """The cost of one run of each instruction of a program."""

    def __init__(self, program: Program):
        self._program, self._known = program, dict[str, tuple[Cost, bool]]()

    def __call__(self, one: Instruction) -> tuple[Cost, bool]:
        """Return the cost of a run, and whether it is an attention kernel."""
        if one.name not in self._known:
            kernel = one.opcode == "custom-call" and any(target in one.rest for target in KERNEL_TARGETS)
            cycles = float(one.attribute(r'estimated_cycles"?:\s*"?(\d+)') or 0)
            flops = self._kernel_flops(one) if kernel else self._flops(one)
            self._known[one.name] = Cost(flops, self._bytes(one), cycles), kernel
        return self._known[one.name]

    def _operand(self, one: Instruction, index: int) -> Array | None:
        names = one.operands
        arrays = (
            self._program.named[names[index]].arrays
            if names[index : index + 1] and names[index] in self._program.named
            else []
        )
        return arrays[0] if arrays else None

    def _flops(self, one: Instruction, depth: int = 0) -> float:
        if one.opcode == "fusion" and depth < 5:
            return sum(self._flops(inner, depth + 1) for inner in self._program.computations.get(one.called or "", ()))
        if one.opcode == "dot" or (one.opcode == "custom-call" and "__cublas" in one.rest):
            return self._dot_flops(one)
        return self._convolution_flops(one) if one.opcode == "convolution" else 0.0

    def _dot_flops(self, one: Instruction) -> float:
        left = self._operand(one, 0)
        axes = one.attribute(r'lhs_contracting_dim(?:s|ensions)"?[=:]\s*[\[{]([\d,"\s]*)')
        if left is None or axes is None or not one.arrays:
            return 0.0
        return 2.0 * one.arrays[0].size * math.prod(left.shape[int(axis)] for axis in re.findall(r"\d+", axes))

    def _convolution_flops(self, one: Instruction) -> float:
        """Return the FLOPs of a convolution, as which a TPU writes every product.

        A window that is padded by all but one of its size on both sides is an outer product, not a sum.
        """
        labels, kernel = one.attribute(r"dim_labels=\w+_(\w+)->"), self._operand(one, 1)
        if labels is None or kernel is None:
            return 0.0
        sizes = [int(size) for size in (one.attribute(r"window=\{size=([\dx]+)") or "").split("x") if size]
        pads = [
            tuple(map(int, pad.split("_"))) for pad in (one.attribute(r"[ {]pad=([\d_x]+)") or "").split("x") if pad
        ]
        pads += [(0, 0)] * (len(sizes) - len(pads))
        window = math.prod(
            1 if size > 1 and pad == (size - 1,) * 2 else size for size, pad in zip(sizes, pads, strict=False)
        )
        return 2.0 * one.arrays[0].size * kernel.shape[labels.index("i")] * window

    def _kernel_flops(self, one: Instruction) -> float:
        """Return the FLOPs of a fused attention kernel, from its operands (…, heads, tokens, head size).

        Forward has 2 products, and a backward pass 3 for the queries' gradients, 4 for those of keys and values, or 5
        for both. cuDNN's operands are (batch, tokens, heads, head size).
        """
        shapes = [
            array.shape
            for name in one.operands
            if name in self._program.named
            for array in self._program.named[name].arrays
            if len(array.shape) >= 3 and array.dtype in {"bf16", "f16", "f32"} and array.shape[-1] > 1
        ]
        if not shapes:
            return 0.0
        cudnn, name = "__cudnn" in one.rest, f"{one.name} {one.op_name}"
        head = shapes[0][-1]
        whole = [shape for shape in shapes if shape[-1] == head]
        token, heads = (-3, -2) if cudnn else (-2, -3)
        tokens = [shape[token] for shape in whole]
        rows = math.prod(whole[0][:-3]) * whole[0][heads]
        if "Backward" in one.rest or ("dkv" in name and "dq" in name):
            products = 5
        else:
            products = 4 if "dkv" in name else 3 if "dq" in name else 2
        return 2.0 * products * rows * max(tokens) * min(tokens) * head

    def _bytes(self, one: Instruction) -> float:
        """Return the bytes of main memory that an instruction reads and writes; of a stack, only the slice it takes."""
        if one.opcode == "custom-call" and not any(target in one.rest for target in (*KERNEL_TARGETS, "__cublas")):
            return 0.0
        written = sum(array.nbytes for array in one.arrays if array.in_hbm)
        if one.opcode == "dynamic-update-slice":
            part = self._operand(one, 1)
            return 2 * part.nbytes if part else written
        if one.opcode in {"slice", "dynamic-slice"}:
            return written + sum(array.nbytes for array in one.arrays)
        read = 0.0
        for index, name in enumerate(one.operands):
            if name not in self._program.named:
                continue
            whole = sum(array.nbytes for array in self._program.named[name].arrays if array.in_hbm)
            taken = self._taken(one.called or "", index) if one.opcode == "fusion" else None
            read += whole if taken is None else min(whole, taken)
        updated = self._updated(one.called or "") if one.opcode == "fusion" else None
        if updated and written >= updated[1]:
            written += updated[0] - updated[1]
        return read + written

    def _taken(self, computation: str, index: int, depth: int = 0) -> float | None:
        """Return the bytes that a computation takes of its parameter `index`, None if it takes all of it."""
        inside = self._program.computations.get(computation, ())
        own = next(
            (
                one.name
                for one in inside
                if one.opcode == "parameter" and one.rest.strip().startswith(f"parameter({index})")
            ),
            None,
        )
        if own is None:
            return None
        total = 0.0
        for one in inside:
            operands = one.operands if one.opcode != "parameter" else []
            if own not in operands:
                continue
            if one.opcode == "dynamic-slice" and operands[0] == own:
                total += sum(array.nbytes for array in one.arrays)
            elif one.opcode == "dynamic-update-slice" and operands[0] == own:
                continue
            elif one.opcode == "fusion" and depth < 4:
                parts = [
                    self._taken(one.called or "", place, depth + 1)
                    for place, name in enumerate(operands)
                    if name == own
                ]
                if any(part is None for part in parts):
                    return None
                total += sum(part for part in parts if part is not None)
            else:
                return None
        return total

    def _updated(self, computation: str, depth: int = 0) -> tuple[float, float] | None:
        """Return the bytes of the slice and of the stack that a fusion updates in place, None if it does not."""
        for one in self._program.computations.get(computation, ()):
            if one.opcode == "dynamic-update-slice":
                part = self._operand(one, 1)
                return (part.nbytes if part else 0.0), sum(array.nbytes for array in one.arrays)
            if one.opcode == "fusion" and depth < 3 and (found := self._updated(one.called or "", depth + 1)):
                return found
        return None


def by_source(rows: Sequence[InstructionCost]) -> Mapping[tuple[str, str], Cost]:
    """Return the cost of each line of this package and phase of the step, dearest first."""
    found: dict[tuple[str, str], Cost] = collections.defaultdict(Cost)
    for row in rows:
        found[row.source, row.phase] += row.cost
    return dict(sorted(found.items(), key=lambda item: -item[1].cycles))
