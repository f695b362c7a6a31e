"""Models and adapters that a run exports, in diffusion-pipe's layout; sampling uses the newest."""

import contextlib
import importlib.metadata
import json
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from anima_jax.adapters import peft, peft_settings
from anima_jax.adapters.base_model import identify
from anima_jax.adapters.file import patches_of, write_adapter
from anima_jax.checkpoints.control import save_control
from anima_jax.checkpoints.locations import reading_folders, replacing, sync_folder, writing_to
from anima_jax.checkpoints.models import save_dit
from anima_jax.config.main import MainConfig
from anima_jax.errors import UserError, os_reason
from anima_jax.models.parameters import Params
from anima_jax.parallel.hosts import is_process_0
from anima_jax.training import control
from anima_jax.training.state import ParamPartition

MODEL_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"

EMA_FOLDER = "ema"
"""Subfolder of an export for the averaged weights, separate because diffusion-pipe's `init_from_existing` expects a
folder with a single file."""

EXPORT_FOLDER = re.compile(r"(epoch|step)(\d+)")
"""Names of the folders of exports."""

_REMAINS = re.compile(rf"\.{EXPORT_FOLDER.pattern}\.(old|partial)")
"""Names of folders that are being deleted or written."""

_UNFINISHED = re.compile(r"\.(step\d+\.png|.+\.safetensors|.+\.json|.+\.toml)\.[0-9a-f]{8}\.tmp")
"""Names under which `replacing` writes the files of a run."""

log = logging.getLogger(__name__)


class AboutAdapter(NamedTuple):
    """Description of an adapter, saved with it: the metadata of its file, and PEFT's settings."""

    metadata: Mapping[str, str]
    peft: Mapping[str, Any]


def about_adapter(config: MainConfig, partition: ParamPartition, step: int) -> AboutAdapter | None:
    """Return the description of a run's adapter; None if it trains none. Reads the whole base model file once."""
    adapter, base = config.adapter, config.model.transformer_files
    if adapter is None:
        return None
    metadata = {
        "format": "pt",
        "step": str(step),
        "version": f"anima_jax {_version()}",
        **(identify(base).metadata if base else {}),
    }
    if partition.control:
        return AboutAdapter({**metadata, **control.metadata(adapter, partition.control)}, {})
    assert partition.adapter_specs is not None
    alpha = adapter.rank if adapter.alpha is None else adapter.alpha
    metadata |= {"rank": str(adapter.rank), "alpha": f"{alpha:g}"}
    blocks = partition.config.adapter.blocks if partition.config.adapter else 0
    return AboutAdapter(
        metadata, peft_settings.settings(adapter, partition.adapter_specs, config.model.transformer_path, blocks)
    )


def _version() -> str:
    try:
        return importlib.metadata.version("anima-jax")
    except importlib.metadata.PackageNotFoundError:  # not installed: run from the source tree
        return "of no release"


def export(
    folder: pathlib.Path,
    partition: ParamPartition,
    params: Params,
    dtype: str,
    about: AboutAdapter | None = None,
    *,
    ema: Params | None = None,
    files: Mapping[str, bytes] = {},
    metadata: Mapping[str, str] = {},
    name: str | None = None,
) -> pathlib.Path:
    """Write `params`, the values of the trained parameters, to `folder`, as the full model or only the adapter.

    Averaged weights (`ema`) are written to `folder/ema`, and `files` (name → content) to `folder`. `metadata` is added
    to that of `about`. `name` is the file's without its ending; by default it is diffusion-pipe's. Until everything is
    written, it is in a hidden folder, which an error removes; files that `folder` already has are replaced at the end.
    Returns the path of the averaged weights' file if there is one, else of that of `params`.
    """
    with _completed(folder) as partial:
        own = f"{name}.safetensors" if name else ADAPTER_FILE if partition.is_adapter else MODEL_FILE
        path = _write(partial / own, partition, params, dtype, about, metadata)
        if ema is not None:
            path = _write(partial / EMA_FOLDER / own, partition, ema, dtype, about, metadata)
        for file_name, content in files.items() if is_process_0() else ():
            with replacing(partial / file_name) as file:
                file.write(content)
    return folder / path.relative_to(partial)


@contextlib.contextmanager
def _completed(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a folder to write to, whose files move to `folder` if the block succeeds. Only process 0 has them."""
    partial = folder.with_name(f".{folder.name}.partial")
    if not is_process_0():
        yield partial
        return
    try:
        shutil.rmtree(partial, ignore_errors=True)
        yield partial
        with writing_to(os.fspath(folder)):
            if folder.exists():
                for path in sorted(partial.rglob("*")):
                    target = folder / path.relative_to(partial)
                    if path.is_dir():
                        target.mkdir(exist_ok=True)
                    else:
                        path.replace(target)
                        sync_folder(target.parent)
            else:
                partial.rename(folder)
                sync_folder(folder.parent)
    except UserError as error:
        raise UserError(
            *(str(message).replace(f"/{partial.name}/", f"/{folder.name}/") for message in error.args)
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(
    path: pathlib.Path,
    partition: ParamPartition,
    params: Params,
    dtype: str,
    about: AboutAdapter | None,
    metadata: Mapping[str, str],
) -> pathlib.Path:
    if is_process_0():
        with writing_to(os.fspath(path.parent)):
            path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {**(about.metadata if about else {"format": "pt"}), **metadata}
    if partition.control:
        network = control.network_with(partition.control, params)
        save_control(path, network, dtype=jnp.dtype(dtype), metadata=metadata)
        return path
    if partition.adapter_specs is None:
        save_dit(path, partition.frozen | params, dtype=jnp.dtype(dtype), metadata=metadata)
        return path
    patches = patches_of(partition.frozen | params, partition.adapter_specs)
    write_adapter(path, patches, dtype=jnp.dtype(dtype), metadata=metadata)
    if about and about.peft and is_process_0():
        with replacing(path.with_name(peft.FILE)) as file:
            file.write(json.dumps(about.peft, indent=2).encode())
    return path


def rotate(run_folder: pathlib.Path, keep: int | None) -> list[str]:
    """Delete all but the newest `keep` of a run's `epoch…` folders and all but the newest `keep` `step…` folders.

    None deletes nothing. A folder without a model does not count, and stays. Returns the names of the deleted folders;
    a folder that cannot be deleted is logged.
    """
    found: dict[str, list[tuple[int, pathlib.Path]]] = {"epoch": [], "step": []}
    _remove_remains(run_folder)
    for path in _export_folders(run_folder):
        if any(path.glob("*.safetensors")):
            found[path.name.rstrip("0123456789")].append((int(re.sub(r"\D", "", path.name)), path))
    deleted = []
    for exports in found.values():
        for _, path in sorted(exports)[: 0 if keep is None else -keep]:
            try:
                # Rename first, so that a half-deleted export is never mistaken for a complete one.
                shutil.rmtree(path.rename(path.with_name(f".{path.name}.old")))
                deleted.append(path.name)
            except OSError as error:
                log.warning(f"{path}: cannot be deleted: {os_reason(error)}")
    return deleted


def sweep(run_folder: pathlib.Path) -> None:
    """Remove what killed or failed attempts left in a run's folder: unfinished files, half and empty exports.

    No other process may be writing to the folder.
    """
    _remove_remains(run_folder)
    for pattern in (".*.tmp", "*/.*.tmp", f"*/{EMA_FOLDER}/.*.tmp"):
        for path in filter(lambda path: _UNFINISHED.fullmatch(path.name), list(run_folder.glob(pattern))):
            with contextlib.suppress(OSError):
                path.unlink()
    for path in _export_folders(run_folder):
        for folder in (path / EMA_FOLDER, path):
            with contextlib.suppress(OSError):  # a folder with files stays
                folder.rmdir()


def _remove_remains(run_folder: pathlib.Path) -> None:
    for path in filter(lambda path: _REMAINS.fullmatch(path.name), list(run_folder.iterdir())):
        shutil.rmtree(path, ignore_errors=True)


def _export_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in folder.iterdir() if EXPORT_FOLDER.fullmatch(path.name) and path.is_dir()]


def find_export(path: str | os.PathLike[str]) -> pathlib.Path:
    """Return the model or adapter file at `path`: the file itself, or the newest export in a folder or run.

    Of an export with averaged weights, it is the file of those. Raises UserError if there is no model or adapter.
    """
    with reading_folders(path):
        return _find_export(pathlib.Path(path))


def _find_export(root: pathlib.Path) -> pathlib.Path:
    if root.is_file():
        return root
    if not root.is_dir():
        raise UserError(f"{root}: no such file or folder, expected a model, an adapter, or the folder of a run")
    runs = [folder for folder in root.iterdir() if folder.is_dir()]
    folders = _export_folders(root)
    for run in runs:
        with contextlib.suppress(PermissionError):  # such as lost+found
            folders += _export_folders(run)
    files = [file for folder in folders for file in exported(folder)] + _named(root) or exported(root)
    if not files or (len(files) > 1 and not folders and not _named(root)):
        raise UserError(
            f"{root}: contains no {MODEL_FILE}, no {ADAPTER_FILE} and {len(files)} other .safetensors files; expected "
            "one of these, or epoch… and step… folders"
        )
    newest = max(files, key=lambda file: file.stat().st_mtime_ns)
    averaged = newest.parent / EMA_FOLDER / newest.name
    return averaged if averaged.is_file() else newest


def _named(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the models and adapters in a folder with diffusion-pipe's names."""
    return [path for name in (MODEL_FILE, ADAPTER_FILE) if (path := folder / name).is_file()]


def exported(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the models and adapters in a folder: those with diffusion-pipe's names, or else all safetensors files."""
    others = (path for path in folder.glob("*.safetensors") if path.is_file() and not path.name.startswith("."))
    return _named(folder) or list(others)
