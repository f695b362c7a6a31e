"""What each way to store or to multiply weights costs in quality: `python -m tests.benchmarks.quantised [ROW…]`.

Every row of `ROWS` is compared with the same model in bfloat16, through `convert checkpoint --dtype` for formats of
files, and `generate`'s `transformer_dtype` and `compute` for storages and products. Two models: `--model FILE` (the
quick start's), and a random one of the released width with `--blocks` blocks. Prints the relative error of the blocks'
products (of those that a row changes: median and largest), that of the whole velocity (the mean of three noise
levels), and the PSNR of the images (median and lowest). "float32" is how far bfloat16 itself is from float32.
"""

import argparse
import contextlib
import functools
import io
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from anima_jax import AnimaPipeline, generate
from anima_jax.checkpoints.models import save_dit
from anima_jax.convert.__main__ import main as convert
from anima_jax.diffusion.samplers import SAMPLERS
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT, DiTConfig
from anima_jax.models.layers import linear
from anima_jax.sampling.noise import BatchNoise
from anima_jax.sampling.request import ImageRequest, SamplingParams
from tests.models.networks import random_params
from tests.small_run import ASSETS, CONFIG

FORMATS = ("fp8_scaled", "int8", "int8_tensorwise", "int8_convrot", "mxfp8", "nvfp4", "nf4")
GGUF = ("q8_0", "q6_k", "q5_k", "q4_k", "q5_1", "q5_0", "q4_1", "q4_0")

ROWS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    **{name: {"convert": name} for name in FORMATS},
    **{f"gguf:{name}": {"convert": f"gguf:{name}"} for name in GGUF},
    **{f"transformer_dtype {name}": {"transformer_dtype": name} for name in ("float8", "int8", "nf4")},
    **{f"compute {name}": {"compute": name} for name in ("int8", "fp8")},
    "int8_convrot, compute int8": {"convert": "int8_convrot", "compute": "int8"},
    "fp8_scaled, compute fp8": {"convert": "fp8_scaled", "compute": "fp8"},
}
"""Row → the format of its file, and the arguments with which it is loaded."""

PROMPTS = (
    "a red circle on a white background",
    "an orange triangle on a blue background",
    "a green square on a yellow background",
    "a blue triangle on a black background",
)
LEVELS = (1.0, 0.7, 0.3)
NETWORKS = {"vae": ASSETS / "tiny_vae.safetensors", "text_encoder": ASSETS / "tiny_qwen3.safetensors"}
NETWORKS |= {"tokenizers": ASSETS / "tokenizers"}
FLAGS = {"shift": 1.0, "guidance_scale": 2.5, "sampler": "euler"}


class Pictures(NamedTuple):
    """What is drawn of a model: side in pixels, steps, number of prompts, seeds."""

    side: int
    steps: int
    prompts: int
    seeds: tuple[int, ...]


QUICK_START, RANDOM = Pictures(64, 20, 4, (0, 1)), Pictures(128, 6, 2, (0,))


def main() -> None:
    arguments = argparse.ArgumentParser(description="Quality of quantised weights.")
    arguments.add_argument("rows", nargs="*", default=list(ROWS), metavar="ROW")
    arguments.add_argument("--model", type=pathlib.Path, help="the quick start's model")
    arguments.add_argument("--blocks", type=int, default=3, help="of the random model; 0: none")
    options = arguments.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if options.model:
            compare("the quick start's", options.model, folder, options.rows, QUICK_START)
        if options.blocks:
            config = DiTConfig(blocks=options.blocks, context_width=CONFIG.context_width, adapter=CONFIG.adapter)
            path = folder / "random.safetensors"
            shapes = parameters.abstract(lambda rngs: AnimaDiT(config, rngs=rngs))[1]
            save_dit(path, {key: value.astype(jnp.bfloat16) for key, value in random_params(shapes).items()})
            compare(f"random, width {config.width}, {config.blocks} blocks", path, folder, options.rows, RANDOM)


def compare(title: str, model: pathlib.Path, folder: pathlib.Path, rows: Sequence[str], drawn: Pictures) -> None:
    """Print a table of the rows' errors against `model` in bfloat16."""
    measure = functools.partial(measured, folder=folder, drawn=drawn)
    kernels, velocities, images = measure(model, {})
    print(f"| {title} | products | largest | velocity | PSNR of images | lowest |", flush=True)
    for row in rows:
        own = dict(ROWS[row])
        path, file_format = model, own.pop("convert", None)
        if file_format:
            path = folder / ("q.gguf" if file_format.startswith("gguf") else "q.safetensors")
            with contextlib.redirect_stdout(io.StringIO()):
                convert(["checkpoint", str(model), str(path), "--dtype", file_format, "--force"])
        other_kernels, other_velocities, other_images = measure(path, own)
        layers = [error for name in kernels for error in product_errors(kernels[name], other_kernels[name])]
        changed = [error for error in layers if error > 0] or [0.0]
        velocity = np.mean([relative(a, b) for a, b in zip(other_velocities, velocities, strict=True)])
        quality = [psnr(a, b) for a, b in zip(other_images, images, strict=True)]
        cells = [f"{np.median(changed):.1e}", f"{max(changed):.1e}", f"{velocity:.1e}"]
        print(f"| {row} | {' | '.join(cells)} | {np.median(quality):.1f} | {min(quality):.1f} |", flush=True)


def measured(
    path: pathlib.Path, loading: dict[str, str], *, folder: pathlib.Path, drawn: Pictures
) -> tuple[dict[str, Any], list[np.ndarray], list[np.ndarray]]:
    """Return the blocks' kernels, the velocities at `LEVELS` without guidance, and the images of `generate`."""
    arguments = {"dtype": "bfloat16"} | loading
    pipeline = AnimaPipeline.load(transformer=path, **NETWORKS, **arguments)  # pyright: ignore[reportArgumentType]
    kernels = {
        name: leaf for name, leaf in pipeline.dit_params.items() if name.startswith("blocks.") and leaf.ndim == 3
    }
    velocities = []
    for level in LEVELS:
        params = SamplingParams(sampler="euler", sigmas=(level, 0.0), guidance_scale=1.0)
        request = ImageRequest(PROMPTS[0], drawn.side, drawn.side)
        noise = BatchNoise([request], params.noise, SAMPLERS["euler"], params.levels()).start[0]
        (found,) = pipeline.draw_latents([request], params, callback=lambda *_: None)
        velocities.append((level * noise - found) / level)
    prompts, output = folder / "prompts.txt", folder / "image.png"
    prompts.write_text("\n".join(PROMPTS[: drawn.prompts]))
    values = {"transformer": path, **NETWORKS, **arguments, **FLAGS, "width": drawn.side, "height": drawn.side}
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        generate.main(
            [
                *flags,
                "--steps",
                str(drawn.steps),
                "--prompts",
                str(prompts),
                "--seed",
                *map(str, drawn.seeds),
                "-o",
                str(output),
            ]
        )
    count = drawn.prompts * len(drawn.seeds)
    files = [output.with_stem(f"image_{number + 1}") for number in range(count)]
    return kernels, velocities, [np.asarray(Image.open(file)).astype(np.float64) for file in files]


def product_errors(kernel: Any, other: Any) -> Iterator[float]:
    """Yield the relative error of each layer's product with normal activations in bfloat16, summed in float32."""
    x = jax.random.normal(jax.random.key(0), (64, kernel.shape[-2]), jnp.bfloat16)
    product = jax.jit(functools.partial(linear, out_dtype=jnp.float32))
    for layer in range(len(kernel)):
        yield relative(*(np.asarray(product(x, stack[layer])) for stack in (other, kernel)))


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Return ‖found − expected‖ / ‖expected‖."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two images in dB; 99 for equal ones."""
    return min(99.0, float(10 * np.log10(255.0**2 / max(np.mean((found - expected) ** 2), 1e-12))))


if __name__ == "__main__":
    main()
