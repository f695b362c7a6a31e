"""Time of one image through the VAE at full width, against diffusers on torch CPU: `python -m tests.benchmarks.vae`.

Both run in one process on two threads, taking turns, with random weights; the fastest of a few runs counts. Prints
seconds and the ratio to diffusers in the same dtype.
"""

import argparse
import os
from collections.abc import Callable

from tests.benchmarks.dit import THREADS, times_by_turns


def main() -> None:
    arguments = argparse.ArgumentParser(description="WanVAE against diffusers' AutoencoderKLQwenImage.")
    arguments.add_argument("--side", type=int, default=256, help="rows and columns of the image")
    arguments.add_argument("--runs", type=int, default=3)
    options = arguments.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])  # before XLA starts its threads
    print(f"load average {os.getloadavg()[0]:.1f}, {THREADS} threads, {options.side}×{options.side}")
    for dtype in ("float32", "bfloat16"):
        ours, theirs = our_calls(dtype, options.side), peer_calls(dtype, options.side)
        for name in ours:
            times = [min(record) for record in times_by_turns(options.runs, ours[name], theirs[name])]
            print(f"{dtype} {name}: {times[0]:.2f} s, diffusers {times[1]:.2f} s, ratio {times[0] / times[1]:.2f}")


def our_calls(dtype: str, side: int) -> dict[str, Callable]:
    """This package's encode and decode, compiled."""
    import jax
    from flax import nnx

    from anima_jax.models.parameters import merge, split
    from anima_jax.models.wan_vae import WanVAE, WanVAEConfig

    graphdef, params = split(WanVAE(WanVAEConfig(), rngs=nnx.Rngs(0)))
    params = {path: value.astype(dtype) for path, value in params.items()}
    encode = jax.jit(lambda params, pixels: merge(graphdef, params).encode(pixels))
    decode = jax.jit(lambda params, latents: merge(graphdef, params).decode(latents))
    pixels = jax.random.uniform(jax.random.key(0), (1, 1, side, side, 3), dtype, -1.0, 1.0)
    latents = jax.random.normal(jax.random.key(1), (1, 1, side // 8, side // 8, 16), dtype)
    return {
        "encode": lambda: jax.block_until_ready(encode(params, pixels)),
        "decode": lambda: jax.block_until_ready(decode(params, latents)),
    }


def peer_calls(dtype: str, side: int) -> dict[str, Callable]:
    """The same for diffusers."""
    import torch
    from diffusers import AutoencoderKLQwenImage

    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(False)
    model = AutoencoderKLQwenImage().to(getattr(torch, dtype)).eval()
    pixels = torch.rand((1, 3, 1, side, side), dtype=model.dtype) * 2.0 - 1.0
    latents = torch.randn((1, 16, 1, side // 8, side // 8), dtype=model.dtype)
    return {"encode": lambda: model.encode(pixels), "decode": lambda: model.decode(latents)}


if __name__ == "__main__":
    main()
