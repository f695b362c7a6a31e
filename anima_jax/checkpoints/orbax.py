"""A run's checkpoints, stored with Orbax (v1 API): `FOLDER/<step>` contains named items, which are pytrees of arrays.

Each item is stored as a flat table, path in the tree → array, independent of the tree's container types. Before
anything is loaded, the stored layout is compared with the expected one, because Orbax itself would cast and reshape.

A checkpoint is written under a temporary name, flushed to the disk with checksums of its files, and then renamed; only
then are older ones deleted. If the process dies, the power fails or the disk is full, the earlier checkpoints are
unchanged. The folder is on a local file system or one that all processes share: Orbax's process k writes its arrays,
process 0 flushes and checks all files.
"""

import concurrent.futures
import contextlib
import ctypes
import gc
import importlib
import itertools
import logging
import os
import pathlib
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import multihost
from orbax.checkpoint import v1 as ocp

from anima_jax.checkpoints import checksums
from anima_jax.checkpoints.locations import reading_folders, sync_folder
from anima_jax.errors import UserError, os_reason, shorten
from anima_jax.parallel import hosts

log = logging.getLogger(__name__)

SAVE_TIMEOUT_S = 4 * 3600
"""Seconds after which a save has failed. Orbax's default, 20 minutes, is too short for a slow disk."""

_LAST_FILE = "_CHECKPOINT_METADATA"
"""File that Orbax writes last; an incomplete copy of a checkpoint does not have it."""

_DAMAGED = "damaged"
"""Ending of the name of a checkpoint that was found damaged."""

_NOT_DAMAGE = re.compile(r"RESOURCE_EXHAUSTED|[Oo]ut of memory|PERMISSION_DENIED|Permission denied")
"""Errors of a load that say nothing about the files themselves."""

_BARRIERS = itertools.count()
"""Numbers of the barriers between processes, whose names must differ."""


@contextlib.contextmanager
def errors_reported_once() -> Iterator[None]:
    """Silence what Orbax and TensorStore print about a failed save or load: `RunCheckpoints` reports it in one line.

    Orbax logs each error with a traceback from every one of its threads. If it fails, it drops coroutines and tasks and
    closes an event loop that TensorStore's threads still notify; Python reports all of them on stderr, some only when
    they are collected as garbage.
    """

    def is_not_orbax(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    def is_retrieved(record: logging.LogRecord) -> bool:
        return "exception was never retrieved" not in record.msg

    def unraisable(args: "sys.UnraisableHookArgs") -> None:
        code = getattr(args.object, "cr_code", None)
        if not (code and "orbax" in code.co_filename) and str(args.exc_value) != "Event loop is closed":
            before(args)

    before, sys.unraisablehook = sys.unraisablehook, unraisable
    logging.getLogger("absl").addFilter(is_not_orbax)
    logging.getLogger("asyncio").addFilter(is_retrieved)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
            try:
                yield
            finally:
                gc.collect()
    finally:
        logging.getLogger("absl").removeFilter(is_not_orbax)
        logging.getLogger("asyncio").removeFilter(is_retrieved)
        sys.unraisablehook = before


def _do_not_measure_writes() -> None:
    """Stop Orbax from asking TensorStore for the number of bytes written, which it only logs.

    Each answer of TensorStore 0.1.86 leaks its lists: about 80 kB a checkpoint.
    """
    with contextlib.suppress(ImportError):
        module: Any = importlib.import_module("orbax.checkpoint._src.serialization.tensorstore_utils")
        module.get_tensorstore_raw_bytes = lambda *_: 0


def _return_freed_memory() -> None:
    """Give memory that is free back to the operating system, where the C library is glibc.

    A save allocates and frees in several threads, which otherwise leaves holes: about 130 kB a checkpoint. The
    arenas of these threads still fill in the first 150 checkpoints, by 30 MB; from then on, a checkpoint adds 0.4 kB.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class DamagedError(UserError):
    """A checkpoint whose files are not as they were written."""


class RunCheckpoints:
    """The checkpoints in `folder`; only the newest `keep` are kept (None: all). Only one run at a time may write to it.

    Saving is asynchronous, but the arrays may be donated as soon as `save` returns. Call `close` before the program
    ends.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int | None):
        self.folder, self._keep = pathlib.Path(folder).absolute(), keep
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self._pending: concurrent.futures.Future[None] | None = None
        self._saved: int | None = None  # the newest step that this object saved
        _do_not_measure_writes()
        self.failure: str | None = None
        """Why the last finished save failed, on one line; None if it succeeded."""

    @property
    def writing(self) -> bool:
        """Whether a save is in progress."""
        return self._pending is not None and not self._pending.done()

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        found = (path for path in self.folder.iterdir() if path.name.isdecimal() and (path / _LAST_FILE).is_file())
        return sorted(int(path.name) for path in found)

    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def newest_intact(self) -> int | None:
        """Return the step of the newest checkpoint whose files are as they were written; None if there is none.

        Damaged ones that are newer are renamed and logged. All processes must call this and get the same step; each
        reads a part of the files. Checkpoints of earlier versions have no checksums: of those, only the metadata is
        read, and `restore` may still find damage. Raises UserError, and renames nothing, if all are damaged or if a
        file cannot be read for another reason.
        """
        damaged: dict[pathlib.Path, str] = {}
        for path in hosts.value_of_process_0(self._candidates):
            found = hosts.values_of_all(self._damage(self.folder / path))
            reason = next(filter(None, found), None)
            if reason is None:
                break
            damaged[self.folder / path] = reason
        else:
            if damaged:
                raise UserError(
                    *(f"{path}: is damaged: {reason}" for path, reason in damaged.items()),
                    f"{self.folder}: no checkpoint is intact: restore one from a copy, or rename this folder and start "
                    "the run again from its first step (with --resume auto, or without --resume_from_checkpoint)",
                )
            return None
        for old, reason in damaged.items() if jax.process_index() == 0 else ():
            kept = self._set_aside(old)
            log.warning(f"{old}: is damaged: {reason}; the run goes on from step {path}, and it is kept as {kept.name}")
        hosts.barrier("damaged checkpoints are set aside")
        return int(path)

    def set_aside(self, step: int, reasons: Sequence[str | None]) -> None:
        """Rename a damaged checkpoint, and log it with the first of `reasons`. All processes must call this."""
        if jax.process_index() == 0:
            path = self.folder / str(step)
            kept = self._set_aside(path)
            log.warning(f"{next(filter(None, reasons))}; the one before is taken, and this is kept as {kept.name}")
        hosts.barrier("damaged checkpoints are set aside")

    def _candidates(self) -> list[str]:
        """Return the names of all folders of checkpoints that are not empty, newest first."""
        with reading_folders(self.folder):
            found = self.folder.iterdir() if self.folder.is_dir() else ()
            names = [path.name for path in found if path.name.isdecimal() and path.is_dir() and any(path.iterdir())]
        return sorted(names, key=int, reverse=True)

    def _damage(self, path: pathlib.Path) -> str | None:
        """Return what is wrong with this process's part of a checkpoint's files; None if nothing is."""
        with reading_folders(path):
            if checksums.is_sealed(path):
                return checksums.damage(path, jax.process_index(), jax.process_count())
            if not (path / _LAST_FILE).is_file():
                return f"{_LAST_FILE} is missing"
        try:
            self._read(int(path.name))
        except UserError as error:
            return str(error).removeprefix(f"{path}: ")
        return None

    def save(self, step: int, items: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """Wait for the previous save, then start to write a checkpoint; an existing checkpoint is left unchanged.

        `metadata` must be JSON-serialisable. An error, now or during the write, is logged as one line and not raised.
        """
        self.wait()
        if step == self._saved or step in self.steps():
            self.failure = None
            return
        leaves = {name: flat(tree) for name, tree in items.items()}
        custom = {"run": dict(metadata), "layout": {name: layout_of(tree) for name, tree in items.items()}}
        try:
            self._sweep()
            self.folder.mkdir(parents=True, exist_ok=True)
            with _context():
                path = os.fspath(self._unsealed(step))
                saving = ocp.save_checkpointables_async(path, _not_empty(leaves), custom_metadata=custom)
        except Exception as error:  # Orbax, TensorStore and file systems raise their own types
            self._failed(step, error)
            return
        self._pending = self._thread.submit(self._finish, step, saving)

    def wait(self) -> None:
        """Wait for the save in progress, if any; then `failure` tells whether it succeeded."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        """Wait for the save in progress and end the thread; a program that exits while Orbax writes would hang."""
        self.wait()
        self._thread.shutdown()

    def metadata(self, step: int) -> dict[str, Any]:
        """Return the `metadata` given to `save`. Raises UserError if the checkpoint is missing or damaged."""
        return self._read(step)["run"]

    def layout(self, step: int) -> dict[str, dict[str, str]]:
        """Return item → path → dtype and shape, `float32[28,10]`. Raises UserError as `metadata` does."""
        return self._read(step)["layout"]

    def restore(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
        """Return the items in `abstract`, whose trees of arrays or `jax.ShapeDtypeStruct`s define the shardings.

        The values are bit-identical to those saved. Raises UserError if a saved item is missing or has another layout,
        DamagedError if it is damaged.
        """
        wanted = {name: flat(tree) for name, tree in abstract.items()}
        layout = self.layout(step)
        for name, tree in abstract.items():
            if name not in layout:
                raise UserError(f"{self.folder / str(step)}: has no {name}, only {', '.join(sorted(layout))}")
            different = layout_differences(layout[name], layout_of(tree))
            if different:
                raise UserError(f"{self.folder / str(step)}: {name} has a different layout: {shorten(different)}")
        specs = {name: {path: _spec(leaf) for path, leaf in leaves.items()} for name, leaves in wanted.items()}
        with _context():
            found = self._damaged_if_raises(step, lambda path: ocp.load_checkpointables(path, _not_empty(specs)))
        restored = {}
        for name, tree in abstract.items():
            leaves = [
                found[name][path] if leaf.size else jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
                for path, leaf in specs[name].items()
            ]
            restored[name] = jax.tree.unflatten(jax.tree.structure(tree), leaves)
        return restored

    def _read(self, step: int) -> dict[str, Any]:
        found = self._damaged_if_raises(step, lambda path: ocp.checkpointables_metadata(path).custom_metadata)
        if not isinstance(found, dict) or not {"run", "layout"} <= found.keys():
            raise UserError(f"{self.folder / str(step)}: is not a checkpoint of this program")
        return found

    def _damaged_if_raises(self, step: int, read: Callable[[str], Any]) -> Any:
        path = os.fspath(self.folder / str(step))
        try:
            return read(path)
        except Exception as error:  # of any type, as in `save`
            # What Orbax says if any file of an item cannot be read, and the checkpoint is too old to have checksums.
            reason = "its files are damaged" if "incompatible handler" in str(error) else os_reason(error)
            sound = isinstance(error, MemoryError) or _NOT_DAMAGE.search(str(error))
            raise (UserError if sound else DamagedError)(f"{path}: cannot be read ({reason})") from error

    def _finish(self, step: int, saving: "ocp.AsyncResponse[None]") -> None:
        path = self.folder / str(step)
        try:
            saving.result()
            if jax.process_index() == 0:
                self._complete(step, path)
        except Exception as error:
            self._failed(step, error)
            return
        finally:
            self._wait_for_all(step)
            _return_freed_memory()
        if not path.is_dir():
            self._failed(step, UserError("process 0 could not complete it"))
            return
        self.failure, self._saved = None, step
        if self._keep is not None and jax.process_index() == 0:
            for old in self.steps()[: -self._keep]:
                path = self.folder / str(old)
                try:
                    # `_sweep` deletes this name, so half a checkpoint is never taken for a complete one.
                    shutil.rmtree(path.rename(self.folder / f"{old}.old"))
                except OSError as error:
                    log.warning(f"{path}: cannot be deleted: {os_reason(error)}")

    def _complete(self, step: int, path: pathlib.Path) -> None:
        """Make the checkpoint that Orbax wrote durable, and give it its name."""
        unsealed = self._unsealed(step)
        checksums.seal(unsealed)
        if path.exists():  # the remains of one: `steps` does not list it
            self._set_aside(path)
        unsealed.rename(path)
        for folder in (self.folder, *self.folder.parents[:2]):  # a new run's folders too
            sync_folder(folder)

    def _wait_for_all(self, step: int) -> None:
        """Wait until process 0 has completed the checkpoint, in the thread that saves: not with the devices."""
        if wait := multihost.get_barrier_sync_fn():
            wait(key=f"checkpoint of step {step}, {next(_BARRIERS)}", timeout_ms=1000 * SAVE_TIMEOUT_S)

    def _unsealed(self, step: int) -> pathlib.Path:
        """Return the path of a checkpoint that Orbax has written and that is not durable yet; `_sweep` deletes it."""
        return self.folder / f"{step}.unsealed"

    def _set_aside(self, path: pathlib.Path) -> pathlib.Path:
        """Rename a damaged checkpoint, so that it is neither used nor deleted, and return its new path."""
        new = path.with_name(f"{path.name}.{_DAMAGED}")
        for number in range(2, 100):
            if not new.exists():
                break
            new = path.with_name(f"{path.name}.{_DAMAGED}-{number}")
        return path.rename(new)

    def _failed(self, step: int, error: Exception) -> None:
        self._sweep()
        latest = self.latest()
        kept = "there is no earlier one" if latest is None else f"the newest is still that of step {latest}"
        self.failure = f"{self.folder}: the checkpoint of step {step} could not be saved ({os_reason(error)}); {kept}"
        log.warning(self.failure)

    def _sweep(self) -> None:
        """Delete the remains of interrupted saves and deletions."""
        if jax.process_index() == 0 and self.folder.is_dir():
            for path in self.folder.iterdir():
                if re.fullmatch(rf"\d+\.(?!{_DAMAGED}).+", path.name):
                    shutil.rmtree(path, ignore_errors=True)


def flat(tree: Any) -> dict[str, Any]:
    """Return path → array or `jax.ShapeDtypeStruct`. Containers without leaves (None, empty states) have no entry."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        for path, leaf in leaves
    }
    if len(found) != len(leaves):
        raise ValueError("two leaves of a tree have the same path")
    return found


def abstract_and_deleted(tree: Any, spared: set[int]) -> Any:
    """Return the shapes, dtypes and shardings of `tree`, and delete its arrays except those with the `spared` ids."""

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    tree = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf), tree)
    found = jax.tree.map(abstract, tree)
    for leaf in jax.tree.leaves(tree):
        if id(leaf) not in spared:
            leaf.delete()
    return found


def matching(tree: Any, pattern: re.Pattern[str]) -> dict[str, Any]:
    """Return the leaves whose path matches `pattern`, by path."""
    return {path: leaf for path, leaf in flat(tree).items() if pattern.search(path)}


def replaced(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """Return `tree` with the leaves at the paths in `leaves` replaced."""
    return jax.tree.unflatten(jax.tree.structure(tree), {**flat(tree), **leaves}.values())


def layout_of(tree: Any) -> dict[str, str]:
    """Return path → dtype and shape, `float32[28,10]`, of each leaf; `tree` may be abstract."""
    return {path: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for path, leaf in flat(tree).items()}


def layout_differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Describe every path that only one of two layouts has, or whose dtype or shape differs."""
    lines = [f"{path} was {old[path]}, now {new[path]}" for path in new if path in old and old[path] != new[path]]
    return lines + [f"{path} is gone" for path in old if path not in new] + [f"{p} is new" for p in new if p not in old]


def _context() -> ocp.Context:
    context = ocp.Context()
    context.asynchronous.timeout_secs = SAVE_TIMEOUT_S
    # Directories are created in the calling thread, where `save` can catch an error.
    context.asynchronous.create_directories_asynchronously = False
    context.array.saving.use_compression = False  # trained weights and moments hardly compress
    return context


def _not_empty(items: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Drop arrays without elements and items without arrays, which Orbax does not store; the layout lists them."""
    found = {name: {path: leaf for path, leaf in leaves.items() if leaf.size} for name, leaves in items.items()}
    return {name: leaves for name, leaves in found.items() if leaves}


def _spec(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
