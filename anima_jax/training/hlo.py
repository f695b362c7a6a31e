"""The text of a compiled program (HLO), read: its instructions, how often each runs, and its collectives.

XLA's own cost analysis counts the body of a loop once; here it counts as often as the loop runs.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

_ARRAY = re.compile(r"\b(pred|bf16|f8e\w+|f4e\w+|[suf]\d+)\[([\d,]*)\](\{[^}]*\})?")
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class Array(NamedTuple):
    """The dtype, shape and layout (as text) of an array in an instruction's type."""

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> float:
        """Bytes; two values of 4 bits share one."""
        if self.dtype == "pred" or self.dtype.startswith("f8"):
            return self.size
        return self.size * (0.5 if self.dtype.startswith("f4") else int(re.sub(r"\D", "", self.dtype)) / 8)

    @property
    def in_hbm(self) -> bool:
        """Whether it is in the device's main memory, not in memory on the chip or of the host."""
        return "S(" not in self.layout

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def arrays_in(text: str) -> list[Array]:
    """Return the arrays of a type, of a tuple all of its elements."""
    return [
        Array(dtype, tuple(int(size) for size in shape.split(",") if size), layout)
        for dtype, shape, layout in _ARRAY.findall(text)
    ]


class Instruction(NamedTuple):
    """An instruction: `type` and `rest` (operands and attributes) are text."""

    name: str
    type: str
    opcode: str
    rest: str

    @property
    def arrays(self) -> list[Array]:
        """The arrays of its result."""
        return arrays_in(self.type)

    @property
    def operands(self) -> list[str]:
        """Names of its operands."""
        return re.findall(r"%([\w.\-]+)", _parenthesis(self.rest))

    def attribute(self, pattern: str) -> str | None:
        """Return the first group of a regular expression in its attributes, None if there is no match."""
        found = re.search(pattern, self.rest)
        return found[1] if found else None

    @property
    def called(self) -> str | None:
        """The computation of a fusion, a call or an asynchronous wrapper."""
        return self.attribute(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")

    @property
    def op_name(self) -> str:
        """The operation in JAX from which it comes, with the names of the transformations around it."""
        return self.attribute(r'op_name="([^"]*)"') or ""


def _parenthesis(text: str) -> str:
    """Return what is in the first parenthesis of `text`."""
    depth, start = 0, text.find("(")
    for end in range(max(start, 0), len(text)):
        depth += (text[end] == "(") - (text[end] == ")")
        if depth == 0:
            return text[start + 1 : end]
    return ""


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"^\s*(?:ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = len(_parenthesis(rest)) + 2 if rest.startswith("(") else rest.find(" ")
    opcode = re.match(r"\s*([\w\-]+)\(", rest[end:])
    return Instruction(head[1], rest[:end], opcode[1] if opcode else "", rest[end:])


class Visit(NamedTuple):
    """An instruction of a running program: how often it runs, in loops of how many iterations, from the outermost.

    `fused` says that it is inside a fusion, `in_async` that it is inside an asynchronous wrapper.
    """

    instruction: Instruction
    times: int
    loops: tuple[int, ...]
    fused: bool
    in_async: bool


class Program:
    """A compiled program, from its text."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self._entry, current = "", None
        for line in text.splitlines():
            head = re.match(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{\s*$", line)
            if head and "=" not in line.split("(")[0]:
                current = self.computations[head[2]] = []
                self._entry = head[2] if head[1] else self._entry
            elif line.rstrip() == "}":
                current = None
            elif current is not None and (found := _instruction(line)):
                current.append(found)
        self.named = {one.name: one for computation in self.computations.values() for one in computation}
        self._source = _Source(text)

    def walk(self) -> Iterator[Visit]:
        """Yield every instruction that runs. Both branches of a conditional count."""
        yield from self._walk(self._entry, 1, (), False, False)

    def _walk(
        self, computation: str, times: int, loops: tuple[int, ...], fused: bool, in_async: bool
    ) -> Iterator[Visit]:
        for one in self.computations.get(computation, ()):
            yield Visit(one, times, loops, fused, in_async)
            if one.opcode == "while":
                trips = self._trips(one)
                body = one.attribute(r"body=%?([\w.\-]+)") or ""
                yield from self._walk(body, times * trips, (*loops, trips), fused, in_async)
            elif one.opcode == "conditional":
                branches = one.attribute(r"branch_computations=\{([^}]*)\}") or " ".join(
                    re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", one.rest)
                )
                for branch in re.findall(r"[\w.\-]+", branches):
                    yield from self._walk(branch, times, loops, fused, in_async)
            elif one.opcode in {"call", "async-start", "fusion"} and one.called:
                in_fusion, wrapped = fused or one.opcode == "fusion", in_async or one.opcode == "async-start"
                yield from self._walk(one.called, times, loops, in_fusion, wrapped)

    def _trips(self, loop: Instruction) -> int:
        """Return the number of iterations of a loop.

        XLA says it of loops that it analysed; others, such as those of collective matmuls, count up to the constant in
        their condition in steps of the constant that the body adds to the same element of the tuple.
        """
        known = loop.attribute(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
        if known:
            return int(known)
        condition = self.computations.get(loop.attribute(r"condition=%?([\w.\-]+)") or "", [])
        body = self.computations.get(loop.attribute(r"body=%?([\w.\-]+)") or "", [])
        limit = max((_constant(one) or 0 for one in condition), default=0) or 1
        indices = {one.attribute(r"index=(\d+)") for one in condition if one.opcode == "get-tuple-element"}
        counters = {
            one.name for one in body if one.opcode == "get-tuple-element" and one.attribute(r"index=(\d+)") in indices
        }
        steps = [
            _constant(self.named[name]) or 0
            for one in body
            if one.opcode == "add" and counters & set(one.operands)
            for name in one.operands
            if name in self.named
        ]
        return max(1, limit // max([*steps, 1]))

    def source(self, instruction: Instruction, depth: int = 0) -> str:
        """Return the file, line and function of this package from which an instruction comes, "" if unknown."""
        found = self._source.of(instruction)
        if found or depth > 2:
            return found
        inner = self.computations.get(instruction.called or "", [])
        return next((where for one in reversed(inner) if (where := self.source(one, depth + 1))), "")


def _constant(instruction: Instruction) -> int | None:
    found = instruction.attribute(r"^\s*constant\((\d+)\)") if instruction.opcode == "constant" else None
    return None if found is None else int(found)


class _Source:
    """The tables of files, functions, locations and stack frames at the head of a program's text."""

    def __init__(self, text: str):
        heads = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
        self._files, self._functions, self._locations, self._frames = (_table(text, head) for head in heads)

    def of(self, instruction: Instruction) -> str:
        frame = instruction.attribute(r"stack_frame_id=(\d+)")
        for _ in range(100):
            entry = self._frames.get(frame or "")
            if not entry:
                break
            location = self._locations.get(_number(entry, "file_location_id"), "")
            file = self._files.get(_number(location, "file_name_id"), "").strip('"')
            if "/anima_jax/" in file:
                function = self._functions.get(_number(location, "function_name_id"), "").strip('"')
                return f"{file.rsplit('/anima_jax/', 1)[-1]}:{_number(location, 'line')} {function}"
            parent = _number(entry, "parent_frame_id")
            if parent == frame:
                break
            frame = parent
        return ""


def _table(text: str, head: str) -> Mapping[str, str]:
    found = re.search(rf"^{head}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
    return dict(line.split(" ", 1) for line in found[1].splitlines()) if found else {}


def _number(text: str, key: str) -> str:
    found = re.search(rf"\b{key}=(\d+)", text)
    return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind on arrays of one shape: how often they run in a step and the bytes that a device sends.

    `group` is the number of devices that exchange, `blocking` whether the device waits for them, `source` where they
    come from.
    """

    kind: str
    dtype: str
    arrays: str
    group: int
    blocking: bool
    loops: tuple[int, ...]
    times: int
    sent: float
    source: str


def collectives(program: Program) -> list[Collective]:
    """Return a program's collectives, those with the most bytes first."""
    rows: dict[tuple[object, ...], Collective] = {}
    chains: set[str | None] = set()
    for visit in program.walk():
        one = visit.instruction
        kind = one.opcode.removesuffix("-start")
        if kind not in _COLLECTIVES or not one.arrays:
            continue
        # A TPU's compiler divides a collective into a chain of parts, each in a fusion with other work: all have its
        # channel and whole shape.
        chained, channel = one.attribute(r'chain_id="(\d+)"') is not None, one.attribute(r"channel_id=(\d+)")
        if chained and channel in chains:
            continue
        chains |= {channel} if chained else set()
        started = one.opcode.endswith("-start") or visit.in_async or chained
        if visit.fused and kind == "all-reduce" and not chained:
            kind = "reduce-scatter"  # as a TPU has it: a fusion of a sum with the slice of it that a device keeps
            sent_of = one.arrays
        else:
            sent_of = _results(one, kind) if one.opcode.endswith("-start") else one.arrays
        group = _group(one)
        size = sum(array.nbytes for array in sent_of) * visit.times
        whole = kind == "reduce-scatter" and not visit.fused  # its result is a device's part
        sent = _sent(kind, size * (group if whole else 1), group)
        dtype = "+".join(sorted({array.dtype for array in sent_of}))
        names = " ".join(map(str, sent_of[:3])) + (f" … {len(sent_of)}" if len(sent_of) > 3 else "")
        key = (kind, dtype, names, group, started, visit.loops)
        old = rows.get(key)
        times, before, source = (old.times, old.sent, old.source) if old else (0, 0.0, program.source(one))
        rows[key] = Collective(
            kind, dtype, names, group, not started, visit.loops, times + visit.times, before + sent, source
        )
    return sorted((row for row in rows.values() if row.sent), key=lambda row: -row.sent)


def _results(start: Instruction, kind: str) -> Sequence[Array]:
    """Return the arrays of a `-start` instruction's result without its operands and contexts."""
    arrays = [array for array in start.arrays if array.shape or kind == "all-reduce"]
    if kind == "all-reduce":
        return arrays  # its type is that of the results alone
    return arrays[len(arrays) // 2 : len(arrays) // 2 * 2] if len(arrays) > 1 else arrays


def _group(one: Instruction) -> int:
    """Return how many devices take part in each group of a collective."""
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", one.rest):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", one.rest):
        return found[1].count(",") + 1
    found = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}", one.rest)
    if not found:
        return 2 if one.opcode.startswith("collective-permute") else 0
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
    return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2]))


def _sent(kind: str, size: float, group: int) -> float:
    """Return the bytes that each device of a group sends for an array of `size` bytes (the whole array)."""
    if kind in {"collective-permute", "collective-broadcast"}:
        return size
    return 0.0 if group < 2 else size * (group - 1) / group * (2 if kind == "all-reduce" else 1)
