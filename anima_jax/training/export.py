"""What a run writes for others: models and adapters in diffusion-pipe's layout, the newest of which sampling takes."""

import os
import pathlib
import re

import jax.numpy as jnp

from anima_jax.checkpoints.adapters import save_lora
from anima_jax.checkpoints.models import save_dit
from anima_jax.errors import UserError
from anima_jax.models.parameters import Params
from anima_jax.training.state import Trained

MODEL_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"

_EXPORT_FOLDER = re.compile(r"(epoch|step)\d+")


def export(folder: pathlib.Path, trained: Trained, params: Params, dtype: str, scale: float = 1.0) -> pathlib.Path:
    """Write `params` in place of the trained parameters into `folder`: the whole model, or the adapter alone.

    The format of adapters has no scale, so a `scale` (alpha / rank) other than 1 is multiplied into B.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if trained.ranks is None:
        path = folder / MODEL_FILE
        save_dit(path, trained.frozen | params, dtype=jnp.dtype(dtype))
        return path
    path = folder / ADAPTER_FILE
    scaled = {name: value * scale if name.endswith(".lora_b") else value for name, value in params.items()}
    save_lora(path, scaled, trained.ranks, dtype=jnp.dtype(dtype))
    return path


def find_export(path: str | os.PathLike[str]) -> pathlib.Path:
    """The model or adapter that `path` means: a file itself, the one in a folder, or the newest of a run's folder.

    Raises UserError if there is none.
    """
    root = pathlib.Path(path)
    if root.is_file():
        return root
    if not root.is_dir():
        raise UserError(f"{root}: no such file or folder, expected a model, an adapter, or the folder of a run")
    runs = [root, *(folder for folder in root.iterdir() if folder.is_dir())]
    folders = [root, *(f for run in runs for f in run.iterdir() if f.is_dir() and _EXPORT_FOLDER.fullmatch(f.name))]
    files = [folder / name for folder in folders for name in (MODEL_FILE, ADAPTER_FILE) if (folder / name).is_file()]
    if not files:
        raise UserError(f"{root}: holds no {MODEL_FILE} and no {ADAPTER_FILE}, nor do its epoch… and step… folders")
    return max(files, key=lambda file: file.stat().st_mtime_ns)
