"""The flags of `python -m anima_jax.generate`. Those of `SamplingParams` have the names of its fields."""

import argparse
from collections.abc import Sequence
from typing import Any

from anima_jax.adapters.merge import COMFYUI_DORA
from anima_jax.checkpoints.locations import check_local
from anima_jax.checkpoints.stored import TRANSFORMER_DTYPES
from anima_jax.data.preprocessors import KINDS
from anima_jax.diffusion.samplers import OPTIONS, SAMPLERS
from anima_jax.diffusion.schedules import SCHEDULES
from anima_jax.diffusion.step_cache import METHODS
from anima_jax.errors import ArgumentParser, program
from anima_jax.models.quantised import COMPUTED
from anima_jax.parallel import hosts
from anima_jax.sampling.request import RANDOM_SEED

LOCAL = (
    "output",
    "image",
    "mask",
    "reference",
    "like",
    "prompts",
    "config",
    "checkpoint",
    "tokenizers",
    "embeddings",
    "lora_dir",
)
"""Flags whose paths are on this machine; the files of networks and LoRAs may have addresses."""

DTYPES = ("bfloat16", "float16", "float32")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line. Raises UserError if it is not valid."""
    parser = ArgumentParser(prog=program("anima_jax.generate"), description="Generate images with Anima.")
    add_prompts(parser)
    add_networks(parser)
    add_images(parser)
    add_sampling(parser)
    add_guidance(parser)
    add_machine(parser)
    arguments = parser.parse_args(argv)
    if not (arguments.prompt is not None or arguments.prompts or arguments.like):
        parser.error("one of --prompt, --prompts and --like is required")
    check_files(parser, arguments)
    if arguments.quality is not None and not 1 <= arguments.quality <= 100:
        parser.error(f"--quality {arguments.quality}, expected 1 to 100")
    for flag in ("at_once", "preview", "batch_size"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            parser.error(f"--{flag} {value}, expected at least 1")
    return arguments


def check_files(parser: ArgumentParser, arguments: argparse.Namespace) -> None:
    """Raise UserError for an address where a file of this machine is expected, and for --set without --config."""
    if arguments.set and not arguments.config:
        parser.error(f"--set {arguments.set[0]}: without --config there is no key to replace")
    for flag in LOCAL:
        given = getattr(arguments, flag, None)
        for value in [given] if isinstance(given, str) else given or []:
            check_local(f"--{flag}", value)


def add_prompts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts and output")
    add = group.add_argument
    prompts = group.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", help="what to draw, with ComfyUI's weights: (text), (text:1.3)")
    prompts.add_argument("--prompts", metavar="FILE", help="a text file with one prompt per line")
    add("--negative_prompt", metavar="TEXT")
    add(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help=".png, .jpg, .webp; several images: FILE_1, FILE_2, …",
    )
    add("--quality", type=int, metavar="1-100", help="of .jpg (default: 95) and .webp (default: lossless)")
    add("--like", metavar="FILE", help="generate this image of ours, ComfyUI or A1111 again; other flags override")
    add("--models", action="append", default=[], metavar="FOLDER", help="where to look for the files that it names")


def add_networks(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("networks").add_argument
    add("--config", metavar="FILE.toml", help="a training configuration: networks, sizes, [sample]")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override one of its keys")
    add("--checkpoint", metavar="PATH", help="a run's folder, or a model or adapter file")
    add("--transformer", metavar="PATH", help="anima….safetensors, .gguf; or a diffusers folder, or hf://owner/repo")
    add("--vae", metavar="PATH", help="qwen_image_vae.safetensors, or its folder (default: the diffusers folder's)")
    add("--text_encoder", metavar="PATH", help="qwen_3_06b_base.safetensors, .gguf, or its folder (default: the same)")
    add("--tokenizers", metavar="FOLDER", help="folder with qwen/ and t5/ (default: the same, or the package's own)")
    add("--variant", metavar="NAME", help="which files of a folder, as in model.fp16.safetensors")
    add("--embeddings", metavar="FOLDER", help="files that embedding:NAME in a prompt stands for")
    add("--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="adapter; or FILE:MODEL:TEXT_ENCODER")
    add("--lora_dir", metavar="FOLDER", help="files that <lora:NAME:WEIGHT> in a prompt stands for")
    add("--allow_unused", action="store_true", help="ignore tensors of models and adapters that belong to no network")
    add("--comfyui_dora", action="store_true", help=COMFYUI_DORA)
    add("--dtype", choices=DTYPES, help="default: the configuration's, or bfloat16")
    stored = "how devices store the transformer's matrices (default: as its file, or --dtype)"
    add("--transformer_dtype", choices=TRANSFORMER_DTYPES, help=stored)
    add("--compute", choices=tuple(COMPUTED), help="multiply activations and its blocks' matrices in 8 bits")


def seed(text: str) -> int:
    """Return the number of a seed; -1 for "random"."""
    return RANDOM_SEED if text == "random" else int(text)


def add_images(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("images").add_argument
    add("--width", type=int, nargs="+", metavar="PIXELS", help="several, with as many heights: images of each size")
    add("--height", type=int, nargs="+", metavar="PIXELS")
    add("--seed", type=seed, nargs="+", help="several: an image for each, the same as it is alone; random or -1: any")
    add("--batch_size", type=int, help="images of each prompt, size and seed, their noise drawn together")
    add("--image", metavar="FILE", help="an image to start from")
    add("--mask", metavar="FILE", help="what to redraw of it: white or transparent pixels")
    add(
        "--reference",
        action="append",
        metavar="FILE",
        help="a picture to edit, after which the image is drawn; several",
    )
    add(
        "--no-reference",
        dest="reference",
        action="store_const",
        const=[],
        help="none, even if the older image had some",
    )
    add("--paste", type=int, nargs="?", const=0, metavar="PIXELS", help="black pixels stay the image's own; feathered")
    add("--no-paste", dest="paste", action="store_false", default=None, help="even if the older image was")
    control = "a control network with its picture, how strongly and in which part of the sampling it acts; several"
    add("--control", action="append", metavar="FILE=PICTURE[:STRENGTH[:START[:END]]]", help=control)
    mask = "what inpainting networks draw anew of their pictures (default: --mask); one for all, or one for each"
    add("--control_mask", action="append", default=[], metavar="FILE", help=mask)
    kind = f"make the control picture: {', '.join(KINDS)}, or none, as in canny:50:150; one for all, or one for each"
    add("--control_from", action="append", default=[], metavar="KIND", help=kind)
    add("--no-control", dest="control", action="store_const", const=[], help="none, even if the older image had some")
    region = "a prompt for a part: MASK is a picture, or x,y,width,height in pixels or %%; may be repeated"
    add("--region", action="append", metavar="MASK=PROMPT[:STRENGTH]", help=region)
    add("--no-region", dest="region", action="store_const", const=[], help="none, even if the older image had some")
    add("--base_strength", type=float, help="the prompt's weight beside regions (1)")
    add("--denoise", type=float, help="how much of it to redraw, 0 to 1")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("sampling").add_argument
    add("--steps", type=int)
    add("--sampler", metavar="NAME", help=", ".join(SAMPLERS))
    options = ", ".join(OPTIONS)
    add(
        "--sampler_options",
        nargs="+",
        metavar="NAME=VALUE",
        help=f"options of the sampler, which may also be flags: --eta 0.5 ({options})",
    )
    for name in OPTIONS:
        if name != "version":  # That flag would be taken for the program's.
            add(f"--{name}", nargs="?", const="True", metavar="VALUE", help=argparse.SUPPRESS)
    add("--schedule", metavar="NAME", help=", ".join(SCHEDULES))
    add("--shift", type=float, help="more steps at high noise (3)")
    add("--cache", metavar="METHOD", help=f"reuse evaluations: {', '.join(METHODS)} or off; with a threshold: easy:0.2")
    add("--cache_interval", type=float, nargs=2, metavar=("FROM", "TO"), help="where it may, 0 (first step) to 1")
    add("--noise", metavar="KIND", help="noise of the sampler's steps: torch-cpu, torch-cuda, torch-cuda:GPU or jax")
    levels = "noise levels instead of steps and schedule, from 1 (noise) to 0 (image)"
    add("--sigmas", type=comma_separated, nargs="+", metavar="SIGMA", help=levels)
    add("--start_at_step", type=int, metavar="STEP", help="the first step to run, counted from 0")
    add("--end_at_step", type=int, metavar="STEP", help="the step to stop before")
    add(
        "--add_noise",
        action=argparse.BooleanOptionalAction,
        help="start from noise (default), or from --image as it is",
    )
    leftover = "end at the level of --end_at_step instead of 0"
    add("--return_with_leftover_noise", action=argparse.BooleanOptionalAction, help=leftover)


def add_guidance(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("guidance").add_argument
    add("--guidance_scale", "--cfg", type=float)
    add(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("FROM", "TO"),
        help="where guidance works, 0 (first step) to 1",
    )
    add("--cfg_zero_star", action=argparse.BooleanOptionalAction, help="CFG-Zero*")
    add("--rescale_cfg", type=float, nargs="?", const=0.7, metavar="MULTIPLIER", help="RescaleCFG (0.7); 0 is off")
    add("--cfg_norm", type=float, nargs="?", const=1.0, metavar="STRENGTH", help="CFGNorm (1); 0 is off")
    add("--apg", action=argparse.BooleanOptionalAction, help="adaptive projected guidance")
    add("--apg_eta", type=float, metavar="SHARE", help="of the guidance along the prompt's estimate (1)")
    add("--apg_norm_threshold", type=float, metavar="NORM", help="the guidance's largest norm (5); 0 is no limit")
    add("--apg_momentum", type=float, metavar="SHARE", help="of earlier guidance that is added (0)")


def comma_separated(text: str) -> list[float]:
    """Return the numbers of a text like ComfyUI's "1, 0.5"."""
    try:
        return [float(number) for number in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}', expected numbers") from None


def add_machine(parser: argparse.ArgumentParser) -> None:
    add = add_devices(parser).add_argument
    add("--at_once", type=int, default=4, metavar="IMAGES", help="how many share a device (default: 4)")
    add("--preview", type=int, nargs="?", const=5, metavar="EVERY", help="also write every 5th (EVERY-th) estimate")
    add(
        "--tile",
        type=int,
        nargs="?",
        const=1024,
        metavar="PIXELS",
        help="VAE in tiles of 1024 or PIXELS; 0: never",
    )
    hosts.add_flags(parser)


def add_devices(parser: argparse.ArgumentParser) -> Any:
    """Add the flags for devices that `generate` and `serve` have, and return their group."""
    group = parser.add_argument_group("devices")
    group.add_argument("--offload", action="store_true", help="keep idle text encoder and VAE in host memory")
    mesh = "devices along data, fsdp, tensor, context (default: data=-1)"
    group.add_argument("--mesh", nargs="+", metavar="AXIS=N", help=mesh)
    return group
