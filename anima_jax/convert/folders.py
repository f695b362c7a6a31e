"""A table of the files in a folder: a diffusers folder, a run of the trainer, or a collection of adapters."""

import contextlib
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping

from anima_jax.checkpoints import file_types
from anima_jax.checkpoints.folders import INDEXES, is_index, model_files
from anima_jax.checkpoints.locations import MODEL_SUFFIXES, reading_folders
from anima_jax.errors import UserError, plural, shorten, size_text

LIMIT = 1000
"""Maximum number of lines."""

_ORBAX = {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"}
_SUFFIXES = {
    ".toml": "a configuration (TOML)",
    ".jsonl": "figures of a run (JSON lines)",
    ".array_record": "cached latents and captions",
}


def table(folder: str, describe: Callable[[str], str]) -> Iterator[str]:
    """Yield a line that says what the folder is, then one per file: path, size, and what the file is.

    `describe(path)` describes a model or an adapter, or the files of an index. Those are described by their index, and
    files that an index does not list are marked. Hidden files are left out; a run's checkpoint is one line.
    """
    root, listed = pathlib.Path(folder), functools.cache(_listed)
    rows = []
    with reading_folders(folder):
        kind = _kind(root)
        for path in _entries(root):
            if len(rows) == LIMIT:
                break
            size = 0 if path.is_dir() else path.stat().st_size
            rows.append((str(path.relative_to(root)), size_text(size) if size else "", _what(path, describe, listed)))
    yield f"{folder}: {kind}, {plural(len(rows), 'file')}" + (" and more" if len(rows) == LIMIT else "")
    width = min(60, max((len(name) for name, _, _ in rows), default=0))
    for name, size, what in rows:
        yield f"{shorten([name]):<{width}}  {size:>8}  {what}".rstrip()


def _kind(root: pathlib.Path) -> str:
    if any((root / name).is_file() for name in INDEXES):
        return "a diffusers folder"
    if (root / "checkpoints").is_dir() or any(root.glob("epoch[0-9]*")) or any(root.glob("step[0-9]*")):
        return "the folder of a training run"
    if (root / "adapter_config.json").is_file():
        return "a folder with an adapter of PEFT"
    return "a folder"


def _entries(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield the files below a folder, sorted, and the folders of checkpoints instead of their files."""
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink() and not _is_checkpoint(path):
            yield from _entries(path)
        elif path.is_file() or path.is_dir():
            yield path


def _is_checkpoint(folder: pathlib.Path) -> bool:
    return any((folder / name).exists() for name in _ORBAX)


def _listed(folder: pathlib.Path) -> dict[str, str]:
    """Return file → index, for the files that the indexes in a folder list."""
    found: dict[str, str] = {}
    for index in folder.glob("*.json"):
        with contextlib.suppress(UserError):  # its own line says what is wrong
            found |= {os.path.basename(file): index.name for file in model_files(index).files if is_index(index.name)}
    return found


def _weights(path: pathlib.Path, describe: Callable[[str], str], listed: Mapping[str, str]) -> str:
    """Return what the files of an index or a file with weights are."""
    if path.name in listed:
        return f"a part of {listed[path.name]}"
    return f"{'not in an index: ' if listed and not is_index(path.name) else ''}{describe(str(path))}"


def _what(
    path: pathlib.Path, describe: Callable[[str], str], listed: Callable[[pathlib.Path], Mapping[str, str]]
) -> str:
    """Return what a file is, in one line."""
    if path.is_dir():
        return "a checkpoint to resume from" if _is_checkpoint(path) else "a link to a folder"
    try:
        if is_index(path.name) or path.suffix in MODEL_SUFFIXES:
            return _weights(path, describe, listed(path.parent))
        with open(path, "rb") as file:
            start = file.read(512)
    except UserError as error:
        return error.messages[0].removeprefix(f"{path}: ")
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if ".tfevents." in path.name:
        return "figures of a run (TensorBoard)"
    return _SUFFIXES.get(path.suffix) or file_types.describe(str(path), start) or "unknown"
