"""Generate images from prompts: `python -m anima_jax.generate --prompt "…" -o out.png`."""

import argparse
import dataclasses
import pathlib
import re
from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from PIL import Image, ImageOps

from anima_jax.adapters.kinds import adapter_kind
from anima_jax.adapters.merge import parse_lora_argument
from anima_jax.checkpoints.models import open_dit
from anima_jax.checkpoints.safetensors import SafetensorsFile
from anima_jax.config.load import load_config
from anima_jax.config.main import MainConfig
from anima_jax.diffusion.samplers import SAMPLERS
from anima_jax.diffusion.schedules import SCHEDULES
from anima_jax.errors import ArgumentParser, UserError, command_line
from anima_jax.parallel import hosts
from anima_jax.parallel.mesh import check_mesh, make_mesh, replicas
from anima_jax.parallel.rules import AXES
from anima_jax.sampling.callbacks import progress
from anima_jax.sampling.images import read_image, save_image
from anima_jax.sampling.pipeline import AnimaPipeline
from anima_jax.sampling.request import (
    SIZE_STEP,
    ImageRequest,
    SamplingParams,
    check_requests,
    expand_request,
    from_text,
    read_prompts,
    to_text,
)
from anima_jax.training.export import find_export
from anima_jax.training.profiling import use_compilation_cache

DTYPES = ("bfloat16", "float16", "float32")


@command_line
def main(argv: Sequence[str] | None = None) -> None:
    """Generate images from prompts, with networks named by flags, a training configuration or an older image."""
    arguments = parse_arguments(argv)
    hosts.join(arguments.coordinator_address, arguments.num_processes, arguments.process_id)
    with hosts.abort_all_on_error():
        generate(arguments)


def generate(arguments: argparse.Namespace) -> None:
    """Generate the images that the flags describe, on the mesh given by the flags or the configuration."""
    config = load_config(arguments.config, arguments.set, i_know_what_i_am_doing=True) if arguments.config else None
    like = text_of(arguments.like) if arguments.like else {}
    params = sampling_params(arguments, config, like)
    sources = {name: getattr(arguments, name) or like.get(name) for name in ("image", "mask")}
    image, mask = (read_image(path) if path else None for path in sources.values())
    check_requests([], SamplingParams(), image, mask)
    requests = image_requests(arguments, config, like, image)
    image, mask = (resized(part, requests[0]) for part in (image, mask))
    check_requests(requests, params, image, mask)
    paths = output_paths(pathlib.Path(arguments.output), len(requests))
    files = networks(arguments, config, like)
    mesh = make_mesh(sizes := mesh_sizes(arguments, config))
    with open_dit(files["transformer"], adapter_path=files["adapter"]) as checkpoint:
        check_mesh(mesh.shape, checkpoint.config.width, checkpoint.config.heads)
    flags = {"--mesh": sizes, "--at_once": arguments.at_once, "dtype": str(files["dtype"])}
    numbered = {f"image {number}": str(request) for number, request in enumerate(requests, 1)}
    hosts.assert_same_on_all_processes(
        lambda: {"jax": jax.__version__, **flags, **dataclasses.asdict(params), **numbered}
    )
    use_compilation_cache(config.compilation_cache_dir if config else None)
    with jax.set_mesh(mesh):
        pipeline = AnimaPipeline.load(**files, allow_unused=arguments.allow_unused, offload=arguments.offload)
        at_once = arguments.at_once * replicas(mesh.shape)
        for first in range(0, len(requests), at_once):
            batch = slice(first, first + at_once)
            with progress(pipeline.decode, paths[batch], arguments.preview) as callback:
                images = pipeline.draw(requests[batch], params, image=image, mask=mask, callback=callback)
            for drawn, request, path in zip(images, requests[batch], paths[batch], strict=True):
                if hosts.is_process_0():
                    save_image(drawn, path, to_text(request, params) | text_of_files(files | sources))
                print(path)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m anima_jax.generate", description="Generate images with Anima.")
    add = parser.add_argument
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", help="what to draw, with ComfyUI's weights: (text), (text:1.3)")
    prompts.add_argument("--prompts", metavar="FILE", help="a text file with one prompt per line")
    add("--negative_prompt", metavar="TEXT")
    add("-o", "--output", required=True, metavar="FILE.png", help="several images become FILE_1.png, FILE_2.png, …")
    add("--like", metavar="FILE.png", help="generate this image again; other flags override its parameters")

    add("--config", metavar="FILE.toml", help="a training configuration: networks, sizes, [sample]")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override one of its keys")
    add("--checkpoint", metavar="PATH", help="a run's folder, or a model or adapter file")
    add("--transformer", metavar="FILE", help="anima….safetensors")
    add("--vae", metavar="FILE", help="qwen_image_vae.safetensors")
    add("--text_encoder", metavar="FILE", help="qwen_3_06b_base.safetensors")
    add("--tokenizers", metavar="FOLDER", help="folder with qwen/ and t5/ (default: the hub's)")
    add("--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="an adapter; may be repeated")
    add("--allow_unused", action="store_true", help="ignore keys of an adapter that match no module")
    add("--dtype", choices=DTYPES, help="default: the configuration's, or bfloat16")
    add("--offload", action="store_true", help="keep text encoder and VAE in host memory while they are idle")

    add("--width", type=int, nargs="+", metavar="PIXELS", help="several, with as many heights: images of each size")
    add("--height", type=int, nargs="+", metavar="PIXELS")
    add("--seed", type=int, nargs="+", help="several: an image for each, the same as it is alone")
    add("--batch_size", type=int, help="images of each prompt, size and seed, their noise drawn together")
    add("--at_once", type=int, default=4, metavar="IMAGES", help="how many share a device (default: 4)")
    add("--image", metavar="FILE", help="an image to start from")
    add("--mask", metavar="FILE", help="what to redraw of it: white or transparent pixels")
    add("--denoise", type=float, help="how much of it to redraw, 0 to 1")

    add("--steps", type=int)
    add("--guidance_scale", type=float)
    add(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("FROM", "TO"),
        help="where guidance works, 0 (first step) to 1",
    )
    add("--cfg_zero_star", action=argparse.BooleanOptionalAction, help="CFG-Zero*")
    add("--sampler", metavar="NAME", help=", ".join(SAMPLERS))
    add("--schedule", metavar="NAME", help=", ".join(SCHEDULES))
    add("--shift", type=float, help="more steps at high noise (3)")
    add("--noise", metavar="KIND", help="noise of the sampler's steps: torch-cpu, torch-cuda, torch-cuda:GPU or jax")
    add("--preview", type=int, nargs="?", const=5, metavar="EVERY", help="also write every 5th (EVERY-th) estimate")
    add("--mesh", nargs="+", metavar="AXIS=N", help="devices along data, fsdp, tensor, context (default: data=-1)")
    hosts.add_flags(parser)
    arguments = parser.parse_args(argv)
    if not (arguments.prompt is not None or arguments.prompts or arguments.like):
        parser.error("one of --prompt, --prompts and --like is required")
    if arguments.set and not arguments.config:
        parser.error(f"--set {arguments.set[0]}: without --config there is no key to replace")
    for flag in ("at_once", "preview", "batch_size"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            parser.error(f"--{flag} {value}, expected at least 1")
    return arguments


def mesh_sizes(arguments: argparse.Namespace, config: MainConfig | None) -> dict[str, int]:
    """Return the number of devices along each axis: from the flag, else the configuration, else all along `data`.

    Raises UserError for an unknown axis, an invalid size or more than one -1, and for previews in several processes.
    """
    if arguments.preview and not hosts.is_single_process():
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


def text_of(path: str) -> dict[str, str]:
    """Return the text chunks of a PNG. Raises UserError if they do not describe how the image was made."""
    info = read_image(path).info
    text = {name: value for name, value in info.items() if isinstance(name, str) and isinstance(value, str)}
    from_text(path, text)
    if text.get("dtype", DTYPES[0]) not in DTYPES:
        raise UserError(f"{path}: dtype '{text['dtype']}' in its text chunks, expected one of {', '.join(DTYPES)}")
    return text


def given(**values: Any) -> dict[str, Any]:
    """Return the values that are set, as one layer of a `ChainMap`, where the first layer with a key wins."""
    return {name: value for name, value in values.items() if value not in (None, "", [])}


def sampling_params(
    arguments: argparse.Namespace, config: MainConfig | None, like: Mapping[str, str]
) -> SamplingParams:
    """Return the parameters, each from the first of these that sets it: flags, older image, configuration, default."""
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    flags = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if interval := flags.get("guidance_interval"):
        flags["guidance_interval"] = tuple(interval)
    older = dataclasses.asdict(from_text(arguments.like, like)[1]) if like else {}
    sample = config.sample if config else None
    configured = {name: getattr(sample, name) for name in ("steps", "guidance_scale", "shift")} if sample else {}
    return SamplingParams(**ChainMap(flags, older, configured))


def image_requests(
    arguments: argparse.Namespace, config: MainConfig | None, like: Mapping[str, str], image: Image.Image | None
) -> list[ImageRequest]:
    """Return a request for every prompt in every size with every seed.

    What flags do not set is taken from the older image. Without one, the size is that of `image`, else the
    configuration's, else the default. Raises UserError if the size of `image` is needed but is not a multiple of
    `SIZE_STEP`.
    """
    size = image.size if image else config.sample_size_wh if config else (ImageRequest.width, ImageRequest.height)
    size_is_given = like or (arguments.width and arguments.height)
    if image and not size_is_given and any(side % SIZE_STEP for side in size):
        found = f"{size[0]}×{size[1]} pixels, expected multiples of {SIZE_STEP}"
        raise UserError(f"{arguments.image}: {found}; --width and --height say to what size to crop and scale it")
    base = from_text(arguments.like, like)[0] if like else ImageRequest("", *size)
    prompts = [arguments.prompt] if arguments.prompt is not None else None
    if arguments.prompts:
        prompts = read_prompts(arguments.prompts)
    return expand_request(base, prompts, arguments.width, arguments.height, arguments.seed, arguments.batch_size)


def resized(part: Image.Image | None, request: ImageRequest) -> Image.Image | None:
    """Return an image or a mask, cropped and scaled to the size of `request`. Raises UserError if that is not valid."""
    request.check()
    size = request.width, request.height
    return part if part is None or part.size == size else ImageOps.fit(part, size, Image.Resampling.LANCZOS)


def output_paths(output: pathlib.Path, count: int) -> list[pathlib.Path]:
    """Return the files to write. Raises UserError unless `output` is a PNG in a folder that exists."""
    if output.suffix.lower() != ".png" or not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: expected a .png file in a folder that exists")
    paths = [output] if count == 1 else [output.with_stem(f"{output.stem}_{index + 1}") for index in range(count)]
    if folder := next((path for path in paths if path.is_dir()), None):
        raise UserError(f"--output {output}: {folder} is a folder, expected a .png file")
    return paths


def networks(arguments: argparse.Namespace, config: MainConfig | None, like: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments of `AnimaPipeline.load` from the flags, else the configuration, else the older image.

    A transformer comes with its own LLM adapter file and LoRAs: they are never taken from a later source than the
    transformer. Raises UserError if no source names a required file.
    """
    loras: list[tuple[Any, float]] = [parse_lora_argument(text) for text in arguments.lora]
    exported = {}
    if arguments.checkpoint:
        file = find_export(arguments.checkpoint)
        if is_adapter_file(file):
            loras.append((file, 1.0))
        else:
            exported = transformer_files(file)
    layers = [given(loras=loras), exported, transformer_files(arguments.transformer)]
    layers += [given(**{name: getattr(arguments, name) for name in ("vae", "text_encoder", "tokenizers", "dtype")})]
    if config:
        model = config.model
        layers += [
            transformer_files(model.transformer_path, model.llm_adapter_path),
            given(vae=model.vae_path, text_encoder=model.llm_path, tokenizers=model.tokenizer_path),
            {"dtype": config.compute_dtype},
        ]
    older_loras = [parse_lora_argument(line) for line in like.get("lora", "").splitlines()]
    layers += [transformer_files(like.get("transformer"), like.get("adapter"), older_loras), like]
    files = ChainMap(*layers, {"dtype": DTYPES[0], "tokenizers": None})
    if missing := [f"--{name}" for name in ("transformer", "vae", "text_encoder") if not files.get(name)]:
        raise UserError(f"missing files: give {', '.join(missing)}, or --config")
    names = ("transformer", "vae", "text_encoder", "tokenizers", "adapter", "loras")
    return {name: files[name] for name in names} | {"dtype": jnp.dtype(files["dtype"])}


def transformer_files(transformer: Any, adapter: Any = None, loras: Sequence[tuple[Any, float]] = ()) -> dict[str, Any]:
    """Return a transformer with its LLM adapter file and LoRAs, or nothing if there is no transformer."""
    return {"transformer": transformer, "adapter": adapter, "loras": loras} if transformer else {}


def text_of_files(files: Mapping[str, Any]) -> dict[str, str]:
    """Return text chunks that name the files an image was made from, as the user wrote them."""
    loras = "\n".join(f"{path}:{weight}" for path, weight in files["loras"])
    return {name: str(value) for name, value in {**files, "loras": None, "lora": loras}.items() if value}


def is_adapter_file(path: pathlib.Path) -> bool:
    """Return whether a safetensors file contains an adapter rather than a model."""
    with SafetensorsFile(path) as file:
        return adapter_kind(file.tensors) is not None


if __name__ == "__main__":
    main()
