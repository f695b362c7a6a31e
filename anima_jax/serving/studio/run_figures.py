"""Figures of a run: what `metrics.jsonl` and `evaluations.jsonl` contain, read as the files grow.

A line that is being written, or is damaged, does no harm: it is read when it is complete, or left out. A resumed run
replaces its files (`training.jsonl`), which are then read again.
"""

import bisect
import dataclasses
import json
import math
import os
import pathlib
import threading
from array import array
from typing import Any

import numpy as np

MAX_LINE = 2**20
"""In bytes. Longer lines are no figures of ours."""

MAX_SERIES = 1000
"""Number of different figures of which curves are kept."""

POINTS = 1000
"""Most points of a curve that are sent at once."""

_CHUNK, _TAIL = 2**22, 64


class Curve:
    """The values of one figure by step, ascending; NaN for a value that is not finite. A step has its last value."""

    def __init__(self) -> None:
        self.steps, self.values = array("q"), array("d")

    def add(self, step: int, value: float) -> None:
        """Add the value of a step, or replace it."""
        if not self.steps or step > self.steps[-1]:
            self.steps.append(step)
            self.values.append(value)
            return
        at = bisect.bisect_left(self.steps, step)
        if self.steps[at] == step:
            self.values[at] = value
        else:
            self.steps.insert(at, step)
            self.values.insert(at, value)

    def after(self, step: int | None, points: int = POINTS) -> dict[str, list[Any]]:
        """Return the steps and values after `step` (None: all), thinned to about `points`; None for NaN."""
        start = 0 if step is None else bisect.bisect_right(self.steps, step)
        steps, values = np.array(self.steps[start:], np.int64), np.array(self.values[start:], np.float64)
        kept = thinned(values, points)
        return {
            "steps": steps[kept].tolist(),
            "values": [value if math.isfinite(value) else None for value in values[kept].tolist()],
        }


def thinned(values: np.ndarray, points: int) -> np.ndarray:
    """Return the indices of about `points` of the values: of each stretch the smallest and the largest.

    The first and the last value, and one that is NaN in each stretch, are kept too, so that peaks and gaps stay.
    """
    count = len(values)
    if count <= max(points, 4):
        return np.arange(count)
    stretches = max(1, (points - 2) // 2)
    bounds = np.linspace(0, count, stretches + 1).astype(np.int64)
    kept = {0, count - 1}
    for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        part = values[low:high]
        finite = np.isfinite(part)
        if not finite.all():
            kept.add(low + int(np.argmin(finite)))
        if finite.any():
            kept.add(low + int(np.argmin(np.where(finite, part, np.inf))))
            kept.add(low + int(np.argmax(np.where(finite, part, -np.inf))))
    return np.array(sorted(kept))


@dataclasses.dataclass
class _Place:
    """How far a file was read."""

    inode: int = -1
    offset: int = 0
    tail: bytes = b""
    """The bytes before `offset`: if others are there now, the file was written again."""
    generation: int = 0


class Figures:
    """The curves of one file of JSON lines, `{"step": …, name: value, …}`. Thread-safe.

    `generation` changes when values that were there before are other ones: the file was replaced, or has a step twice.
    """

    def __init__(self, path: pathlib.Path):
        self._path, self._lock, self._place = path, threading.Lock(), _Place()
        self.curves: dict[str, Curve] = {}
        self.last: dict[str, float] = {}
        """The figures of the last line."""
        self.last_step: int | None = None

    @property
    def generation(self) -> int:
        """Number that is another one when what was read before no longer holds."""
        return self._place.generation

    def refresh(self) -> None:
        """Read what was written since the last call. A file that does not exist is empty."""
        with self._lock:
            try:
                with open(self._path, "rb") as file:
                    self._read(file)
            except OSError:
                if self._place.inode != -1:
                    self._forget(-1)

    def after(self, step: int | None, points: int = POINTS) -> dict[str, dict[str, list[Any]]]:
        """Return name → steps and values after `step` (None: all), as `Curve.after`, without empty curves."""
        with self._lock:
            found = {name: curve.after(step, points) for name, curve in self.curves.items()}
        return {name: curve for name, curve in found.items() if curve["steps"]}

    def _forget(self, inode: int) -> None:
        self.curves, self.last, self.last_step = {}, {}, None
        self._place = _Place(inode, generation=self._place.generation + 1)

    def _read(self, file: Any) -> None:
        about = os.fstat(file.fileno())
        before = self._place.tail
        file.seek(self._place.offset - len(before))
        if about.st_ino != self._place.inode or file.read(len(before)) != before:
            self._forget(about.st_ino)
            file.seek(0)
        rest = b""
        while data := file.read(_CHUNK):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._add(line)
            if len(rest) > MAX_LINE:
                rest = rest[:MAX_LINE] + b"~"  # it stays damaged, and takes no memory
            self._place.offset += len(data)
        self._place.offset -= len(rest)
        start = max(0, self._place.offset - _TAIL)
        file.seek(start)
        self._place.tail = file.read(self._place.offset - start)
        if rest:
            self._add(rest)  # the last line of a file that another program ended without a line end

    def _add(self, line: bytes) -> None:
        try:
            row = json.loads(line) if len(line) <= MAX_LINE else None
        except (ValueError, RecursionError):
            return
        if not isinstance(row, dict):
            return
        step = row.get("step")
        if type(step) is not int or not 0 <= step < 2**62:
            return
        found = {
            name: _number(value)
            for name, value in row.items()
            if name != "step" and type(value) in {int, float, type(None)}
        }
        if self.last_step is not None and step <= self.last_step and (step, found) != (self.last_step, self.last):
            self._place.generation += 1
        self.last_step, self.last = step, found
        for name, value in found.items():
            if name in self.curves or len(self.curves) < MAX_SERIES:
                self.curves.setdefault(name, Curve()).add(step, value)


def _number(value: float | None) -> float:
    """Return a finite value as it is, and anything else as NaN."""
    try:
        number = math.nan if value is None else float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan
