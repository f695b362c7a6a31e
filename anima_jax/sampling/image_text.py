"""The text in image files that says how the image was made: ours, ComfyUI's and A1111's.

A PNG has text chunks of these names: `anima_jax`, JSON with everything; `prompt`, ComfyUI's graph; `parameters`,
A1111's text. JPEG and WebP files hold them in their EXIF data (`sampling.exif`).
"""

import ast
import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal, get_type_hints

from PIL import Image
from pydantic import TypeAdapter, ValidationError

from anima_jax.checkpoints.stored import TRANSFORMER_DTYPES
from anima_jax.errors import UserError
from anima_jax.models.quantised import COMPUTED
from anima_jax.sampling.comfyui_graph import comfyui_graph
from anima_jax.sampling.comfyui_reader import from_comfyui
from anima_jax.sampling.controls import StoredControl
from anima_jax.sampling.exif import read_text
from anima_jax.sampling.flags import DTYPES
from anima_jax.sampling.images import read_image
from anima_jax.sampling.recipe import IMAGES, NETWORKS, Recipe, quoted
from anima_jax.sampling.regions import StoredRegion
from anima_jax.sampling.request import INPUTS, SIZE_STEP, ImageRequest, SamplingParams, read_utf8
from anima_jax.sampling.webui_text import from_webui, to_webui

OWN = "anima_jax"
"""The name of our own chunk."""

FIELDS: dict[str, Any] = {
    name: kind
    for name, kind in (get_type_hints(ImageRequest) | get_type_hints(SamplingParams)).items()
    if name not in INPUTS
}
"""Field of `ImageRequest` or `SamplingParams` → its type; `INPUTS` are not there."""

SIZE = ("width", "height")

LORAS = TypeAdapter(list[tuple[str, float | dict[str, float]]])

REFERENCES = TypeAdapter(list[tuple[str, str]])

REGIONS = TypeAdapter(list[StoredRegion])

CONTROLS = TypeAdapter(list[StoredControl])

REFERENCE_NODE = "the reference pictures, which need the node Apply Cosmos Reference Latent of ComfyUI-Cosmos-Reference"
"""What ComfyUI's own nodes cannot do: a graph with a node that is not installed would not be loaded."""

LOADING: dict[str, Any] = {
    "dtype": Literal[DTYPES],
    "comfyui_dora": bool,
    "variant": str,
    "transformer_dtype": Literal[TRANSFORMER_DTYPES],
    "compute": Literal[tuple(COMPUTED)],
}


def to_text(
    request: ImageRequest,
    params: SamplingParams,
    files: Mapping[str, Any],
    *,
    mask: Image.Image | None = None,
    hashes: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return chunk → text of an image.

    `files` are the arguments of `AnimaPipeline.load` and the images that it was made from (`IMAGES`); `mask` is opened,
    and `hashes` are those of some of the files, by path (`file_hashes`). `name_in_text` names pictures in memory.
    """
    values = request.settings() | dataclasses.asdict(params)
    named = {name: str(files[name]) for name in (*NETWORKS, *IMAGES) if files.get(name)}
    loading = {
        name: files[name] if kind is bool else str(files[name]) for name, kind in LOADING.items() if files.get(name)
    }
    adapters = [(str(path), weight) for path, weight in files.get("loras", ())]
    channel = "alpha" if mask is not None and mask.has_transparency_data else "red"
    controls = [control for control in request.controls if control.is_named]
    regions = request.regions
    inputs = {"regions": regions, "controls": controls}
    graph, left_out = comfyui_graph(values | inputs, named, adapters, channel)
    references = [(one.name, one.digest) for one in request.references]
    own = values | named | loading | {"loras": adapters} | ({"references": references} if references else {})
    own |= {"regions": [dataclasses.asdict(region.stored()) for region in regions]} if regions else {}
    stored = [dataclasses.asdict(control.stored((hashes or {}).get(control.name))) for control in controls]
    own |= {"controls": stored} if stored else {}
    if references:
        left_out = [*left_out, REFERENCE_NODE]
    own |= {"left_out_for_comfyui": left_out} if left_out else {}
    return {
        "parameters": to_webui(values | inputs, named, adapters, hashes or {}),
        "prompt": json.dumps(graph, allow_nan=False),
        OWN: json.dumps(own, allow_nan=False),
    }


def read_recipe(path: str) -> Recipe:
    """Return what an image says about how it was made. Raises UserError if it says nothing or cannot be read.

    A size that it does not say is its own. A file that ends in .json or .txt is a graph of ComfyUI's or A1111's text.
    """
    if chunk := {".json": "prompt", ".txt": "parameters"}.get(pathlib.Path(path).suffix.lower()):
        return from_text(path, {chunk: read_utf8(path)})
    image = read_image(path)
    recipe = from_text(path, read_text(image))
    sizes = {name: max(SIZE_STEP, side // SIZE_STEP * SIZE_STEP) for name, side in zip(SIZE, image.size, strict=True)}
    recipe.values = sizes | recipe.values
    return recipe


def from_text(path: str, text: Mapping[str, str]) -> Recipe:
    """Return what the chunks of the image `path` say. Raises UserError if they do not say how it was made."""
    if OWN in text:
        return _from_own(path, _parsed(path, OWN, text[OWN]))
    if "prompt" in text and "seed" in text:
        return _from_lines(path, text)
    if "prompt" in text:
        try:
            recipe = from_comfyui(path, _parsed(path, "prompt", text["prompt"]))
        except UserError:
            if "parameters" not in text:
                raise
        else:
            if "prompt" in recipe.values or "parameters" not in text:
                return recipe
    if "parameters" in text:
        return from_webui(path, text["parameters"])
    if "workflow" in text:
        raise UserError(f"{path}: has a workflow of ComfyUI's editor, but no prompt: the graph that was run")
    raise UserError(f"{path}: no parameters in its text chunks, expected an image of anima_jax, ComfyUI or A1111")


def _parsed(path: str, chunk: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its {chunk} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: its {chunk} is not a JSON object")
    return value


def _from_own(path: str, own: Mapping[str, Any]) -> Recipe:
    """Return what our own chunk says; a missing field means the default."""
    values = {name: _typed(path, name, TypeAdapter(kind), own[name]) for name, kind in FIELDS.items() if name in own}
    words = TypeAdapter(str)
    files = {name: _typed(path, name, words, own[name]) for name in (*NETWORKS, *IMAGES) if own.get(name)}
    loras = _typed(path, "loras", LORAS, own.get("loras", []))
    references = _typed(path, "references", REFERENCES, own.get("references", []))
    loading = {name: _typed(path, name, TypeAdapter(kind), own[name]) for name, kind in LOADING.items() if name in own}
    regions = _typed(path, "regions", REGIONS, own.get("regions", []))
    controls = _typed(path, "controls", CONTROLS, own.get("controls", []))
    return Recipe(path, values, files, loras, loading, references=references, regions=regions, controls=controls)


def _typed(path: str, name: str, kind: TypeAdapter[Any], value: Any) -> Any:
    try:
        return kind.validate_python(value)
    except (ValidationError, RecursionError):
        raise UserError(f"{path}: {name} {quoted(value)} in its text chunks") from None


def _from_lines(path: str, text: Mapping[str, str]) -> Recipe:
    """Return what a PNG of an early version says: a chunk for each field, numbers as in Python, one LoRA per line."""
    own: dict[str, Any] = dict(text)
    for name, kind in FIELDS.items():
        if name in text and kind is not str:
            try:
                words = [ast.literal_eval(word) for word in text[name].split(" ")]
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                raise UserError(f"{path}: {name} {quoted(text[name])} in its text chunks") from None
            own[name] = words if len(words) > 1 else words[0]
    lines = [re.fullmatch(r"(.*):([^:]*)", line) for line in text.get("lora", "").splitlines()]
    return _from_own(path, own | {"loras": [match.groups() for match in lines if match]})
