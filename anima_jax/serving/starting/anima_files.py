"""Anima's three files: found on this machine by name and header, fetched from the hub, or told where they go."""

import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from anima_jax.checkpoints import hub, locations
from anima_jax.checkpoints.models import open_dit, open_network, open_text_encoder
from anima_jax.checkpoints.names.networks import WAN_VAE
from anima_jax.errors import UserError, size_text

REPOSITORY = "hf://circlestone-labs/Anima/split_files"


@dataclasses.dataclass(frozen=True)
class AnimaFile:
    """One of Anima's files: `flag` is its flag here and in `generate`, `folder` that of ComfyUI, `name` its own name.

    `pattern` is found in the lower-case names of such files, and `open` reads the header of one: it raises UserError if
    the file is something else.
    """

    flag: str
    folder: str
    name: str
    pattern: str
    open: Callable[[str], contextlib.AbstractContextManager[Any]]

    @property
    def address(self) -> str:
        """The address on the hub."""
        return f"{REPOSITORY}/{self.folder}/{self.name}"


def _open_vae(path: str) -> contextlib.AbstractContextManager[Any]:
    return open_network(WAN_VAE, path)


FILES = (
    AnimaFile("transformer", "diffusion_models", "anima-base-v1.0.safetensors", r"anima", open_dit),
    AnimaFile("vae", "vae", "qwen_image_vae.safetensors", r"qwen.?image.?vae|wan.*vae|anima", _open_vae),
    AnimaFile(
        "text_encoder", "text_encoders", "qwen_3_06b_base.safetensors", r"qwen.?3.?0?\.?6b|anima", open_text_encoder
    ),
)

ROOTS = (
    *("~/ComfyUI/models", "~/comfy/ComfyUI/models", "~/Documents/ComfyUI/models", "ComfyUI/models", "models"),
    *("~/ComfyUI_windows_portable/ComfyUI/models", "/workspace/ComfyUI/models", "/content/ComfyUI/models"),
    *("/content/drive/MyDrive/ComfyUI/models", "/opt/ComfyUI/models", "~/SwarmUI/Models", "/kaggle/input"),
    *("~/stable-diffusion-webui/models", "~/stable-diffusion-webui-forge/models", "~/sd-webui-forge-neo/models"),
    *("/workspace/stable-diffusion-webui-forge/models", "~/Forge/webui/models", "~/StabilityMatrix/Models"),
)
"""Where ComfyUI, A1111, Forge and others keep models; `COMFYUI_PATH` names one more ComfyUI."""

MOST_FILES = 2000
"""Model files whose headers are read in one folder at most."""


@dataclasses.dataclass
class Found:
    """The files that were found: flag → path. `messages` are about files with fitting names that cannot be used."""

    paths: dict[str, str]
    messages: list[str]

    @property
    def missing(self) -> list[AnimaFile]:
        """The files that were not found."""
        return [file for file in FILES if file.flag not in self.paths]


def find(given: Mapping[str, str], folders: Sequence[str]) -> Found:
    """Return Anima's files: those `given` (flag → path or address), those in `folders`, in the hub's cache, in `ROOTS`.

    Raises UserError if a given file is no such network, or a folder of `folders` does not exist.
    """
    found = Found({}, [])
    for file in FILES:
        if path := given.get(file.flag):
            if not path.startswith("hf://"):
                with file.open(path):
                    found.paths[file.flag] = os.path.abspath(path)
            else:
                found.paths[file.flag] = path
    for folder in folders:
        if not os.path.isdir(folder):
            raise UserError(f"--models {folder}: no such folder")
        _look_in(folder, found)
    for file in found.missing:
        if (cached := hub.cached_copy(file.address)) and _is(file, cached, found):
            found.paths[file.flag] = cached
    for folder in model_folders():
        if found.missing:
            _look_in(folder, found)
    return found


def model_folders() -> list[str]:
    """Return the folders of `ROOTS` that exist, and that of `COMFYUI_PATH`."""
    own = [os.path.join(path, "models") for path in [os.environ.get("COMFYUI_PATH")] if path]
    places = [os.path.abspath(os.path.expanduser(path)) for path in (*own, *ROOTS)]
    return [path for path in dict.fromkeys(places) if os.path.isdir(path)]


def _look_in(folder: str, found: Found) -> None:
    """Add the files that are missing and in a folder or below it; those with Anima's own names come first."""
    files: list[str] = []
    for parent, names in locations.folders_below(folder):
        files += [os.path.join(parent, name) for name in names if name.lower().endswith(locations.MODEL_SUFFIXES)]
        if len(files) > MOST_FILES:
            break
    for file in found.missing:
        named = [path for path in files if re.search(file.pattern, os.path.basename(path).lower())]
        for path in sorted(named, key=lambda path, own=file.name: (os.path.basename(path) != own, path)):
            if _is(file, path, found):
                found.paths[file.flag] = os.path.abspath(path)
                break


def _is(file: AnimaFile, path: str, found: Found) -> bool:
    """Return whether a file's header is that of this network; if its name says so but it is not, tell why."""
    try:
        with file.open(path):
            return True
    except UserError as error:
        if os.path.basename(path) == file.name:
            found.messages.append(f"{path} is not used: {error.messages[0].removeprefix(f'{path}: ')}")
    except OSError as error:
        found.messages.append(f"{path} is not used: {error.strerror or error}")
    return False


def download_size(files: Sequence[AnimaFile]) -> tuple[int, str]:
    """Return the bytes to download for these files, and a table of their sizes.

    Raises UserError if the hub does not tell them, or if the disk has too little space.
    """
    lines, rest = [], 0
    for file in files:
        size, here = hub.availability(file.address)
        so_far = f", {size_text(here)} of it here already" if here else ""
        lines.append(f"  {file.name}  {size_text(size)}{so_far}")
        rest += size - here
    folder = hub.cache_folder()
    there = next(parent for parent in (pathlib.Path(folder), *pathlib.Path(folder).parents) if parent.is_dir())
    free = shutil.disk_usage(there).free
    if free < rest:
        raise UserError(
            f"{folder}: {size_text(rest)} are needed and {size_text(free)} are free; HF_HOME=FOLDER uses another folder"
        )
    lines.append(f"  together {size_text(rest)} to download to {folder}, where {size_text(free)} are free")
    return rest, "\n".join(lines)


def fetch(files: Sequence[AnimaFile]) -> dict[str, str]:
    """Download files that are not here yet, each compared with its hash; return flag → path.

    What an earlier attempt has left is used; a file that arrives damaged is fetched once more. Raises UserError.
    """
    paths = {}
    for file in files:
        try:
            paths[file.flag] = hub.local_copy(file.address)
        except hub.DamagedDownloadError as error:
            print(f"{error}")
            paths[file.flag] = hub.local_copy(file.address)
    return paths


def where_files_go(files: Sequence[AnimaFile]) -> Iterator[str]:
    """Yield lines that say which file goes where, for machines without a network."""
    folder = next(iter(model_folders()), os.path.abspath("models"))
    from huggingface_hub import constants

    owner, repo, files_below = REPOSITORY.removeprefix("hf://").split("/")
    page = f"{constants.ENDPOINT}/{owner}/{repo}/tree/main/{files_below}"
    yield f"Anima's files, from {page} (on another machine if need be), are found at the next start if they are here:"
    for file in files:
        yield f"  {file.folder}/{file.name}  →  {os.path.join(folder, file.folder, file.name)}"
    yield "  or anywhere else: --models FOLDER looks in it and below it, as in ComfyUI's and Forge's folders anyway"
