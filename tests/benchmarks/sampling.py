"""Speed of sampling at full width, against diffusers on torch CPU: `python -m tests.benchmarks.sampling`.

Both run in one process on two threads, taking turns, with the same weights, contexts and noise: Euler with guidance,
both prompts in one evaluation. Ours runs as one program ("at once"), and with a callback after each step ("with
callback"), as for a progress bar. Prints iterations per second, the ratio of times to diffusers in the same dtype, and
the difference of the two latents.
"""

import argparse
import os

from tests.benchmarks.dit import THREADS, Calls, medians, relative_error

GUIDANCE_SCALE = 4.0


def main() -> None:
    options = parse_arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])  # before XLA starts its threads

    import torch

    from anima_jax.models.dit import DiTConfig
    from tests.models import dit_peer
    from tests.models.networks import randomise

    torch.set_num_threads(THREADS)
    config = DiTConfig(blocks=options.blocks, adapter=None)
    tokens = (options.side // 2) ** 2
    print(
        f"width {config.width}, {config.blocks} blocks, {tokens} tokens, {options.steps} steps with guidance, ", end=""
    )
    print(f"{THREADS} threads, load average {os.getloadavg()[0]:.1f}")
    peer = randomise(dit_peer.transformer(config))
    params = dit_peer.our_params(peer, config)
    for dtype in options.dtypes:
        peer = peer.to(getattr(torch, dtype))
        calls = our_calls(params, config, dtype, options) | peer_calls(peer, dtype, options)
        error = relative_error(calls["at once"](), calls["diffusers"]())
        seconds = dict(zip(calls, medians(options.runs, *calls.values()), strict=True))
        for name, duration in seconds.items():
            ratio = duration / seconds["diffusers"]
            print(f"{dtype} {name}: {options.steps / duration:.3f} it/s, ratio {ratio:.2f}", flush=True)
        print(f"{dtype} latents differ by {error:.1e} of the largest")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="AnimaPipeline's sampling against diffusers' transformer in a loop.")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--side", type=int, default=64, help="rows and columns of the latents")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    return parser.parse_args()


def inputs(options: argparse.Namespace, context_width: int):
    """Noise (1, t, y, x, c), contexts of both prompts (2, n, d) with the negative one first, and sigmas; float32."""
    from anima_jax.diffusion.schedules import sigmas
    from tests.models.networks import normal

    noise = normal(1, 1, options.side, options.side, 16)
    return noise, normal(2, 512, context_width, seed=1), sigmas("simple", options.steps)


def our_calls(params, config, dtype: str, options: argparse.Namespace) -> Calls:
    """The pipeline's sampling program."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from anima_jax.diffusion.samplers import SAMPLERS
    from anima_jax.diffusion.samplers.plan import make_plan
    from anima_jax.models.dit import AnimaDiT
    from anima_jax.models.parameters import abstract, cast_to_compute
    from anima_jax.sampling import program
    from anima_jax.sampling.context import Context
    from anima_jax.sampling.evaluation import SharedInputs
    from anima_jax.sampling.packing import TokenPacking

    graphdef, _ = abstract(lambda rngs: AnimaDiT(config, rngs=rngs))
    params = cast_to_compute({path: jnp.asarray(value) for path, value in params.items()}, dtype)
    noise, contexts, levels = inputs(options, config.context_width)
    packing = TokenPacking([noise.shape[1:4]])
    plan = make_plan(SAMPLERS["euler"].formulas, levels, 3.0)
    shared = SharedInputs(packing.size_b3, Context(jax.device_put(contexts), None))
    scales = np.full(options.steps, GUIDANCE_SCALE, np.float32)

    def run(callback=None):
        latents = program.sample(
            params, graphdef, jnp.dtype(dtype), plan, packing, list(noise), shared, scales, callback=callback
        )
        return latents[0][None]

    return {"at once": run, "with callback": lambda: run(lambda *_: None)}


def peer_calls(peer, dtype: str, options: argparse.Namespace) -> Calls:
    """The same loop over diffusers' transformer, with float32 latents as in ours."""
    import torch

    from tests.models import dit_peer

    noise, contexts, levels = inputs(options, peer.config.text_embed_dim)
    contexts = torch.from_numpy(contexts).to(getattr(torch, dtype))

    def run():
        x = torch.from_numpy(noise).moveaxis(-1, 1).contiguous()
        with torch.inference_mode():
            for sigma, after in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
                both = torch.cat([x, x]).to(contexts.dtype)
                velocities = dit_peer.velocity_tensor(peer, both, torch.full((2,), sigma), contexts).float()
                negative, positive = velocities.chunk(2)
                x = x + (after - sigma) * (negative + GUIDANCE_SCALE * (positive - negative))
        return x.moveaxis(1, -1).numpy()

    return {"diffusers": run}


if __name__ == "__main__":
    main()
