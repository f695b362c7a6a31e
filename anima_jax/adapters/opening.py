"""Opening of an adapter's files: one file, a folder with one, or PEFT's folder with a file for each network."""

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from anima_jax.adapters import peft
from anima_jax.checkpoints import locations
from anima_jax.checkpoints.joined import JoinedFile
from anima_jax.checkpoints.locations import PathLike
from anima_jax.checkpoints.tensor_files import TensorFile, open_tensors
from anima_jax.errors import UserError, shorten

WEIGHTS = "adapter_model.safetensors"
"""PEFT's name of an adapter's file."""

DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
"""Diffusers' name of it."""

NETWORKS = ("text_conditioner", "text_encoder")
"""Folders in PEFT's folder of the transformer's adapter, for the adapters of diffusers' other components."""


def files_of(path: PathLike) -> Mapping[str, PathLike]:
    """Return network → file of an adapter. The network "" is the transformer's, or that of a file with all networks.

    `path` is a file, a folder or repository with one, or a folder that `convert lora` writes for PEFT. The file of a
    folder has PEFT's or diffusers' name, or is the only safetensors file, such as the trainer writes. Raises UserError
    for a folder without an adapter or with several.
    """
    names = locations.files_in(path)
    if names is None:
        return {"": path}
    own = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    found = [name for name in (WEIGHTS, DIFFUSERS_WEIGHTS) if name in own] or own
    others = {network: name for network in NETWORKS if (name := f"{network}/{WEIGHTS}") in names}
    if len(found) > 1 or not (found or others):
        listed = f": {shorten(found)}" if found else ""
        raise UserError(f"{path}: holds {len(found)} .safetensors files, expected one adapter{listed}")
    files = dict(zip([""], found, strict=False)) | others
    return {network: f"{os.fspath(path).rstrip('/')}/{name}" for network, name in files.items()}


def open_adapter_file(path: PathLike) -> TensorFile:
    """Open an adapter's files as one. Raises UserError as `files_of` and `open_tensors` do."""
    files = files_of(path)
    with contextlib.ExitStack() as stack:
        opened = {network: stack.enter_context(open_tensors(file)) for network, file in files.items()}
        whole = opened[""] if opened.keys() == {""} else _joined(opened)
        stack.pop_all()
    return whole


_IN_ROOT = ("transformer", "text_conditioner")
"""Networks that a transformer with the original names contains."""


def _joined(files: Mapping[str, TensorFile]) -> TensorFile:
    """Return PEFT's files of several networks as one file, whose names begin with the network's folder.

    Their settings are in its metadata, as in a file of diffusers.
    """
    parts = [(f"{network}/" if network else "", file) for network, file in files.items()]
    joined = JoinedFile(next(iter(files.values())).path, parts)
    metadata: dict[str, str] = {}
    settings: dict[str, Any] = {}
    for network, file in files.items():
        own = peft.read_settings(file)
        own.check()
        metadata |= own.metadata
        if warning := own.warning(file.path):
            print(warning, file=sys.stderr)
        for component in [network] if network else [one for one in _IN_ROOT if one not in files]:
            settings |= {f"{component}.{key}": value for key, value in own.values.items()}
    joined.metadata = metadata | {peft.DIFFUSERS_SETTINGS: json.dumps(settings)}
    return joined
