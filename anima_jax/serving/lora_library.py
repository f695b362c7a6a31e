"""The library of a server: the adapters and control networks in its folders, by name.

A name is a file's path within its folder, with "/" and without the suffix, or just the last part of that if no other
file has it. A folder that PEFT wrote is one adapter. Folders that have changed are read again whenever a name is looked
up, so new files are found at once; files outside of the folders are never opened, whatever a name or a link says.
"""

import collections
import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from anima_jax.adapters.file import Adapter, adapter_in, read_adapter
from anima_jax.adapters.opening import NETWORKS, WEIGHTS, open_adapter_file
from anima_jax.adapters.patch import Part
from anima_jax.adapters.peft import FILE as CONFIG
from anima_jax.checkpoints.control import holds_control
from anima_jax.checkpoints.locations import PathLike
from anima_jax.checkpoints.names.networks import TEXT_ENCODER
from anima_jax.errors import UserError, did_you_mean, os_reason, shorten, show_value
from anima_jax.sampling.prompt_loras import SUFFIX, split_tags
from anima_jax.serving.orders import Order

KEPT_BYTES = 2 * 2**30
"""Host memory for adapters that were used before."""

TRIGGERS = 10
"""Most frequent words of an adapter's training captions that are shown as its trigger words."""

SETTLED = 2 * 10**9
"""Nanoseconds after which a folder's time of change has certainly changed with the next file."""

Fingerprint = tuple[str, int, int]
"""Path, time of the last change and size: what tells a file from what had its name before."""


@dataclasses.dataclass(frozen=True)
class LibraryEntry:
    """A file of the library: its name, its size in bytes, and the time of its last change in seconds since 1970.

    Of an adapter also its kind, largest rank, trigger words, and whether it changes the text encoder.
    """

    name: str
    bytes: int
    modified: float
    kind: str = ""
    rank: int | None = None
    trigger: tuple[str, ...] = ()
    text_encoder: bool = False


class LoraLibrary:
    """The adapters in folders, and the control networks in others. Its methods may be called from any thread.

    `kept_bytes` of host memory hold the adapters that were used last. `allow_unused` and `comfyui_dora` are those of
    `AnimaPipeline.load`. Raises UserError for a folder that is none.
    """

    def __init__(
        self,
        *folders: PathLike,
        controls: Sequence[PathLike] = (),
        allow_unused: bool = False,
        comfyui_dora: bool = False,
        kept_bytes: int = KEPT_BYTES,
    ):
        for flag, paths in (("--lora_dir", folders), ("--control_dir", controls)):
            for path in paths:
                if not os.path.isdir(path):
                    raise UserError(f"{flag} {os.fspath(path)}: is not a folder")
        self._folders = [os.fspath(path) for path in folders]
        self._control_folders = [os.fspath(path) for path in controls]
        self.allow_unused, self.comfyui_dora, self._kept_bytes = allow_unused, comfyui_dora, kept_bytes
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[Fingerprint, Adapter] = collections.OrderedDict()
        self._entries: dict[tuple[Any, ...], LibraryEntry | None] = {}
        self._added: dict[str, dict[str, str]] = {"lora": {}, "control": {}}
        self._walked: dict[str, tuple[dict[str, int | None], dict[str, str]]] = {}

    def add(self, what: Literal["lora", "control"], name: str, path: PathLike) -> None:
        """Add an adapter or control network that is in none of the folders, such as one that a run has exported."""
        self._added = {**self._added, what: {**self._added[what], name: os.fspath(path)}}

    def loras(self) -> list[LibraryEntry]:
        """Return the adapters, by name. Files that hold none are left out."""
        return self._listed(self._files("lora"), _adapter_entry)

    def controls(self) -> list[LibraryEntry]:
        """Return the control networks, by name. Other files are left out."""
        return self._listed(self._files("control"), _control_entry)

    def lora_paths(self) -> Mapping[str, str]:
        """Return name → path of the adapters."""
        return self._files("lora") or {}

    def lora(self, name: str) -> str:
        """Return the path of the adapter of this name. Raises UserError if there is not exactly one."""
        return _found("lora", self._files("lora"), name)

    def control(self, name: str) -> str:
        """Return the path of the control network of this name. Raises UserError if there is not exactly one."""
        path = _found("control", self._files("control"), name)
        if not holds_control(path):
            raise UserError(f"control '{show_value(name)}': is not a control network")
        return path

    def tagged(self, order: Order) -> Order:
        """Return an order with the LoRAs that its prompts name, as in `<lora:NAME:0.8>`, and prompts without such tags.

        Nothing changes without a place for adapters. Raises UserError for a tag that cannot be read.
        """
        if not (self._folders or self._added["lora"]):
            return order
        request, params, found = split_tags(order.request, order.params)
        return dataclasses.replace(order, request=request, params=params, loras=(*order.loras, *found))

    def adapter(self, name: str) -> tuple[Fingerprint, Adapter]:
        """Return an adapter in host memory, and what tells it from other files.

        Raises UserError if there is not exactly one of this name, if it cannot be read, or for values that are not
        finite, which would only show as an image that cannot be drawn.
        """
        path = self.lora(name)
        key = _fingerprint(path)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return key, self._kept[key]
        # Messages name the adapter as its user does: paths of the server are its own business.
        shown = f"lora '{show_value(name)}'"
        try:
            with open_adapter_file(_opened_at(path)) as file:
                adapter = adapter_in(file, allow_unused=self.allow_unused)
                patches = {
                    module: patch.with_parts({part: _in_memory(one) for part, one in patch.parts.items()})
                    for module, patch in adapter.patches.items()
                }
        except UserError as error:
            raise UserError(str(error).replace(_opened_at(path), shown)) from error
        parts = [(module, part) for module, patch in patches.items() for part in patch.parts.values()]
        if broken := [module for module, part in parts if not np.isfinite(part.float32()).all()]:
            raise UserError(f"{shown}: has NaN or infinite values in {shorten([*dict.fromkeys(broken)])}")
        adapter = dataclasses.replace(adapter, path=shown, patches=patches)
        with self._lock:
            self._kept[key] = adapter
            while len(self._kept) > 1 and sum(map(_bytes, self._kept.values())) > self._kept_bytes:
                self._kept.popitem(last=False)
        return key, adapter

    def _files(self, what: str) -> dict[str, str] | None:
        """Return name → file of the adapters or control networks; None if there is no place for them."""
        folders, added = self._folders if what == "lora" else self._control_folders, self._added[what]
        found = [self._files_in(folder) for folder in reversed(folders)]  # the first folder's come first
        return {name: path for files in (*found, added) for name, path in files.items()} if folders or added else None

    def _files_in(self, folder: str) -> Mapping[str, str]:
        """Return name → file of a folder, as they were if neither it nor a folder in it has changed."""
        times, files = self._walked.get(folder, ({}, {}))
        if not times or any(_changed(path) != changed for path, changed in times.items()):
            now, times = time.time_ns(), dict[str, int | None]()
            files = _files(folder, times)
            if all(changed is not None and changed < now - SETTLED for changed in times.values()):
                self._walked[folder] = times, files
        return files

    def _listed(
        self, files: Mapping[str, str] | None, read: Callable[[str, str], LibraryEntry | None]
    ) -> list[LibraryEntry]:
        entries: dict[tuple[Any, ...], LibraryEntry | None] = {}
        for name, path in (files or {}).items():
            try:
                key = read, name, _fingerprint(path)
                entries[key] = self._entries[key] if key in self._entries else read(name, path)
            except (UserError, OSError):  # such as a file that is still being copied
                continue
        others = {key: entry for key, entry in self._entries.items() if key[0] is not read}
        self._entries = others | entries  # those of files that are gone or changed are forgotten
        return sorted((entry for entry in entries.values() if entry), key=lambda entry: entry.name)


def _files(folder: str, times: dict[str, int | None]) -> dict[str, str]:
    """Return name → file, or PEFT's folder, for all files in a folder; `times` gets when which folder changed.

    A link that leads out of its folder is left out, as is a folder that is a link.
    """
    found: dict[str, str] = {}
    root = os.path.realpath(folder)
    times |= {path: _changed(path) for path in (folder, root)}
    for parent, children, names in os.walk(root):
        times |= {path: _changed(path) for child in children for path in [os.path.join(parent, child)]}
        within = os.path.relpath(parent, root).replace(os.sep, "/")
        is_peft = WEIGHTS in names and within != "."
        if is_peft:
            children[:] = [child for child in children if child not in NETWORKS]
        for name in names:
            stem = f"{within}/{name[: -len(SUFFIX)]}".removeprefix("./")
            if name.lower().endswith(SUFFIX) and _is_inside(os.path.join(parent, name), root):
                found.setdefault(within if is_peft and name == WEIGHTS else stem, os.path.join(parent, name))
    return found


def _changed(path: str) -> int | None:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None


def _is_inside(path: str, root: str) -> bool:
    """Return whether a file, and all that is read with it, is below the real path `root`."""
    real = [os.path.realpath(one) for one in _read_with(path)]
    return os.path.isfile(path) and all(os.path.commonpath([one, root]) == root for one in real)


def _read_with(path: str) -> list[str]:
    """Return the file and those that PEFT puts beside it, where there are any."""
    folder, name = os.path.split(path)
    names = (CONFIG, *(f"{network}/{file}" for network in NETWORKS for file in (WEIGHTS, CONFIG)))
    beside = (os.path.join(folder, one) for one in (names if name == WEIGHTS else names[:1]))
    return [path, *filter(os.path.lexists, beside)]


def _found(what: str, files: Mapping[str, str] | None, name: str) -> str:
    """Return the path of a name. Raises UserError unless it names one file."""
    if files is None:
        raise UserError(f"{what} '{show_value(name)}': the server has no folder for it, expected --{what}_dir")
    plain = name.replace("\\", "/").removesuffix(SUFFIX)
    fitting = [plain] if plain in files else [one for one in files if one.rpartition("/")[2] == plain]
    if len(fitting) > 1:
        raise UserError(f"{what} '{show_value(name)}': names {len(fitting)} files: {shorten(sorted(fitting))}")
    if not fitting:
        raise UserError(f"{what} '{show_value(name)}': there is none of this name{did_you_mean(plain, files)}")
    return files[fitting[0]]


def _opened_at(path: str) -> str:
    """Return what opens an adapter as a whole: PEFT's folder if the file is in one, else the file."""
    folder, name = os.path.split(path)
    return folder if name == WEIGHTS else path


def _fingerprint(path: str) -> Fingerprint:
    try:
        found = [os.stat(one) for one in _read_with(path)]
    except OSError as error:
        raise UserError(f"{os.path.basename(path)}: cannot be read: {os_reason(error)}") from error
    return path, max(one.st_mtime_ns for one in found), sum(one.st_size for one in found)


def _in_memory(part: Part) -> Part:
    values = np.array(part.read())  # A view of the file would keep that open.
    return dataclasses.replace(part, read=lambda: values)


def _bytes(adapter: Adapter) -> int:
    return sum(part.read().nbytes for patch in adapter.patches.values() for part in patch.parts.values())


def _adapter_entry(name: str, path: str) -> LibraryEntry | None:
    """Return what is known of an adapter without reading its values, or None if the file is none."""
    with open_adapter_file(_opened_at(path)) as file:
        adapter = read_adapter(file)
    if not adapter.patches:
        return None
    kinds = dict.fromkeys(patch.kind.title for patch in adapter.patches.values())
    return LibraryEntry(
        name,
        *_size_and_time(path),
        kind=" and ".join(kinds),
        rank=max((patch.rank or 0 for patch in adapter.patches.values()), default=0) or None,
        trigger=triggers(adapter.metadata),
        text_encoder=any(module.startswith(TEXT_ENCODER) for module in adapter.patches),
    )


def _control_entry(name: str, path: str) -> LibraryEntry | None:
    return LibraryEntry(name, *_size_and_time(path)) if holds_control(path) else None


def _size_and_time(path: str) -> tuple[int, float]:
    _, modified, size = _fingerprint(path)
    return size, modified / 1e9


def triggers(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Return an adapter's trigger words from its file's metadata: ModelSpec's, or the most frequent of sd-scripts'."""
    if phrase := metadata.get("modelspec.trigger_phrase", "").strip():
        return (phrase,)
    counts: collections.Counter[str] = collections.Counter()
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        for tags in json.loads(metadata.get("ss_tag_frequency", "{}")).values():
            counts.update({tag.strip(): int(count) for tag, count in tags.items()})
    return tuple(tag for tag, _ in counts.most_common(TRIGGERS))
