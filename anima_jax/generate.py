"""python -m anima_jax.generate --prompt "…" -o out.png"""

import argparse
import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from PIL import Image, ImageOps

from anima_jax.adapters.kinds import adapter_kind
from anima_jax.adapters.merge import weighted
from anima_jax.checkpoints.models import open_dit
from anima_jax.checkpoints.safetensors import SafetensorsFile
from anima_jax.config.load import load_config
from anima_jax.config.main import MainConfig
from anima_jax.config.sections import MeshConfig
from anima_jax.diffusion.samplers import SAMPLERS
from anima_jax.diffusion.schedules import SCHEDULES
from anima_jax.errors import ArgumentParser, UserError, command_line
from anima_jax.parallel import hosts
from anima_jax.parallel.mesh import check_mesh, make_mesh, replicas
from anima_jax.parallel.rules import AXES
from anima_jax.sampling.callbacks import Previews, ProgressBar
from anima_jax.sampling.pipeline import AnimaPipeline, ProgressCallback, check_sources
from anima_jax.sampling.request import (
    SIZE_STEP,
    ImageRequest,
    SamplingParams,
    from_text,
    read_picture,
    save_picture,
    to_text,
)
from anima_jax.training.export import find_export
from anima_jax.training.profiling import use_compilation_cache

DTYPES = ("bfloat16", "float16", "float32")


@command_line
def main(argv: Sequence[str] | None = None) -> None:
    """Draw pictures from prompts with the networks that flags, a training configuration or an older picture name."""
    arguments = parse_arguments(argv)
    hosts.join(arguments.coordinator_address, arguments.num_processes, arguments.process_id)
    with hosts.abort_all_on_error():
        draw(arguments)


def draw(arguments: argparse.Namespace) -> None:
    """The pictures that the flags describe, on the mesh that they or the configuration name."""
    config = load_config(arguments.config, arguments.set, i_know_what_i_am_doing=True) if arguments.config else None
    like = text_of(arguments.like) if arguments.like else {}
    settings = sampling_settings(arguments, config, like)
    image, mask = sources(arguments, like)
    pictures = described(arguments, config, like, image)
    image, mask = (fitted(part, pictures[0]) for part in (image, mask))
    check_sources(pictures, settings, image, mask)
    paths = output_paths(pathlib.Path(arguments.output), len(pictures))
    files = networks(arguments, config, like)
    text = files_text(files, arguments, like)
    mesh = make_mesh(sizes := mesh_sizes(arguments, config))
    with open_dit(files["transformer"], adapter_path=files["adapter"]) as checkpoint:
        check_mesh(mesh.shape, checkpoint.config.width, checkpoint.config.heads)
    flags = {"--mesh": sizes, "--at_once": arguments.at_once, "dtype": str(files["dtype"])}
    shown = {f"picture {number}": str(picture) for number, picture in enumerate(pictures, 1)}
    hosts.assert_same_on_all_processes(
        lambda: {"jax": jax.__version__, **flags, **dataclasses.asdict(settings), **shown}
    )
    use_compilation_cache(config.compilation_cache_dir if config else None)
    with jax.set_mesh(mesh):
        pipeline = AnimaPipeline.load(**files, offload=arguments.offload)
        at_once = arguments.at_once * replicas(mesh.shape)
        for first in range(0, len(pictures), at_once):
            some = slice(first, first + at_once)
            with watching(pipeline, paths[some], arguments.preview) as watch:
                images = pipeline.draw(pictures[some], settings, image=image, mask=mask, watch=watch)
            for drawn, picture, path in zip(images, pictures[some], paths[some], strict=True):
                if hosts.is_process_0():
                    save_picture(drawn, path, to_text(picture, settings) | text)
                print(path)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m anima_jax.generate", description="Draw pictures with Anima.")
    add = parser.add_argument
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", help="what to draw, with ComfyUI's weights: (text), (text:1.3)")
    prompts.add_argument("--prompts", metavar="FILE", help="a prompt on each line")
    add("--negative_prompt", metavar="TEXT")
    add("-o", "--output", required=True, metavar="FILE.png", help="of several pictures FILE_1.png, FILE_2.png, …")
    add("--like", metavar="FILE.png", help="draw this picture again, but for what other flags say")

    add("--config", metavar="FILE.toml", help="a training configuration: networks, sizes, [sample]")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="replace one of its keys")
    add("--checkpoint", metavar="PATH", help="a run's folder, or a model or adapter file")
    add("--transformer", metavar="FILE", help="anima….safetensors")
    add("--vae", metavar="FILE", help="qwen_image_vae.safetensors")
    add("--text_encoder", metavar="FILE", help="qwen_3_06b_base.safetensors")
    add("--tokenizers", metavar="FOLDER", help="folder with qwen/ and t5/ (default: the hub's)")
    add("--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="an adapter; may be repeated")
    add("--allow_unused", action="store_true", help="go on if keys of an adapter fit no module")
    add("--dtype", choices=DTYPES, help="default: the configuration's, or bfloat16")
    add("--offload", action="store_true", help="keep text encoder and VAE in host memory while they do not work")

    add("--width", type=int, nargs="+", metavar="PIXELS", help="several, with as many heights: pictures of each size")
    add("--height", type=int, nargs="+", metavar="PIXELS")
    add("--seed", type=int, nargs="+", help="several: a picture of each, as it is alone")
    add("--batch_size", type=int, help="pictures of each prompt, size and seed, their noise drawn together")
    add("--at_once", type=int, default=4, metavar="PICTURES", help="how many share a device (default: 4)")
    add("--image", metavar="FILE", help="a picture to start from")
    add("--mask", metavar="FILE", help="what of it to draw anew: white, or transparent")
    add("--denoise", type=float, help="how much of it to draw anew, 0 to 1")

    add("--steps", type=int)
    add("--guidance_scale", type=float)
    add("--guidance_interval", type=float, nargs=2, metavar=("FROM", "TO"), help="shares of the sampling, 0 to 1")
    add("--cfg_zero_star", action=argparse.BooleanOptionalAction, help="CFG-Zero*")
    add("--sampler", metavar="NAME", help=", ".join(SAMPLERS))
    add("--schedule", metavar="NAME", help=", ".join(SCHEDULES))
    add("--shift", type=float, help="more steps at high noise (3)")
    add("--noise", metavar="KIND", help="of the sampler's steps: torch-cpu, torch-cuda, torch-cuda:GPU or jax")
    add("--preview", type=int, nargs="?", const=5, metavar="EVERY", help="write every 5th (EVERY-th) estimate too")
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
    """Devices along each axis: from the flag, else from the configuration, else all of them side by side.

    Raises UserError for what is no axis and number, and for previews in several processes.
    """
    if arguments.preview and not hosts.is_single_process():
        raise UserError("--preview: works in one process, here are several")
    if arguments.mesh is None:
        return config.mesh.sizes if config else MeshConfig.model_validate({}).sizes
    sizes = {axis: -1 if axis == "data" else 1 for axis in AXES}
    for text in arguments.mesh:
        axis, equals, size = text.partition("=")
        if axis not in sizes or not equals or not re.fullmatch(r"-1|[1-9]\d*", size):
            raise UserError(f"--mesh {text}: expected AXIS=N, one of {', '.join(AXES)} and a number of devices, or -1")
        sizes[axis] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise UserError("--mesh: at most one axis may be -1 (data is, unless set)")
    return sizes


def sampling_settings(
    arguments: argparse.Namespace, config: MainConfig | None, like: Mapping[str, str]
) -> SamplingParams:
    """From flags, else from the older picture, else from the configuration, else the usual ones."""
    settings = SamplingParams()
    if like:
        settings = from_text(arguments.like, like)[1]
    elif config and (sample := config.sample):
        settings = SamplingParams(steps=sample.steps, guidance_scale=sample.guidance_scale, shift=sample.shift)
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(SamplingParams)}
    if given["guidance_interval"]:
        given["guidance_interval"] = tuple(given["guidance_interval"])
    return dataclasses.replace(settings, **{name: value for name, value in given.items() if value is not None})


def text_of(path: str) -> dict[str, str]:
    """The text chunks of a picture's PNG. Raises UserError if they do not say how it was made."""
    info = read_picture(path).info
    text = {name: value for name, value in info.items() if isinstance(name, str) and isinstance(value, str)}
    from_text(path, text)
    if text.get("dtype", DTYPES[0]) not in DTYPES:
        raise UserError(f"{path}: dtype '{text['dtype']}' in its text chunks, expected one of {', '.join(DTYPES)}")
    return text


def described(
    arguments: argparse.Namespace, config: MainConfig | None, like: Mapping[str, str], image: Image.Image | None
) -> list[ImageRequest]:
    """Every prompt in every size with every seed."""
    size = image.size if image else config.sample_size_wh if config else (ImageRequest.width, ImageRequest.height)
    sized = like or (arguments.width and arguments.height)
    if image and not sized and any(side % SIZE_STEP for side in size):
        found = f"{size[0]}×{size[1]} pixels, expected multiples of {SIZE_STEP}"
        raise UserError(f"{arguments.image}: {found}; --width and --height say to what size it is cut and scaled")
    base = from_text(arguments.like, like)[0] if like else ImageRequest("", *size)
    prompts = read_prompts(arguments.prompts) if arguments.prompts else [arguments.prompt]
    widths, heights = arguments.width or [base.width], arguments.height or [base.height]
    if len({len(widths), len(heights)} - {1}) > 1:
        raise UserError(f"{len(widths)} values of --width, {len(heights)} of --height, expected one or as many")
    count = max(len(widths), len(heights))
    sizes = list(zip(widths * (count // len(widths)), heights * (count // len(heights)), strict=True))
    batch_size = arguments.batch_size or 1
    places = [(batch_size, index) for index in range(batch_size)]
    if arguments.batch_size is None and arguments.seed is None:
        places = [(base.batch_size, base.batch_index)]
    return [
        ImageRequest(base.prompt if prompt is None else prompt, *size, seed, *place)
        for prompt in prompts
        for size in sizes
        for seed in arguments.seed or [base.seed]
        for place in places
    ]


def read_prompts(path: str) -> list[str]:
    """The lines of a text file that are not blank. Raises UserError if there are none, or if it is not UTF-8."""
    try:
        data = pathlib.Path(path).read_bytes()
        lines = data.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: line {line} is not UTF-8 (byte 0x{data[error.start]:02x})") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path}: holds no prompt, expected one on each line")
    return prompts


def sources(arguments: argparse.Namespace, like: Mapping[str, str]) -> tuple[Image.Image | None, Image.Image | None]:
    """The image to start from and the mask, as they are. Raises UserError unless they are of one size."""
    paths = [getattr(arguments, name) or like.get(name) for name in ("image", "mask")]
    image, mask = (read_picture(path) if path else None for path in paths)
    check_sources([], SamplingParams(), image, mask)
    return image, mask


def fitted(part: Image.Image | None, picture: ImageRequest) -> Image.Image | None:
    """An image or a mask, cut and scaled to the size of `picture`."""
    picture.check()
    size = picture.width, picture.height
    return part if part is None or part.size == size else ImageOps.fit(part, size, Image.Resampling.LANCZOS)


def output_paths(output: pathlib.Path, count: int) -> list[pathlib.Path]:
    """The files to write. Raises UserError unless `output` is a PNG in a folder that exists."""
    if output.suffix.lower() != ".png" or not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: expected a .png file in a folder that exists")
    paths = [output] if count == 1 else [output.with_stem(f"{output.stem}_{index + 1}") for index in range(count)]
    if folder := next((path for path in paths if path.is_dir()), None):
        raise UserError(f"--output {output}: {folder} is a folder, expected a .png file")
    return paths


def networks(arguments: argparse.Namespace, config: MainConfig | None, like: Mapping[str, str]) -> dict:
    """Arguments of `AnimaPipeline.load`: flags first, then the configuration's files, then the older picture's."""
    model = config.model if config else None
    transformer = arguments.transformer or (model and model.transformer_path)
    adapter = None if arguments.transformer else (model and model.llm_adapter_path)
    loras: list[tuple[str | pathlib.Path, float]] = [weighted(one) for one in arguments.lora]
    if arguments.checkpoint:
        file = find_export(arguments.checkpoint)
        if is_adapter_file(file):
            loras.append((file, 1.0))
        else:
            transformer, adapter = file, None
    if like and not transformer:
        transformer, adapter = like.get("transformer"), like.get("adapter")
        loras = loras or [weighted(line) for line in like.get("lora", "").splitlines()]
    files = {
        "transformer": transformer,
        "vae": arguments.vae or (model and model.vae_path) or like.get("vae"),
        "text_encoder": arguments.text_encoder or (model and model.llm_path) or like.get("text_encoder"),
    }
    missing = [f"--{name}" for name, file in files.items() if not file]
    if missing:
        raise UserError(f"nothing says which file to use: give {', '.join(missing)}, or --config")
    return {
        **files,
        "tokenizers": arguments.tokenizers or (model and model.tokenizer_path) or like.get("tokenizers"),
        "adapter": adapter,
        "loras": loras,
        "allow_unused": arguments.allow_unused,
        "dtype": jnp.dtype(arguments.dtype or (config.compute_dtype if config else like.get("dtype", DTYPES[0]))),
    }


def files_text(files: Mapping, arguments: argparse.Namespace, like: Mapping[str, str]) -> dict[str, str]:
    """Text chunks that say which files a picture was made from, as they were given."""
    sources = {name: getattr(arguments, name) or like.get(name) for name in ("image", "mask")}
    loras = "\n".join(f"{path}:{weight}" for path, weight in files["loras"])
    named = {**files, **sources, "lora": loras}
    return {name: str(value) for name, value in named.items() if value and name not in {"loras", "allow_unused"}}


@contextlib.contextmanager
def watching(pipeline: AnimaPipeline, paths: Sequence[pathlib.Path], every: int | None) -> Iterator[ProgressCallback]:
    """What is told of evaluations: a bar, and previews beside `paths` if asked for."""
    bar, previews = ProgressBar(), Previews(pipeline.decode, paths, every) if every else None

    def watch(*news) -> None:
        bar(*news)
        if previews:
            previews(*news)

    try:
        yield watch
    finally:
        if previews:
            previews.close()


def is_adapter_file(path: pathlib.Path) -> bool:
    """Whether a safetensors file holds an adapter and not a model."""
    with SafetensorsFile(path) as file:
        return adapter_kind(file.tensors) is not None


if __name__ == "__main__":
    main()
