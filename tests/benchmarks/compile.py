"""Seconds to lower and compile the full-size train step, at two depths: `python -m tests.benchmarks.compile`.

Full training with AdamW in bfloat16 compute, one image of 4096 tokens, remat "full". Parameters, optimizer state and
batch are abstract: nothing is allocated, as the peak memory of the process shows. With `--cache DIR` the programs come
from the compilation cache in DIR from the second run on: a warm start.
"""

import argparse
import os
import resource
import time
from pathlib import Path

TARGET_SECONDS = 60.0
TARGET_RATIO = 1.3
WARM_TARGET_SECONDS = 10.0


def main() -> None:
    options = parse_arguments()
    import jax

    from anima_jax.models.dit import DiTConfig

    jax.config.update("jax_enable_compilation_cache", options.cache is not None)
    jax.config.update("jax_compilation_cache_dir", options.cache)
    warm = bool(options.cache) and any(Path(options.cache).glob("*train_step*"))
    target = WARM_TARGET_SECONDS if warm else TARGET_SECONDS
    compile_seconds(DiTConfig(width=64, heads=2, blocks=1, mlp_width=256), 64, 16)  # the compiler's own start-up
    print(f"width {options.width}, {options.tokens} tokens, load average {os.getloadavg()[0]:.1f}")
    totals = []
    for blocks in options.blocks:
        config = DiTConfig(width=options.width, heads=options.heads, blocks=blocks, mlp_width=4 * options.width)
        lowering, compiling = compile_seconds(config, options.tokens, options.text_rows)
        totals.append(lowering + compiling)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{blocks} blocks: {totals[-1]:.1f} s ({lowering:.1f} lower + {compiling:.1f} compile; "
            f"target {target:.0f}), peak memory so far {peak:.1f} GiB",
            flush=True,
        )
    print(f"ratio of the last to the first: {totals[-1] / totals[0]:.2f} (target {TARGET_RATIO})")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compile time of the train step.")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--blocks", type=int, nargs="+", default=[28, 56])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--text-rows", type=int, default=512)
    parser.add_argument("--cache", help="folder of the compilation cache")
    return parser.parse_args()


def compile_seconds(config, tokens: int, text_rows: int) -> tuple[float, float]:
    """Seconds to trace and lower the train step of a transformer of these sizes, and to compile it."""
    import jax
    import jax.numpy as jnp

    from anima_jax.checkpoints.names import dit, file_tensors
    from anima_jax.models import parameters
    from anima_jax.models.dit import AnimaDiT
    from anima_jax.parallel.mesh import current_mesh
    from anima_jax.training.flops import Workload
    from anima_jax.training.memory import abstract_batch
    from anima_jax.training.step import StepConfig, compile_step, init_state

    graphdef, params = parameters.abstract(lambda rngs: AnimaDiT(config, rngs=rngs))
    optimizer = adamw(file_tensors(dit.RULES, params))
    settings, mesh = StepConfig(), current_mesh()
    state = jax.eval_shape(lambda params: init_state(params, optimizer, settings, mesh), params)
    batch = abstract_batch(Workload("", 1, 1, tokens, (1, 1, 1), text_rows, text_rows), 1, config, jnp.bfloat16)
    started = time.perf_counter()
    lowered = compile_step(graphdef, optimizer, settings).lower(state, {}, batch, None)
    between = time.perf_counter()
    lowered.compile()
    return between - started, time.perf_counter() - between


def adamw(tensors):
    """AdamW with the same learning rate for every parameter in `tensors`."""
    from anima_jax.config.optimizer import OptimizerConfig
    from anima_jax.training import optimizers

    rates = optimizers.LearningRates(dict.fromkeys((group for group, _ in optimizers.GROUPS), 1e-5))
    return optimizers.build(OptimizerConfig(type="adamw", lr=1e-5), rates, tensors)


if __name__ == "__main__":
    main()
