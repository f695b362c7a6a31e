"""LoRAs that a prompt names: `<lora:NAME:0.8>`, or `<lora:NAME:0.8:0.5>` for transformer and text encoder.

`lyco` is another word for `lora`, and `te=0.5` and `unet=0.8` are A1111's names of the two weights. ComfyUI reads such
a tag as words, and so does the pipeline; `generate` applies it if `--lora_dir` says where the files are.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence

from anima_jax.adapters.merge import MODEL_AND_TEXT_ENCODER, Weight
from anima_jax.checkpoints.locations import folders_below
from anima_jax.errors import UserError, did_you_mean, one_line, shorten, show_value
from anima_jax.sampling.request import ImageRequest, SamplingParams

TAG = re.compile(r"<(?:lora|lyco):([^<>]*)>", re.IGNORECASE)

SUFFIX = ".safetensors"

Loras = Sequence[tuple[str, Weight]]


def without_tags(prompt: str) -> str:
    """Return the prompt as if its tags had never been written: without them and the gaps that they would leave."""
    text, *pieces = TAG.split(prompt)[::2]
    for piece in pieces:
        left, right = text.rstrip(), piece.lstrip()
        gap = text[len(left) :] or piece[: len(piece) - len(right)]
        if not left or left.endswith(","):
            right = right.removeprefix(",").lstrip()
        text = left + gap + right if left and right else left.removesuffix(",") or right
    return text


def tags(prompt: str) -> list[tuple[str, Weight]]:
    """Return the names in the prompt's tags, with their weights. Raises UserError for a tag that cannot be read."""
    return [_parsed(match[0], *match[1].split(":")) for match in TAG.finditer(prompt)]


def _parsed(tag: str, name: str, *arguments: str) -> tuple[str, Weight]:
    weights: dict[str, float] = {}
    for argument, place in zip(arguments, ("unet", "te", *arguments), strict=False):
        word, equals, number = argument.rpartition("=")
        try:
            weights[word if equals else place] = value = float(number)
        except ValueError:
            value = math.nan
        if not name.strip() or not math.isfinite(value) or not weights.keys() <= {"unet", "te"}:
            raise UserError(f"{tag}: expected <lora:NAME:WEIGHT> or <lora:NAME:MODEL:TEXT_ENCODER> with numbers")
    model = weights.get("unet", weights.get("te", 1.0))
    text_encoder = weights.get("te", model)
    both = dict(zip(MODEL_AND_TEXT_ENCODER, (model, text_encoder), strict=True))
    return name.strip(), model if model == text_encoder else both


def apply_tags(
    requests: Sequence[ImageRequest], params: SamplingParams, folder: str | None
) -> tuple[list[ImageRequest], SamplingParams, list[Loras]]:
    """Return requests and parameters without tags, and for each image the files and weights of its LoRAs.

    A tag in the prompt of a region applies to its image, one in the negative prompt to all images. Without a folder
    nothing changes. Raises UserError if a name is not that of exactly one file in `folder` or its sub-folders, or if a
    tag cannot be read.
    """
    if folder is None:
        return list(requests), params, [()] * len(requests)
    files = _files_in(folder)
    split = [split_tags(request, params) for request in requests]
    return (
        [request for request, _, _ in split],
        dataclasses.replace(params, negative_prompt=without_tags(params.negative_prompt)),
        [[(_find(folder, files, name), weight) for name, weight in own] for *_, own in split],
    )


def split_tags(
    request: ImageRequest, params: SamplingParams
) -> tuple[ImageRequest, SamplingParams, list[tuple[str, Weight]]]:
    """Return an image's request and parameters without tags, and the names and weights in those, as in `apply_tags`.

    Raises UserError for a tag that cannot be read.
    """
    regions = tuple(dataclasses.replace(one, prompt=without_tags(one.prompt)) for one in request.regions)
    prompts = request.prompt, *(region.prompt for region in request.regions), params.negative_prompt
    return (
        dataclasses.replace(request, prompt=without_tags(request.prompt), regions=regions),
        dataclasses.replace(params, negative_prompt=without_tags(params.negative_prompt)),
        [lora for prompt in prompts for lora in tags(prompt)],
    )


def shared_loras(loras_of_images: Sequence[Loras]) -> tuple[list[str], list[list[Weight]]]:
    """Return the files that any image uses, and for each image their weights, 0 for those that it does not use.

    A file that an image uses twice is there twice.
    """
    places: dict[tuple[str, int], int] = {}
    numbered: list[dict[tuple[str, int], Weight]] = []
    for loras in loras_of_images:
        own: dict[tuple[str, int], Weight] = {}
        for path, weight in loras:
            own[path, sum(path == used for used, _ in own)] = weight
        places |= {place: len(places) for place in own if place not in places}
        numbered.append(own)
    return [path for path, _ in places], [[own.get(place, 0.0) for place in places] for own in numbered]


def _files_in(folder: str) -> dict[str, list[str]]:
    """Return the adapters in a folder by their names without ending, with and without their sub-folders."""
    if not os.path.isdir(folder):
        raise UserError(f"--lora_dir {folder}: is not a folder")
    found: dict[str, list[str]] = {}
    for parent, names in folders_below(folder):
        for name in names:
            if name.lower().endswith(SUFFIX):
                path = os.path.join(parent, name)
                within = os.path.relpath(path, folder).replace(os.sep, "/")[: -len(SUFFIX)]
                for key in {within, within.rpartition("/")[2]}:
                    found.setdefault(key, []).append(path)
    return found


def _find(folder: str, files: dict[str, list[str]], name: str) -> str:
    plain = name.replace("\\", "/")
    found = files.get(plain) or files.get(plain.removesuffix(SUFFIX)) or []
    if len(found) != 1:
        near = did_you_mean(name, files)
        there = f"names {len(found)} files: {shorten(sorted(found))}" if found else f"there is no {name}{SUFFIX}{near}"
        raise UserError(f"<lora:{name}>: {there} in --lora_dir {folder}")
    return found[0]


def remark(prompt: str) -> str | None:
    """Return a line about tags that are read as words, or None if the prompt has none."""
    if found := TAG.search(prompt):
        shown = f"prompt '{show_value(prompt)}': {show_value(found[0])}"
        return one_line(f"{shown} is read as words, as in ComfyUI; --lora_dir DIR applies it")
    return None
