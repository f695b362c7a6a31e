"""What a command line of `generate` asks for: each value comes from the first source that sets it.

The sources are flags, the older image of `--like`, the training configuration of `--config`, and the defaults.
"""

import argparse
import dataclasses
import itertools
import pathlib
import re
import secrets
import sys
from collections import ChainMap
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageOps

from anima_jax.checkpoints.control import open_control
from anima_jax.checkpoints.locations import writing_to
from anima_jax.checkpoints.models import Checkpoint
from anima_jax.config.main import MainConfig
from anima_jax.diffusion.samplers import OPTIONS, SAMPLERS, check_options
from anima_jax.errors import UserError, plural
from anima_jax.models.control import PATCH
from anima_jax.parallel import hosts
from anima_jax.parallel.rules import AXES
from anima_jax.sampling.controls import WITH_MASK, Control, with_kinds
from anima_jax.sampling.file_hashes import file_hash
from anima_jax.sampling.image_text import read_recipe
from anima_jax.sampling.images import image_format
from anima_jax.sampling.recipe import Recipe, find_file, quoted
from anima_jax.sampling.references import Reference
from anima_jax.sampling.regions import Region
from anima_jax.sampling.request import (
    APG,
    PLAIN,
    RANDOM_SEED,
    SIZE_STEP,
    ImageRequest,
    SamplingParams,
    expand_request,
    read_prompts,
)


def mesh_sizes(arguments: argparse.Namespace, config: MainConfig | None) -> dict[str, int]:
    """Return the number of devices along each axis: from the flag, else the configuration, else all along `data`.

    Raises UserError for an unknown axis, an invalid size or more than one -1, and for previews in several processes.
    """
    if getattr(arguments, "preview", None) and not hosts.is_single_process():
        raise UserError("--preview: works in a single process only")
    if arguments.mesh is None and config:
        return config.mesh.sizes
    sizes = {axis: -1 if axis == "data" else 1 for axis in AXES}
    for text in arguments.mesh or []:
        axis, equals, size = text.partition("=")
        if axis not in sizes or not equals or not re.fullmatch(r"-1|[1-9]\d*", size):
            raise UserError(f"--mesh {text}: expected AXIS=N, one of {', '.join(AXES)} and a number of devices, or -1")
        sizes[axis] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise UserError("--mesh: at most one axis may be -1 (data is, unless set)")
    return sizes


def given(**values: Any) -> dict[str, Any]:
    """Return the values that are set, as one layer of a `ChainMap`, where the first layer with a key wins."""
    return {name: value for name, value in values.items() if value not in (None, "", [])}


def older_image(arguments: argparse.Namespace) -> Recipe:
    """Return what the image of `--like` says, or nothing; prints what of it is left out.

    Raises UserError if the file does not say how an image was made.
    """
    if not arguments.like:
        return Recipe()
    like = read_recipe(arguments.like)
    if not (arguments.image or "image" in like.files) and like.values.pop("denoise", 1.0) != 1.0:
        like.messages.append("it started from an image that it does not name: give --image and --denoise")
    if (arguments.transformer or arguments.config or arguments.checkpoint) and not arguments.models:
        for name, weight in [] if arguments.lora else like.loras:
            like.messages.append(
                f"its LoRA {quoted(name)} at {weight} belongs to its own transformer and is left out; "
                "--models DIR or --lora applies it"
            )
    for message in like.messages if hosts.is_process_0() else []:
        print(f"{arguments.like}: {message}", file=sys.stderr)
    return like


SUPERSEDED = {
    "sigmas": ("denoise",),
    "steps": ("sigmas",),
    "schedule": ("sigmas",),
    "denoise": ("sigmas",),
    "cache": ("cache_interval",),
}
"""Flag → parameters of the older image that it replaces, too."""


def sampling_params(arguments: argparse.Namespace, config: MainConfig | None, like: Recipe) -> SamplingParams:
    """Return the parameters, each from the first of these that sets it: flags, older image, configuration, default."""
    names = {field.name for field in dataclasses.fields(SamplingParams)} - {"sampler_options"}
    flags = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if flags.get("paste") is False:
        flags["paste"] = None
    for name in ("guidance_interval", "cache_interval"):
        if name in flags:
            flags[name] = tuple(flags[name])
    if levels := flags.get("sigmas"):
        flags["sigmas"] = tuple(itertools.chain(*levels))
    if any(name in flags for name in APG):
        flags.setdefault("apg", True)
    superseded = {name for flag, others in SUPERSEDED.items() if flag in flags for name in others}
    superseded |= set(APG) if flags.get("apg") is False else set()
    superseded |= {"base_strength"} if arguments.region == [] else set()
    older = {name: like.values[name] for name in names - superseded if name in like.values}
    sample = config.sample if config else None
    configured = sample.sampling if sample else {}
    params = SamplingParams(**ChainMap(flags, older, configured))
    # The older image's options belong to its sampler.
    kept = like.values.get("sampler_options", {}) if older.get("sampler") == params.sampler else {}
    return dataclasses.replace(params, sampler_options=kept | sampler_options(arguments, params.sampler))


def sampler_options(arguments: argparse.Namespace, sampler: str) -> dict[str, Any]:
    """Return the options of the sampler that flags set. Raises UserError if it does not have one, or for its value."""
    options: dict[str, Any] = {}
    for text in arguments.sampler_options or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--sampler_options {text}: expected NAME=VALUE")
        options[name] = value
    options |= {name: value for name in OPTIONS if (value := getattr(arguments, name, None)) is not None}
    return check_options(sampler, options) if sampler in SAMPLERS else options


def reference_pictures(arguments: argparse.Namespace, like: Recipe) -> tuple[Reference, ...]:
    """Return the references that flags name, else those of the older image.

    Prints which of the latter have changed. Raises UserError if one is not found or cannot be read.
    """
    if arguments.reference is not None:
        return tuple(map(Reference.of, arguments.reference))
    found = list[Reference]()
    for name, digest in like.references:
        found.append(Reference.of(find_file(like.path, "reference", name, arguments.models)))
        if digest not in {"", found[-1].digest}:
            _say_changed(f"{found[-1].path}: is not the reference", like)
    return tuple(found)


def given_regions(arguments: argparse.Namespace, like: Recipe) -> tuple[Region, ...]:
    """Return the regions of flags, else those of the older image; masks are files on this machine.

    Prints which masks of the latter have changed. Raises UserError if one is not found or cannot be read.
    """
    if arguments.region is not None:
        return tuple(map(Region.parse, arguments.region))
    found: list[Region] = []
    for stored in like.regions:
        region = stored.region()
        if region.area is None:
            region = stored.region(find_file(like.path, "region", stored.where, arguments.models))
            if stored.digest not in (None, region.digest):
                _say_changed(f"{region.where}: is not the mask", like)
        found.append(region)
    return tuple(found)


def given_controls(arguments: argparse.Namespace, like: Recipe) -> tuple[tuple[Control, ...], list[Checkpoint]]:
    """Return the control networks of flags, else those of the older image, each with its picture and its mask.

    The networks' checkpoints follow, each file once. Prints which files of the latter have changed. Raises UserError
    for a file that is not found or cannot be read, and for a picture or mask that its network cannot take.
    """
    if arguments.control is not None:
        parsed = with_kinds(list(map(Control.parse, arguments.control)), arguments.control_from)
        return with_masks(parsed, arguments.control_mask, arguments.mask)
    found: list[Control] = []
    for stored in like.controls:
        is_other = stored.mask is not None and arguments.control_mask
        own = dataclasses.replace(stored, mask=None, digest=None) if is_other else stored
        parts = {"control": own.path, "control_picture": own.image, "control_mask": own.mask}
        files = [name and find_file(like.path, kind, name, arguments.models) for kind, name in parts.items()]
        found.append(control := own.control(str(files[0]), str(files[1]), files[2]))
        if own.file_hash not in (None, file_hash(control.name)):
            _say_changed(f"{control.path}: is not the control network", like)
        if own.digest not in (None, control.digest):
            _say_changed(f"{control.image}: is not the control picture", like)
    return with_masks(with_kinds(found, arguments.control_from), arguments.control_mask, None)


def _say_changed(what: str, like: Recipe) -> None:
    """Print that a file that the older image names is another one by now."""
    if hosts.is_process_0():
        print(f"{what} that {like.path} was made with", file=sys.stderr)


def with_masks(
    controls: Sequence[Control], masks: Sequence[str], mask: str | None
) -> tuple[tuple[Control, ...], list[Checkpoint]]:
    """Return controls with the masks of inpainting networks, one for each or one for all; `mask` if there are none.

    The networks' checkpoints follow, each file once. Raises UserError for another number of masks, and if a network's
    file cannot be read or does not take its picture.
    """
    opened: dict[str, Checkpoint] = {}
    for name in dict.fromkeys(control.name for control in controls):
        with open_control(name) as opened[name]:
            pass  # closed, it still knows the file's shapes
    channels = [opened[control.name].config.channels for control in controls]
    inpainting = [index for index, count in enumerate(channels) if count == WITH_MASK]
    if masks and not inpainting:
        reason = "none of --control is an inpainting network, which takes one" if controls else "there is no --control"
        raise UserError(f"--control_mask {masks[0]}: {reason}")
    if len(masks) not in {0, 1, len(inpainting)}:
        networks = plural(len(inpainting), "inpainting network")
        raise UserError(f"{len(masks)} values of --control_mask for {networks} of --control, expected one or as many")
    of_network = dict(zip(inpainting, [*masks] * (len(inpainting) if len(masks) == 1 else 1), strict=False))
    found: list[Control] = []
    for index, (control, count) in enumerate(zip(controls, channels, strict=True)):
        needed = count == WITH_MASK and control.mask is None and not control.has_transparency
        own = of_network.get(index) or (mask if needed else None)
        found.append(control if own is None else dataclasses.replace(control, mask=own))
        found[-1].check()
        found[-1].pixels((PATCH, PATCH), count)
    return tuple(found), [*opened.values()]


def image_requests(
    arguments: argparse.Namespace,
    config: MainConfig | None,
    like: Recipe,
    image: Image.Image | None,
    **inputs: tuple[Any, ...],
) -> list[ImageRequest]:
    """Return a request for every prompt in every size with every seed, all with these `INPUTS`.

    What flags do not set is taken from the older image. Without one, the size is that of `image`, else the
    configuration's, else the default. Raises UserError if the size of `image` is needed but is not a multiple of
    `SIZE_STEP`.
    """
    size = image.size if image else config.sample_size_wh if config else (ImageRequest.width, ImageRequest.height)
    size_is_given = like.path or (arguments.width and arguments.height)
    if image and not size_is_given and any(side % SIZE_STEP for side in size):
        nearest = "×".join(str(max(1, round(side / SIZE_STEP)) * SIZE_STEP) for side in size)
        found = f"{size[0]}×{size[1]} pixels, expected multiples of {SIZE_STEP} (nearest: {nearest})"
        raise UserError(f"{arguments.image}: {found}; --width and --height say to what size to crop and scale it")
    older = {name: like.values[name] for name in PLAIN if name in like.values}
    values: dict[str, Any] = {"prompt": "", "width": size[0], "height": size[1]} | older | inputs
    base = ImageRequest(**values)
    prompts = [arguments.prompt] if arguments.prompt is not None else None
    if arguments.prompts:
        prompts = read_prompts(arguments.prompts)
    seeds = [drawn_seed() if seed == RANDOM_SEED else seed for seed in arguments.seed or []]
    return expand_request(base, prompts, arguments.width, arguments.height, seeds, arguments.batch_size)


def drawn_seed() -> int:
    """Return a random seed, the same in all processes. It has 32 bits, which all programs that read our images take."""
    seed = hosts.smallest(secrets.randbits(32))
    if hosts.is_process_0():
        print(f"seed {seed}", file=sys.stderr)
    return seed or 0


def resized(part: Image.Image | None, request: ImageRequest) -> Image.Image | None:
    """Return an image or a mask, cropped and scaled to the size of `request`. Raises UserError if that is not valid."""
    request.check()
    size = request.width, request.height
    return part if part is None or part.size == size else ImageOps.fit(part, size, Image.Resampling.LANCZOS)


def output_paths(output: pathlib.Path, count: int) -> list[pathlib.Path]:
    """Return the files to write. Raises UserError unless `output` can be an image, in a folder that can be made."""
    image_format(output)
    if file := next((folder for folder in output.absolute().parents if folder.is_file()), None):
        raise UserError(f"--output {output}: {file} is a file, expected a folder")
    with writing_to(str(output)):
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
    paths = [output] if count == 1 else [output.with_stem(f"{output.stem}_{index + 1}") for index in range(count)]
    if folder := next((path for path in paths if path.is_dir()), None):
        raise UserError(f"--output {output}: {folder} is a folder, expected a {output.suffix} file")
    return paths
