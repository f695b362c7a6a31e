"""Folders of training runs, as the page shows them: which there are, their samples, exports and checkpoints, disk use.

Runs, samples and checkpoints have ids, which are looked up among what is there: no part of a request becomes a path.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import threading
import tomllib
from collections.abc import Iterator
from typing import Any, Literal

from PIL import Image

from anima_jax.adapters.kinds import adapter_kind
from anima_jax.checkpoints.control import holds_control
from anima_jax.checkpoints.tensor_files import open_tensors
from anima_jax.errors import UserError, one_line
from anima_jax.serving.studio.run_figures import Figures
from anima_jax.training.export import EMA_FOLDER, EXPORT_FOLDER, exported
from anima_jax.training.resume import FOLDER
from anima_jax.training.run_folder import start_of
from anima_jax.training.samples import COLUMNS

METRICS, EVALUATIONS, SAMPLES = "metrics.jsonl", "evaluations.jsonl", "samples"

DEPTH = 2
"""Levels of folders below the given one in which runs are found: `runs/NAME/20260101_10-00-00`."""

MOST_RUNS = 1000

CheckpointKind = Literal["model", "adapter", "control", "resume", "unknown"]

_SAMPLE = re.compile(r"step(\d{1,12})\.png")


@dataclasses.dataclass(frozen=True)
class Sample:
    """A grid of images drawn during a run: `columns` × `rows` tiles, row by row, each with its prompt and seed."""

    name: str
    step: int
    path: pathlib.Path
    changed: float
    size_wh: tuple[int, int]
    prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    columns: int = 1
    rows: int = 1


@dataclasses.dataclass(frozen=True)
class RunCheckpoint:
    """An exported model, adapter or control network, or what a run resumes from (`kind` "resume")."""

    name: str
    kind: CheckpointKind
    step: int | None
    epoch: int | None
    ema: bool
    bytes: int
    created: float
    path: pathlib.Path
    """The file, or for "resume" the folder."""


class RunFolder:
    """The folder of one run. Nothing of it needs to exist yet."""

    def __init__(self, name: str, folder: pathlib.Path):
        self.name, self.folder = name, folder
        self.metrics, self.evaluations = Figures(folder / METRICS), Figures(folder / EVALUATIONS)
        self._samples: dict[tuple[str, float], Sample] = {}
        self._lock = threading.Lock()

    def refresh(self) -> None:
        """Read the figures that were written since the last call."""
        self.metrics.refresh()
        self.evaluations.refresh()

    @property
    def updated(self) -> float | None:
        """When the figures were last written, in seconds since 1970; None if there are none."""
        try:
            return (self.folder / METRICS).stat().st_mtime
        except OSError:
            return None

    def configuration(self) -> dict[str, Any]:
        """Return what the run's own copy of its TOML says, {} if there is none that can be read."""
        for path in sorted(_children(self.folder)):
            if path.suffix == ".toml" and path.is_file():
                with contextlib.suppress(OSError, ValueError):
                    table = tomllib.loads(path.read_text("utf-8-sig"))
                    if isinstance(table.get("model"), dict):
                        return table
        return {}

    def samples(self) -> list[Sample]:
        """Return the grids by step. A file that is no image, or is being written, is left out."""
        found = list[Sample]()
        for path in _children(self.folder / SAMPLES):
            match = _SAMPLE.fullmatch(path.name)
            with contextlib.suppress(OSError):
                if match and path.is_file():
                    found.append(self._sample(path, int(match[1]), path.stat().st_mtime))
        return sorted((each for each in found if min(each.size_wh)), key=lambda each: each.step)

    def sample(self, name: str) -> Sample:
        """Return the grid of this name. Raises LookupError if there is none."""
        return next_or_error(each for each in self.samples() if each.name == name)

    def _sample(self, path: pathlib.Path, step: int, changed: float) -> Sample:
        with self._lock:
            if (known := self._samples.get((path.name, changed))) is not None:
                return known
        sample = Sample(path.stem, step, path, changed, (0, 0))
        damaged = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
        with contextlib.suppress(*damaged), Image.open(path) as image:
            text = str(getattr(image, "text", {}).get("anima_jax_samples", "{}"))
            sample = dataclasses.replace(sample, size_wh=image.size, **_tiles(text))
        with self._lock:
            self._samples[path.name, changed] = sample
        return sample

    def checkpoints(self) -> list[RunCheckpoint]:
        """Return the exports and checkpoints, newest first."""
        found = list[RunCheckpoint]()
        for folder in _children(self.folder):
            if (match := EXPORT_FOLDER.fullmatch(folder.name)) and folder.is_dir():
                epoch, step = (int(match[2]) if match[1] == kind else None for kind in ("epoch", "step"))
                for ema, place in ((False, folder), (True, folder / EMA_FOLDER)):
                    found += _exports(place, folder.name, step=step, epoch=epoch, ema=ema)
        for folder in _children(self.folder / FOLDER):
            if folder.name.isdecimal() and folder.is_dir():
                name, size = f"{FOLDER}-{folder.name}", disk_use(folder)
                created = _changed(folder)
                found.append(RunCheckpoint(name, "resume", int(folder.name), None, False, size, created, folder))
        return sorted(found, key=lambda each: (each.created, each.name), reverse=True)

    def checkpoint(self, name: str) -> RunCheckpoint:
        """Return the checkpoint of this name. Raises LookupError if there is none."""
        return next_or_error(each for each in self.checkpoints() if each.name == name)

    def disk(self) -> dict[str, int]:
        """Return the bytes of the parts of the run: exports, checkpoints, samples, other; and `free` on its disk."""
        sizes = {"exports": 0, "checkpoints": 0, "samples": 0, "other": 0}
        parts = {FOLDER: "checkpoints", SAMPLES: "samples"}
        for path in _children(self.folder):
            part = "exports" if EXPORT_FOLDER.fullmatch(path.name) else parts.get(path.name, "other")
            sizes[part] += disk_use(path)
        with contextlib.suppress(OSError):
            sizes["free"] = shutil.disk_usage(self.folder).free
        return sizes


class Runs:
    """The runs in `root`: the folder of one run, or a folder of runs, which may begin later."""

    def __init__(self, root: str | os.PathLike[str]):
        self.root = pathlib.Path(root).absolute()
        self._known: dict[str, RunFolder] = {}
        self._lock = threading.Lock()

    def all(self) -> list[RunFolder]:
        """Return the runs, newest first."""
        with self._lock:
            found = [(self.root.name, self.root)] if _is_run(self.root) else _found(self.root, "", DEPTH)
            # Names that are not text get escapes.
            named = {one_line(name): path for name, path in found}
            runs = [self._known.setdefault(name, RunFolder(name, path)) for name, path in named.items()]
        return sorted(runs, key=lambda run: (start_of(run.folder), run.name), reverse=True)[:MOST_RUNS]

    def run(self, name: str | None) -> RunFolder:
        """Return the run of this name, by default the newest. Raises LookupError if there is none."""
        runs = self.all()
        return next_or_error(run for run in runs if name in {None, run.name})


def next_or_error(found: Iterator[Any]) -> Any:
    """Return the first of `found`. Raises LookupError if there is none."""
    for each in found:
        return each
    raise LookupError


def disk_use(path: pathlib.Path) -> int:
    """Return the bytes of a file, or of all files in a folder; links are not followed."""
    try:
        if path.is_symlink() or not path.is_dir():
            return path.lstat().st_size
        return sum(disk_use(pathlib.Path(entry)) for entry in os.scandir(path))
    except OSError:  # it was deleted meanwhile
        return 0


def weights_kind(path: pathlib.Path) -> CheckpointKind:
    """Return what a safetensors file of a run contains, by its header."""
    try:
        if holds_control(path):
            return "control"
        with open_tensors(path) as file:
            return "model" if adapter_kind(file.tensors) is None else "adapter"
    except UserError:
        return "unknown"


def _exports(place: pathlib.Path, name: str, **about: Any) -> Iterator[RunCheckpoint]:
    with contextlib.suppress(OSError):
        files = exported(place)
        for path in files:
            parts = [name, *(["ema"] if about["ema"] else []), *([path.stem] if len(files) > 1 else [])]
            stat = path.stat()
            kind = _kind_of(path, stat.st_mtime_ns, stat.st_size)
            yield RunCheckpoint("-".join(parts), kind, **about, bytes=stat.st_size, created=stat.st_mtime, path=path)


@functools.lru_cache(maxsize=4096)
def _kind_of(path: pathlib.Path, changed_ns: int, size: int) -> CheckpointKind:
    """Return `weights_kind`, remembered for a file that has not changed."""
    del changed_ns, size
    return weights_kind(path)


def _tiles(text: str) -> dict[str, Any]:
    """Return the prompts, seeds and layout of a grid from its own text, nothing if that is of another form."""
    try:
        found = json.loads(text)
        prompts, seeds = tuple(map(str, found["prompts"])), tuple(map(int, found["seeds"]))
    except (ValueError, TypeError, LookupError, RecursionError):
        return {}
    count = len(prompts) * len(seeds)
    columns = max(1, min(COLUMNS, count))
    return {"prompts": prompts, "seeds": seeds, "columns": columns, "rows": max(1, -(-count // columns))}


def _found(folder: pathlib.Path, prefix: str, depth: int) -> Iterator[tuple[str, pathlib.Path]]:
    for path in sorted(_children(folder)):
        if path.name.startswith(".") or not path.is_dir():
            continue
        name = f"{prefix}{path.name}"
        if _is_run(path):
            yield name, path
        elif depth > 1:
            yield from _found(path, f"{name}/", depth - 1)


def _is_run(folder: pathlib.Path) -> bool:
    """Return whether a folder is that of a run: it has figures, exports or checkpoints, or a TOML and a lock."""
    names = {path.name for path in _children(folder)}
    return (
        METRICS in names
        or any(map(EXPORT_FOLDER.fullmatch, names))
        or (".lock" in names and any(name.endswith(".toml") for name in names))
        or any(path.name.isdecimal() for path in _children(folder / FOLDER))
    )


def _children(folder: pathlib.Path) -> list[pathlib.Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _changed(path: pathlib.Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
