"""Train the small Wan VAE that the quick start ships: `python -m make_assets.tiny_vae --output FILE`.

It has the real architecture at base width 8, for the 64×64 images of `anima_jax.data.shapes`, and is stored in bfloat16
under the original names. A diffusion model has to learn its normalised latents, so the loss measures the reconstruction
error from latents with Gaussian noise, and pulls each channel to mean 0 and variance 1. Afterwards the remaining mean
and variance are folded exactly into the 1×1 convolutions on both sides of the latents.

Only single frames are trained. Kernel taps on past frames are zero and the temporal convolutions pass the last frame
through, so a decoded video consists of every fourth frame, shown four times each.

Half of the training images have colours outside the language. Trained on the language's colours alone, the VAE encodes
each pair of colours differently, and a diffusion model cannot combine a shape with a pair of colours it never saw.

The shipped `tiny_vae.safetensors` (1.87 MB, default arguments) reconstructs new images of the language with a PSNR of
33.2 dB and a mean absolute error of 1.59 of 255 levels, or 32.8 dB and 1.72 from latents with noise of standard
deviation 0.15. The file's metadata contains the same numbers. Training took 22 minutes on two busy CPU cores.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from anima_jax.checkpoints.models import save_network
from anima_jax.checkpoints.names.networks import WAN_VAE
from anima_jax.data import shapes
from anima_jax.models.parameters import Params, merge, split
from anima_jax.models.wan_vae import WanVAE, WanVAEConfig

Graph = nnx.GraphDef[WanVAE]

CONFIG = WanVAEConfig(base_width=8)
# (fraction of the steps, images per batch, side of the random square crop): small crops teach edges at a quarter of the
# cost, full images everything else.
STAGES = ((0.6, 16, 32), (0.4, 8, shapes.SIZE))
NOISE = 0.15  # standard deviation of the noise on the normalised latents during training
PENALTY = 0.02  # weight of the channels' distance from mean 0 and variance 1
POOL = 6144  # images drawn before training
ANY_COLOURS = 0.5  # fraction of them in colours outside the language


def main() -> None:
    arguments = argparse.ArgumentParser(description="Train the small VAE of the quick start.")
    arguments.add_argument("--output", type=Path, required=True, help="the safetensors file to write")
    arguments.add_argument("--steps", type=int, default=8000, help="optimizer steps")
    arguments.add_argument("--learning-rate", type=float, default=2e-3)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()

    graphdef, params = split(WanVAE(CONFIG, rngs=nnx.Rngs(options.seed)))
    params = without_past_frames(params)
    pool = draw_images(POOL, np.random.default_rng(options.seed), any_colours=ANY_COLOURS)
    params = calibrate(graphdef, params, pool[:256])
    params = train(graphdef, params, pool, options.steps, options.learning_rate, options.seed)
    params = calibrate(graphdef, params, draw_images(1024, np.random.default_rng(options.seed + 2)))
    params = {path: value.astype(jnp.bfloat16).astype(jnp.float32) for path, value in params.items()}
    report = reconstruction_error(graphdef, params, draw_images(512, np.random.default_rng(options.seed + 1)))
    print(report)
    save_network(WAN_VAE, options.output, params, config=CONFIG, dtype=jnp.bfloat16, metadata=report)


def draw_images(count: int, rng: np.random.Generator, *, any_colours: float = 0.0) -> np.ndarray:
    """Draw `count` images (n, 1, y, x, 3) in [-1, 1]: random scenes of the language, randomly placed.

    A fraction `any_colours` of them has two colours from the whole RGB cube instead of the language's.
    """
    every = shapes.scenes(held_out=False) + shapes.scenes(held_out=True)
    images = []
    for index in rng.integers(len(every), size=count):
        scene, placement = every[index], shapes.sample_placement(rng)
        if rng.random() < any_colours:
            fill, background = rng.integers(256, size=(2, 3)).tolist()
            images.append(shapes.draw_in_colours(scene.shape, tuple(fill), tuple(background), *placement))
        else:
            images.append(shapes.draw(scene, *placement))
    return np.stack(images)[:, None].astype(np.float32) / 127.5 - 1.0


def without_past_frames(params: Params) -> Params:
    """Zero the taps on past frames; make temporal convolutions pass the current frame through unchanged."""
    params = dict(params)
    for path, kernel in params.items():
        if path.endswith("time_conv.kernel"):
            features_in, features_out = kernel.shape[-2:]
            current = jnp.tile(jnp.eye(features_in), (1, features_out // features_in))
            params[path] = jnp.zeros_like(kernel).at[-1, 0, 0].set(current)
        elif kernel.ndim == 5:
            params[path] = kernel.at[:-1].set(0.0)
    return params


def train(graphdef: Graph, params: Params, pool: np.ndarray, steps: int, learning_rate: float, seed: int) -> Params:
    """Train with Adam on `steps` batches from `pool`, by `STAGES`; the learning rate warms up, then decays to 0."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))

    @jax.jit
    def step(params: Params, state: Any, pixels: Array, key: Array):
        (_, parts), grads = jax.value_and_grad(loss, has_aux=True, argnums=1)(graphdef, params, pixels, key)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, parts

    state, rng, started = optimizer.init(params), np.random.default_rng(seed), time.monotonic()
    for index, (batch, side) in enumerate(plan(steps)):
        pixels = crop(pool[rng.integers(len(pool), size=batch)], side, rng)
        params, state, parts = step(params, state, pixels, jax.random.key(index))
        if index % 100 == 99:
            shown = " ".join(f"{name} {float(value):.4f}" for name, value in parts.items())
            print(f"step {index + 1}/{steps} {time.monotonic() - started:.0f} s: {shown}", flush=True)
    return params


def plan(steps: int) -> list[tuple[int, int]]:
    """Return (images per batch, side of the crop) of each step."""
    return [(batch, side) for share, batch, side in STAGES for _ in range(round(share * steps))]


def crop(images: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """Crop a square of `side` pixels at a random position from each image."""
    corners = rng.integers(shapes.SIZE - side + 1, size=(len(images), 2))
    return np.stack([image[:, y : y + side, x : x + side] for image, (y, x) in zip(images, corners, strict=True)])


def loss(graphdef: Graph, params: Params, pixels: Array, key: Array) -> tuple[Array, dict[str, Array]]:
    """Return the absolute and squared error of images decoded from noisy latents, plus a penalty on the statistics."""
    vae = merge(graphdef, params)
    latents = vae.encode(pixels)
    noisy = latents + NOISE * jax.random.normal(key, latents.shape)
    # Without the barrier, XLA on a CPU fuses the error into the last convolution's backward pass: twice the time.
    error = jax.lax.optimization_barrier(vae.decode(noisy)) - pixels
    mean, variance = jnp.mean(latents, (0, 1, 2, 3)), jnp.var(latents, (0, 1, 2, 3))
    penalty = jnp.mean(mean**2 + variance - jnp.log(variance + 1e-6) - 1.0)
    absolute, squared = jnp.mean(jnp.abs(error)), jnp.mean(error**2)
    return absolute + squared + PENALTY * penalty, {"absolute": absolute, "squared": squared, "penalty": penalty}


def calibrate(graphdef: Graph, params: Params, pixels: np.ndarray) -> Params:
    """Rescale each normalised latent channel to mean 0 and variance 1 over `pixels`; outputs are unchanged."""
    latents = encode_all(graphdef, params, pixels)
    shift, scale = latents.mean((0, 1, 2, 3)), latents.std((0, 1, 2, 3))
    mean, std = np.array(CONFIG.latent_mean), np.array(CONFIG.latent_std)
    channels = CONFIG.latent_channels
    params = dict(params)
    # raw = mean + std · normalised, so new raw = (raw − mean − std · shift) / scale + mean, and back.
    kernel, bias = params["quant.kernel"], params["quant.bias"]
    params["quant.kernel"] = kernel.at[:, :channels].divide(scale)
    params["quant.bias"] = bias.at[:channels].set((bias[:channels] - mean - std * shift) / scale + mean)
    kernel = params["post_quant.kernel"]
    params["post_quant.kernel"] = kernel * scale[:, None]
    params["post_quant.bias"] = params["post_quant.bias"] + (mean + std * shift - mean * scale) @ kernel
    return params


def encode_all(graphdef: Graph, params: Params, pixels: np.ndarray) -> np.ndarray:
    """Return the normalised latents of many images."""
    encode = jax.jit(lambda params, batch: merge(graphdef, params).encode(batch))
    return np.concatenate([encode(params, batch) for batch in np.split(pixels, len(pixels) // 64)])


def reconstruction_error(graphdef: Graph, params: Params, pixels: np.ndarray) -> dict[str, str]:
    """Return PSNR in dB (peak 255) and mean absolute error in levels of 0–255, from clean and noisy latents."""
    decode = jax.jit(lambda params, batch: merge(graphdef, params).decode(batch).clip(-1.0, 1.0))
    latents = encode_all(graphdef, params, pixels)
    report = {}
    for name, sigma in (("", 0.0), (f" at latent noise {NOISE}", NOISE)):
        noisy = latents + sigma * np.random.default_rng(0).standard_normal(latents.shape, np.float32)
        decoded = np.concatenate([decode(params, batch) for batch in np.split(noisy, len(noisy) // 64)])
        error = (decoded - pixels) * 127.5
        report[f"PSNR{name}"] = f"{10 * np.log10(255.0**2 / np.mean(error**2)):.1f} dB"
        report[f"mean absolute error{name}"] = f"{np.mean(np.abs(error)):.2f} of 255"
    report["latent deviation per channel"] = " ".join(f"{value:.2f}" for value in latents.std((0, 1, 2, 3)))
    report["latent mean per channel"] = " ".join(f"{value:.2f}" for value in latents.mean((0, 1, 2, 3)))
    return report


if __name__ == "__main__":
    main()
