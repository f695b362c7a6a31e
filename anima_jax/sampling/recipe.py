"""How an image was made, read from a file: names and numbers that a stranger may have written.

A file that is named there is opened only if it is on this machine: an address in someone's image must not make this
machine contact another one. An image or mask to start from is opened only in the folder of the image that names it, or
in a folder that the user gives: others are private, and would appear in what is drawn.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from anima_jax.adapters.merge import MODEL_AND_TEXT_ENCODER, Weight
from anima_jax.checkpoints.locations import folders_below
from anima_jax.errors import UserError
from anima_jax.sampling.controls import StoredControl
from anima_jax.sampling.regions import StoredRegion

NETWORKS = ("transformer", "vae", "text_encoder", "tokenizers", "embeddings", "adapter")
"""Files and folders of a recipe that networks need, by the names of `AnimaPipeline.load`'s arguments."""

IMAGES = ("image", "mask")

PRIVATE = (*IMAGES, "reference", "region", "control_picture", "control_mask")
"""Kinds of files that are pictures of the user's."""

SUFFIXES = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
"""Endings that A1111 leaves out where it names a model."""

ANIMA_FILES = {"vae": "qwen_image_vae.safetensors", "text_encoder": "qwen_3_06b_base.safetensors"}
"""Names of Anima's own files, which A1111's text does not have."""

FOLDERS = {
    "transformer": ("diffusion_models", "unet", "checkpoints", "stable-diffusion"),
    "text_encoder": ("text_encoders", "clip", "text_encoder", "checkpoints"),
    "vae": ("vae", "checkpoints"),
    "lora": ("loras", "lora"),
    "image": ("input",),
    "mask": ("input",),
    "reference": ("input",),
    "region": ("input",),
    "control": ("model_patches", "controlnet"),
    "control_picture": ("input",),
    "control_mask": ("input",),
}
"""Kind of file → the folders of ComfyUI and Forge that hold it; they decide between files of one name."""


@dataclasses.dataclass
class Recipe:
    """What a file says about how an image was made.

    `values` are fields of `ImageRequest` and `SamplingParams`, `files` are names by kind (`NETWORKS`, `IMAGES`),
    `loras` names with weights, `loading` other arguments of `AnimaPipeline.load`, `messages` what the file says but
    cannot be followed, `references` names of reference pictures with their digests, and `regions` and `controls` those
    of the image.
    """

    path: str = ""
    values: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    files: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    loras: list[tuple[str, Weight]] = dataclasses.field(default_factory=list[tuple[str, Weight]])
    loading: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    messages: list[str] = dataclasses.field(default_factory=list[str])
    references: list[tuple[str, str]] = dataclasses.field(default_factory=list[tuple[str, str]])
    regions: list[StoredRegion] = dataclasses.field(default_factory=list[StoredRegion])
    controls: list[StoredControl] = dataclasses.field(default_factory=list[StoredControl])

    def find(self, kind: str, models: Sequence[str] = ()) -> str | None:
        """Return the path of the file that the recipe names as `kind`; see `find_file`.

        A VAE or text encoder that it does not name is Anima's own in `models`. Returns None if there is none.
        """
        if kind in self.files:
            return find_file(self.path, kind, self.files[kind], models)
        return next(iter(_search(kind, ANIMA_FILES.get(kind, ""), models)), None)

    def embeddings_folder(self, models: Sequence[str] = ()) -> str | None:
        """Return the folder of textual inversions, or None if no prompt needs one: that of the recipe or of `models`.

        Raises UserError if a prompt needs it and the recipe names one that is not here.
        """
        prompts = [self.values.get("prompt"), self.values.get("negative_prompt"), *(one.prompt for one in self.regions)]
        if not any("embedding:" in str(prompt) for prompt in prompts):
            return None
        folders = [os.path.join(folder, "embeddings") for folder in models]
        named = [name for kind, name in self.files.items() if kind == "embeddings" and not is_remote_name(name)]
        found = next((folder for folder in named + folders if os.path.isdir(folder)), None)
        return found or self.find("embeddings", models)

    def found_loras(self, models: Sequence[str] = ()) -> list[tuple[str, Weight]]:
        """Return the LoRAs' paths with their weights; see `find_file`."""
        return [(find_file(self.path, "lora", name, models), weight) for name, weight in self.loras]


def quoted(*words: object) -> str:
    """Return words from a file for a message: each in one line, without control characters, at most 100 of them."""
    shown = [repr(str(word))[1:-1] for word in words[:4]]
    more = f" and {len(words) - 4} more" if len(words) > 4 else ""
    return ", ".join(f"'{word if len(word) <= 100 else word[:97] + '…'}'" for word in shown) + more


def file_name(path: Any) -> str:
    """Return the last part of a path or an address."""
    return re.split(r"[\\/]", str(path))[-1]


def lora_weight(model: float, text_encoder: float) -> Weight:
    """Return a LoRA's weight from those of ComfyUI's LoraLoader."""
    both = (model, text_encoder)
    return model if model == text_encoder else dict(zip(MODEL_AND_TEXT_ENCODER, both, strict=True))


def model_and_text_encoder(weight: Weight) -> tuple[float, float]:
    """Return the weights of a LoRA for the transformer and for the text encoder, without those of parts of them."""
    if not isinstance(weight, Mapping):
        return weight, weight
    model = weight.get(MODEL_AND_TEXT_ENCODER[0], 1.0)
    return model, weight.get(MODEL_AND_TEXT_ENCODER[1], model)


_REMOTE = re.compile(r"[\\/]{2}|[\\/]\?\?[\\/]|[a-z][a-z0-9+.-]+:[\\/]|.*://", re.IGNORECASE | re.DOTALL)

_DEVICE = re.compile(
    r"(.*[\\/:])?(con|prn|aux|nul|(com|lpt)[0-9¹²³]|con(in|out)\$) *([.:][^\\/]*)?", re.IGNORECASE | re.DOTALL
)


def is_remote_name(name: str) -> bool:
    """Return whether opening `name` could contact something else than this machine's disks.

    That is an address, or a network share or device of Windows (Naming Files, Paths, and Namespaces).
    """
    return bool(_REMOTE.match(name) or _DEVICE.fullmatch(name))


def find_file(source: str, kind: str, name: str, models: Sequence[str]) -> str:
    """Return the path of a local file that the image `source` names.

    `models` are folders that are searched with all their sub-folders by the file's own name; then the name is taken as
    it is, relative to the current folder. An image to start from must then be in the folder of `source`, where it is
    also looked for. Raises UserError if the name is an address, or if no file or more than one has the name.
    """
    what = f"{source}: names the {kind.replace('_', ' ')} {quoted(name)}"
    flag = f"--{kind.removesuffix('_picture')}"
    if is_remote_name(name):
        raise UserError(f"{what}: an address that an image names is not opened; give it with {flag}")
    if found := _search(kind, name, models):
        if len(found) > 1:
            raise UserError(f"{what}, and there are {len(found)} of that name: {quoted(*found)}; choose with {flag}")
        return found[0]
    paths = (name, name.replace("\\", "/"))
    if kind in PRIVATE:
        paths = _in_folder(os.path.dirname(source), name)
    for path in paths:
        if os.path.isfile(path) or (kind in NETWORKS and os.path.isdir(path)):
            return path
    if kind in PRIVATE:
        raise UserError(f"{what}: there is no such file in the folder of {source}, or give {flag}")
    where = f"in {quoted(*models)}" if models else "here; --models DIR says where to look"
    raise UserError(f"{what}: there is no such file {where}, or give {flag}")


def _in_folder(folder: str, name: str) -> list[str]:
    """Return the paths in `folder`, or below it, that `name` can mean: as it is, from `folder`, or by its last part."""
    folder, forms = os.path.realpath(folder), (name, name.replace("\\", "/"))
    paths = [*forms, *(os.path.join(folder, each) for each in (*forms, forms[1].rpartition("/")[2]))]
    found: list[str] = []
    for path in paths:
        with contextlib.suppress(ValueError, OSError):  # null bytes, other drives
            if os.path.commonpath([os.path.realpath(path), folder]) == folder:
                found.append(path)
    return found


def _search(kind: str, name: str, models: Sequence[str]) -> list[str]:
    """Return the files in `models` with this name: those that fit best, which is one unless the choice is unclear."""
    parts = [part for part in re.split(r"[\\/]", name.casefold()) if part]
    if not parts:
        return []
    named = {parts[-1], *(parts[-1] + suffix for suffix in SUFFIXES if kind not in PRIVATE)}
    found = [path for folder in models for last, path in _files_in(folder) if last in named]
    for fits in (
        lambda path: os.path.basename(path).casefold() == parts[-1],
        lambda path: _folded(path)[-len(parts) :] == parts,
        lambda path: not set(_folded(path)).isdisjoint(FOLDERS.get(kind, ())),
    ):
        found = [path for path in found if fits(path)] or found
    return sorted({os.path.realpath(path): path for path in found}.values())


def _folded(path: str) -> list[str]:
    return path.casefold().replace("\\", "/").split("/")


def _files_in(folder: str) -> list[tuple[str, str]]:
    """Return the folder's files as (name in lower case, path). Raises UserError if it is not a folder."""
    if not os.path.isdir(folder):
        raise UserError(f"--models {folder}: is not a folder")
    return [(name.casefold(), os.path.join(parent, name)) for parent, names in folders_below(folder) for name in names]
