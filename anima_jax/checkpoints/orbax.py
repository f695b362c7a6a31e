"""Checkpoints of a run on disk, through Orbax (its v1 interface): `FOLDER/<step>` holds named items, pytrees of arrays.

Every item is stored as a flat table, path in the tree → array, whatever containers it is made of, and what is read is
compared with what is expected before anything is loaded: Orbax itself would cast and reshape. A checkpoint is written
under a temporary name and renamed when it is whole, so one that is being written when the process dies, or that finds
the disk full, leaves those before it as they were.
"""

import concurrent.futures
import logging
import os
import pathlib
import re
import shutil
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from anima_jax.errors import UserError, os_reason, shorten

log = logging.getLogger(__name__)

SAVE_TIMEOUT_S = 4 * 3600
"""After so many seconds a save that is not finished has failed; Orbax's own 20 minutes are short for a slow disk."""

_LAST_FILE = "_CHECKPOINT_METADATA"
"""What Orbax writes last; a copy of a folder that was cut short lacks it."""

_NO_ROOM = (
    (r"No space left|ENOSPC", "the disk is full"),
    (r"[Qq]uota exceeded|EDQUOT", "the disk quota is used up"),
    (r"File too large|EFBIG", "a file would be larger than this process may write (ulimit -f)"),
)

# Orbax logs each error with a traceback from every one of its threads; what it raises is reported here, once.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


def _unraisable(told: Any, before=sys.unraisablehook) -> None:
    # TensorStore's threads have news for an event loop that Orbax gave up when the disk was full.
    if str(told.exc_value) != "Event loop is closed":
        before(told)


sys.unraisablehook = _unraisable
warnings.filterwarnings("ignore", "coroutine 'async_serialize", RuntimeWarning)  # likewise


class RunCheckpoints:
    """The checkpoints in `folder`, of which the newest `keep` stay (None: all). One run writes to it at a time.

    Saving is asynchronous: the arrays may be donated as soon as `save` returns. Close it before the program ends.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int | None):
        self.folder, self._keep = pathlib.Path(folder).absolute(), keep
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self._pending: concurrent.futures.Future[None] | None = None
        self.failure: str | None = None
        """Why the last save that is finished failed, one line; None if it did not."""

    @property
    def writing(self) -> bool:
        """Whether a save is under way."""
        return self._pending is not None and not self._pending.done()

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are whole, oldest first."""
        if not self.folder.is_dir():
            return []
        found = (path for path in self.folder.iterdir() if path.name.isdecimal() and (path / _LAST_FILE).is_file())
        return sorted(int(path.name) for path in found)

    def latest(self) -> int | None:
        """Step of the newest checkpoint that is whole, None if there is none."""
        return max(self.steps(), default=None)

    def save(self, step: int, items: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint, once the one before is finished; one that exists stays as it is.

        `metadata` goes into JSON. What fails is logged as one line, now or when it happens, and nothing is raised.
        """
        self.wait()
        if step in self.steps():
            return
        leaves = {name: flat(tree) for name, tree in items.items()}
        custom = {"run": dict(metadata), "layout": {name: layout_of(tree) for name, tree in items.items()}}
        try:
            self._sweep()
            self.folder.mkdir(parents=True, exist_ok=True)
            with _context():
                path = os.fspath(self.folder / str(step))
                saving = ocp.save_checkpointables_async(path, _not_empty(leaves), custom_metadata=custom)
        except Exception as error:  # Orbax, TensorStore and the file system each have their own
            self._failed(step, error)
            return
        self._pending = self._thread.submit(self._finish, step, saving)

    def wait(self) -> None:
        """Until nothing is being written. `failure` tells how it went."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        """Wait, and end. A program that ends while Orbax is writing hangs instead."""
        self.wait()
        self._thread.shutdown()

    def metadata(self, step: int) -> dict[str, Any]:
        """What was given to `save`. Raises UserError if the checkpoint is not there or damaged."""
        return self._read(step)["run"]

    def layout(self, step: int) -> dict[str, dict[str, str]]:
        """Item → path → dtype and shape, `float32[28,10]`. Raises UserError as `metadata` does."""
        return self._read(step)["layout"]

    def restore(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
        """The items named in `abstract`, trees of arrays (or `jax.ShapeDtypeStruct`s) with the wanted shardings.

        The values are equal bit by bit to those saved. Raises UserError if what was saved has another layout, or is
        damaged.
        """
        wanted = {name: flat(tree) for name, tree in abstract.items()}
        layout = self.layout(step)
        for name, tree in abstract.items():
            if name not in layout:
                raise UserError(f"{self.folder / str(step)}: has no {name}, only {', '.join(sorted(layout))}")
            different = layout_differences(layout[name], layout_of(tree))
            if different:
                raise UserError(f"{self.folder / str(step)}: {name} is another: {shorten(different)}")
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
            raise UserError(f"{self.folder / str(step)}: is no checkpoint of this program")
        return found

    def _damaged_if_raises(self, step: int, read):
        path = self.folder / str(step)
        try:
            return read(path)
        except Exception as error:  # of every kind, see `save`
            older = [other for other in self.steps() if other < step]
            advice = f"; without that folder, the run goes on from step {older[-1]}" if older else ""
            raise UserError(f"{path}: cannot be read ({_reason(error)}){advice}") from error

    def _finish(self, step: int, saving: "ocp.AsyncResponse[None]") -> None:
        try:
            saving.result()
        except Exception as error:
            self._failed(step, error)
            return
        self.failure = None
        if self._keep is not None and jax.process_index() == 0:
            for old in self.steps()[: -self._keep]:
                path = self.folder / str(old)
                try:
                    # Under the name of what `_sweep` clears away: half of a checkpoint is never taken for one.
                    shutil.rmtree(path.rename(self.folder / f"{old}.old"))
                except OSError as error:
                    log.warning(f"{path}: cannot be deleted: {os_reason(error)}")

    def _failed(self, step: int, error: Exception) -> None:
        self._sweep()
        latest = self.latest()
        kept = "there is none before it" if latest is None else f"that of step {latest} stays the newest"
        self.failure = f"{self.folder}: the checkpoint of step {step} could not be saved ({_reason(error)}); {kept}"
        log.warning(self.failure)

    def _sweep(self) -> None:
        """Delete what killed or failed saves and deletions have left."""
        if jax.process_index() == 0 and self.folder.is_dir():
            for path in self.folder.iterdir():
                if re.fullmatch(r"\d+\..+", path.name):
                    shutil.rmtree(path, ignore_errors=True)


def flat(tree: Any) -> dict[str, Any]:
    """Path → array (or what stands for one). Containers without leaves (None, empty states) leave no trace."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        for path, leaf in leaves
    }
    if len(found) != len(leaves):
        raise ValueError("two leaves of a tree have the same path")
    return found


def layout_of(tree: Any) -> dict[str, str]:
    """Path → dtype and shape, `float32[28,10]`, of each leaf; `tree` may be abstract."""
    return {path: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for path, leaf in flat(tree).items()}


def layout_differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """A few words for every path of two layouts that one of them lacks or that has another dtype or shape."""
    lines = [f"{path} was {old[path]}, now {new[path]}" for path in new if path in old and old[path] != new[path]]
    return lines + [f"{path} is gone" for path in old if path not in new] + [f"{p} is new" for p in new if p not in old]


def _context() -> ocp.Context:
    context = ocp.Context()
    context.asynchronous.timeout_secs = SAVE_TIMEOUT_S
    # Here and now, where an error has a caller.
    context.asynchronous.create_directories_asynchronously = False
    context.array.saving.use_compression = False  # trained weights and moments hardly shrink
    return context


def _not_empty(items: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Without arrays of no elements, and items of no arrays: Orbax stores neither, but the layout knows them."""
    found = {name: {path: leaf for path, leaf in leaves.items() if leaf.size} for name, leaves in items.items()}
    return {name: leaves for name, leaves in found.items() if leaves}


def _spec(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _reason(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    known = (words for pattern, words in _NO_ROOM if re.search(pattern, text))
    return next(known, " ".join(text.split())[:200])
