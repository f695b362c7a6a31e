"""Time of the transformer at full width, against diffusers on torch CPU: `python -m tests.benchmarks.dit`.

Both run in one process on two threads, taking turns, with the same weights and inputs; the median of a few runs counts.
Prints seconds, the ratio to diffusers in the same dtype, the same of the fewest CPU-seconds of a run, which a busy
machine changes less, and the difference of the two velocities. The backward pass is that of the mean squared velocity,
for every parameter; neither side recomputes activations (ours can: `--remat`).
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable

THREADS = 2

TARGETS = {
    ("float32", "forward"): 0.8,
    ("float32", "forward+backward"): 1.0,
    ("bfloat16", "forward"): 1.0,
    ("bfloat16", "forward+backward"): 1.0,
}
"""Ratios that must not be exceeded."""

Calls = dict[str, Callable]


def main() -> None:
    options = parse_arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])  # before XLA starts its threads

    import torch

    from anima_jax.models.dit import DiTConfig
    from tests.models import dit_peer
    from tests.models.networks import randomise

    torch.set_num_threads(options.threads)
    config = DiTConfig(
        width=options.width,
        blocks=options.blocks,
        heads=options.heads,
        mlp_width=4 * options.width,
        adaln_rank=options.width // 8,
        adapter=None,
    )
    tokens = (options.side // 2) ** 2
    print(f"width {config.width}, {config.blocks} blocks, {tokens} tokens, {options.text_rows} text rows, ", end="")
    print(f"remat {options.remat}, {options.threads} threads, load average {os.getloadavg()[0]:.1f}")
    peer = randomise(dit_peer.transformer(config))
    params = dit_peer.our_params(peer, config)
    for dtype in options.dtypes:
        peer = peer.to(getattr(torch, dtype))
        ours, theirs = our_calls(params, config, dtype, options), peer_calls(peer, dtype, options)
        error = relative_error(ours["forward"](), theirs["forward"]())
        for name in ours:
            clocks = (time.perf_counter, time.process_time)
            report(dtype, name, *times_by_turns(options.runs, ours[name], theirs[name], clocks=clocks))
        print(f"{dtype} velocities differ by {error:.1e} of the largest")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="AnimaDiT against diffusers' CosmosTransformer3DModel.")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--side", type=int, default=64, help="rows and columns of the latents")
    parser.add_argument("--text-rows", type=int, default=512)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--remat", default="none", help="what our backward pass recomputes")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    return parser.parse_args()


def inputs(options: argparse.Namespace, context_width: int):
    """One image's latents (b, t, y, x, c), its time and context rows, float32."""
    import numpy as np

    from tests.models.networks import normal

    latents = normal(1, 1, options.side, options.side, 16)
    return latents, np.array([0.4], np.float32), normal(1, options.text_rows, context_width, seed=1)


def our_calls(params, config, dtype: str, options: argparse.Namespace) -> Calls:
    """This package's compiled functions: velocity, and gradients of all parameters."""
    import jax
    import jax.numpy as jnp

    from anima_jax.compiler import compiler_options
    from anima_jax.models.dit import AnimaDiT
    from anima_jax.models.parameters import abstract, cast_to_compute, merge

    graphdef, _ = abstract(lambda rngs: AnimaDiT(config, rngs=rngs))
    params = cast_to_compute({path: jnp.asarray(value) for path, value in params.items()}, dtype)
    latents, times, context = (jnp.asarray(x) for x in inputs(options, config.context_width))
    latents, context = latents.astype(dtype), context.astype(dtype)

    def velocity(params, latents, times, context):
        return merge(graphdef, params)(latents, times, context, remat=options.remat)

    def loss(params, *arguments):
        return jnp.mean(velocity(params, *arguments) ** 2)

    jit = functools.partial(jax.jit, compiler_options=compiler_options())
    compiled = {"forward": jit(velocity), "forward+backward": jit(jax.grad(loss))}
    return {
        name: lambda function=function: jax.block_until_ready(function(params, latents, times, context))
        for name, function in compiled.items()
    }


def peer_calls(peer, dtype: str, options: argparse.Namespace) -> Calls:
    """The same for diffusers."""
    import torch

    from tests.models import dit_peer

    latents, times, context = (torch.from_numpy(x) for x in inputs(options, peer.config.text_embed_dim))
    latents = latents.moveaxis(-1, 1).contiguous().to(getattr(torch, dtype))
    arguments = (latents, times, context.to(latents.dtype))

    def forward():
        with torch.inference_mode():
            return dit_peer.velocity_tensor(peer, *arguments).moveaxis(1, -1).float().numpy()

    def forward_backward():
        peer.requires_grad_(True).zero_grad(set_to_none=True)
        dit_peer.velocity_tensor(peer, *arguments).float().square().mean().backward()

    return {"forward": forward, "forward+backward": forward_backward}


def relative_error(found, expected) -> float:
    import numpy as np

    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def medians(runs: int, *calls: Callable) -> list[float]:
    """Median seconds of each call; see `times_by_turns`."""
    return [statistics.median(record) for record in times_by_turns(runs, *calls)]


def times_by_turns(runs: int, *calls: Callable, clocks: tuple[Callable, ...] = (time.perf_counter,)) -> list[list]:
    """Seconds of `runs` runs of each call by each clock, taking turns, after one run to warm up.

    The result has one list per call and clock: first those of the first call.
    """
    for call in calls:
        call()
    times = [[[] for _ in clocks] for _ in calls]
    for _ in range(runs):
        for call, records in zip(calls, times, strict=True):
            started = [clock() for clock in clocks]
            call()
            for clock, since, record in zip(clocks, started, records, strict=True):
                record.append(clock() - since)
    return [record for records in times for record in records]


def report(dtype: str, name: str, *records: list[float]) -> None:
    """Print one line of the result: our seconds and CPU-seconds, then diffusers'."""
    ours, our_cpu, theirs, their_cpu = records
    ours, theirs = statistics.median(ours), statistics.median(theirs)
    note = f" (target {TARGETS[dtype, name]})"
    cpu = f"CPU-seconds {min(our_cpu):.3f} to {min(their_cpu):.3f}, ratio {min(our_cpu) / min(their_cpu):.2f}"
    print(f"{dtype} {name}: {ours:.3f} s, diffusers {theirs:.3f} s, ratio {ours / theirs:.2f}{note}; {cpu}", flush=True)


if __name__ == "__main__":
    main()
