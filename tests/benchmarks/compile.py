"""Seconds to lower and compile the full-size train step, at two depths: `python -m tests.benchmarks.compile`.

Full training with AdamW in bfloat16 compute, one picture of 4096 tokens, remat "full". Parameters, optimizer state and
batch are shapes only: nothing is allocated, which the peak memory of the process shows.
"""

import argparse
import os
import resource
import time
from typing import Any

TARGET_SECONDS = 60.0
TARGET_RATIO = 1.3


def main() -> None:
    options = parse_arguments()
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    lowered_and_compiled(width=64, heads=2, blocks=1, tokens=64, text_rows=16)  # the compiler's own start
    print(f"width {options.width}, {options.tokens} tokens, load average {os.getloadavg()[0]:.1f}")
    totals = []
    for blocks in options.blocks:
        lowering, compiling = lowered_and_compiled(
            options.width, options.heads, blocks, options.tokens, options.text_rows
        )
        totals.append(lowering + compiling)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{blocks} blocks: {totals[-1]:.1f} s ({lowering:.1f} lower + {compiling:.1f} compile; "
            f"target {TARGET_SECONDS:.0f}), peak memory so far {peak:.1f} GiB",
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
    return parser.parse_args()


def lowered_and_compiled(width: int, heads: int, blocks: int, tokens: int, text_rows: int) -> tuple[float, float]:
    """Seconds to trace and lower the step of these sizes, and to compile it."""
    import jax
    import jax.numpy as jnp

    from anima_jax.checkpoints.names import dit, file_tensors
    from anima_jax.config.optimizer import OptimizerConfig
    from anima_jax.models import parameters
    from anima_jax.models.dit import AnimaDiT, DiTConfig
    from anima_jax.parallel.mesh import current_mesh
    from anima_jax.training import optimizers
    from anima_jax.training.step import StepConfig, compile_step, init_state

    config = DiTConfig(width=width, heads=heads, blocks=blocks, mlp_width=4 * width)
    graphdef, params = parameters.abstract(lambda rngs: AnimaDiT(config, rngs=rngs))
    rates = optimizers.LearningRates(dict.fromkeys((group for group, _ in optimizers.GROUPS), 1e-5))
    optimizer = optimizers.build(OptimizerConfig(type="adamw", lr=1e-5), rates, file_tensors(dit.RULES, params))
    settings = StepConfig(compute_dtype=jnp.bfloat16, remat="full")
    mesh = current_mesh()
    state = jax.eval_shape(lambda params: init_state(params, optimizer, settings, mesh), params)
    assert config.adapter is not None
    batch = abstract_batch(tokens, text_rows, config.adapter.source_width)
    started = time.perf_counter()
    lowered = compile_step(graphdef, optimizer, settings).lower(state, {}, batch, None)
    between = time.perf_counter()
    lowered.compile()
    return between - started, time.perf_counter() - between


def abstract_batch(tokens: int, text_rows: int, source_width: int):
    """One example's shapes: latents of `tokens` tokens and padded captions."""
    import jax
    import jax.numpy as jnp

    from anima_jax.models.llm_adapter import Text
    from anima_jax.training.step import TrainBatch

    def shape(dtype, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct((1, *sizes), dtype)

    return TrainBatch(
        latents_blc=shape(jnp.float32, tokens, 64),
        grid_b3=shape(jnp.int32, 3),
        ids_b2=shape(jnp.uint32, 2),
        epochs_b=shape(jnp.int32),
        text=Text(
            source_bnd=shape(jnp.bfloat16, text_rows, source_width),
            source_mask_bn=shape(jnp.bool_, text_rows),
            target_ids_bm=shape(jnp.int32, text_rows),
            target_mask_bm=shape(jnp.bool_, text_rows),
        ),
    )


if __name__ == "__main__":
    main()
