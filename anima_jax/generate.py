"""python -m anima_jax.generate --prompt "…" -o out.png"""

import argparse
import pathlib
from collections.abc import Sequence

import jax.numpy as jnp

from anima_jax.checkpoints.merging import weighted
from anima_jax.checkpoints.names.parts import adapter_kind
from anima_jax.checkpoints.safetensors import SafetensorsFile
from anima_jax.config.load import load_config
from anima_jax.config.main import MainConfig
from anima_jax.errors import ArgumentParser, UserError, command_line
from anima_jax.pipeline import AnimaPipeline, check_settings
from anima_jax.training.export import find_export
from anima_jax.training.report import save_picture

SIZE = (1024, 1024)
STEPS, GUIDANCE_SCALE, SHIFT = 30, 4.0, 3.0


@command_line
def main(argv: Sequence[str] | None = None) -> None:
    """Draw pictures from a prompt with the networks that flags or a training configuration name."""
    arguments = parse_arguments(argv)
    config = load_config(arguments.config, arguments.set, i_know_what_i_am_doing=True) if arguments.config else None
    settings = sampling_settings(arguments, config)
    check_settings(settings["width"], settings["height"], settings["steps"], arguments.sampler, arguments.schedule)
    output = pathlib.Path(arguments.output)
    if output.suffix.lower() != ".png" or not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: expected a .png file in a folder that exists")

    pipeline = AnimaPipeline.load(**networks(arguments, config))
    images = pipeline(
        arguments.prompt,
        arguments.negative_prompt,
        sampler=arguments.sampler,
        schedule=arguments.schedule,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        **settings,
    )
    for index, image in enumerate(images):
        path = output if len(images) == 1 else output.with_stem(f"{output.stem}_{index + 1}")
        save_picture(image, path)
        print(path)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m anima_jax.generate", description="Draw pictures with Anima.")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--negative_prompt", default="", metavar="TEXT")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.png")
    parser.add_argument("--config", metavar="FILE.toml", help="a training configuration: networks, sizes, [sample]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="replace one of its keys")
    parser.add_argument("--checkpoint", metavar="PATH", help="a run's folder, or a model or adapter file")
    parser.add_argument("--transformer", metavar="FILE", help="anima….safetensors")
    parser.add_argument("--vae", metavar="FILE", help="qwen_image_vae.safetensors")
    parser.add_argument("--text_encoder", metavar="FILE", help="qwen_3_06b_base.safetensors")
    parser.add_argument("--tokenizers", metavar="FOLDER", help="folder with qwen/ and t5/ (default: the hub's)")
    parser.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="an adapter of any kind; may be repeated"
    )
    parser.add_argument("--allow_unused", action="store_true", help="go on if keys of an adapter fit no module")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: the configuration's, or bfloat16"
    )
    parser.add_argument("--width", type=int, metavar="PIXELS")
    parser.add_argument("--height", type=int, metavar="PIXELS")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance_scale", type=float)
    parser.add_argument("--shift", type=float)
    parser.add_argument("--sampler", default="euler")
    parser.add_argument("--schedule", default="simple")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=1)
    return parser.parse_args(argv)


def sampling_settings(arguments: argparse.Namespace, config: MainConfig | None) -> dict:
    """Size, steps, guidance and shift: from flags, else from the configuration, else the usual ones."""
    sample = config.sample if config else None
    width, height = config.sample_size_wh if config else SIZE
    defaults = {
        "width": width,
        "height": height,
        "steps": sample.steps if sample else STEPS,
        "guidance_scale": sample.guidance_scale if sample else GUIDANCE_SCALE,
        "shift": sample.shift if sample else SHIFT,
    }
    given = {name: getattr(arguments, name) for name in defaults}
    return {name: default if given[name] is None else given[name] for name, default in defaults.items()}


def networks(arguments: argparse.Namespace, config: MainConfig | None) -> dict:
    """Arguments of `AnimaPipeline.load`: flags first, then the configuration's files."""
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
    files = {
        "transformer": transformer,
        "vae": arguments.vae or (model and model.vae_path),
        "text_encoder": arguments.text_encoder or (model and model.llm_path),
    }
    missing = [f"--{name}" for name, file in files.items() if not file]
    if missing:
        raise UserError(f"nothing says which file to use: give {', '.join(missing)}, or --config")
    return {
        **files,
        "tokenizers": arguments.tokenizers or (model and model.tokenizer_path),
        "adapter": adapter,
        "loras": loras,
        "allow_unused": arguments.allow_unused,
        "dtype": jnp.dtype(arguments.dtype or (config.compute_dtype if config else "bfloat16")),
    }


def is_adapter_file(path: pathlib.Path) -> bool:
    """Whether a safetensors file holds an adapter and not a model."""
    with SafetensorsFile(path) as file:
        return adapter_kind(file.tensors) is not None


if __name__ == "__main__":
    main()
