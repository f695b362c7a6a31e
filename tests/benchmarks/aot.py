"""Compile a configuration's training step for a TPU or GPU that is not here, and print what the compiler says of it.

python -m tests.benchmarks.aot CONFIG.toml TARGET [KEY=VALUE …] [--save FILE] [--top N]
python -m tests.benchmarks.aot    (the rows of TABLE, one after the other)

CONFIG.toml is a path, or the name of one in configs/ ("anima_lora", "lora"). TARGET is as in `--compile`: "v5e:1x1",
"v5p:8x8x4", "H100". Keys are those of the configuration (mesh.fsdp=8, optimizer.type=adamw8bit), and
  size=1024 (images of 1024 × 1024), rows=512 (rows of text), batch=2 (examples of one device at once),
  blocks=2 (a transformer of so many blocks), xla_…=… (an option of the compiler).
With --program the sampling program (an evaluation of the network, as often as it has steps) or the VAE's decoder is
compiled instead of the step.
No file of a model is needed: what is not here is taken from files of the released sizes without content.
"""

import argparse
import contextlib
import functools
import inspect
import os
import pathlib
import subprocess
import sys
from typing import Any

from anima_jax.errors import command_line
from anima_jax.parallel.topologies import parse_topology, use_compilers

OWN = {"size": 1024, "rows": 512, "batch": 0, "blocks": 0}
"""Keys that are not of the configuration, with their defaults."""

PROGRAMS = ("step", "sampling", "vae")

_ONE = "gradient_accumulation_steps=1 remat=full"
TABLE = (
    "full v5p:1x1x1 gradient_accumulation_steps=1 batch=2 ema_decay=0.9999 remat=attention",
    "pod v5p:2x2x2 mesh.data=1 mesh.fsdp=8 batch=2",
    "pod v5p:8x8x4 batch=2",
    "pod v5e:4x4 mesh.data=1 mesh.fsdp=16 batch=1 remat=full",
    f"lora v5e:1x1 adapter.rank=32 batch=1 {_ONE}",
    f"lora v5e:1x1 adapter.rank=32 batch=1 model.transformer_dtype=int8 {_ONE}",
    f"lora H100 adapter.rank=32 batch=1 {_ONE}",
    f"lora H100 adapter.rank=32 batch=1 model.transformer_dtype=int8 {_ONE}",
    f"full RTX_4090 param_dtype=bfloat16 optimizer.type=adamw8bit batch=1 {_ONE}",
    f"full RTX_4090 param_dtype=bfloat16 optimizer.type=adafactor batch=1 {_ONE}",
)
"""What is compiled without arguments. TPUs need libtpu, GPUs JAX's CUDA plugin; rows of the other end in an error."""


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?")
    parser.add_argument("target", nargs="?")
    parser.add_argument("keys", nargs="*")
    parser.add_argument("--program", choices=PROGRAMS, default="step")
    parser.add_argument("--save", help="write the compiled program's text to this file")
    parser.add_argument("--top", type=int, default=15, help="how many of the dearest instructions to print")
    arguments = parser.parse_intermixed_args()
    if arguments.config is None:
        for row in TABLE:  # a compiler sets up its process for good
            subprocess.run([sys.executable, "-m", "tests.benchmarks.aot", *row.split(), "--top", "3"], check=False)
        return
    if arguments.target is None:
        parser.error("TARGET is missing")
    given = dict(key.partition("=")[::2] for key in arguments.keys)
    try:
        own = {key: int(given.pop(key, default)) for key, default in OWN.items()}
    except ValueError as error:
        parser.error(f"{', '.join(OWN)} are whole numbers: {error}")
    options = {key: given.pop(key) for key in list(given) if key.startswith("xla_")}
    use_compilers()
    save = arguments.save and os.path.abspath(arguments.save)
    if arguments.program != "step":
        keys = [f"{key}={value}" for key, value in given.items()]
        other_program(arguments.program, arguments.config, arguments.target, keys, own, save=save, top=arguments.top)
        return
    run(
        arguments.config,
        arguments.target,
        [f"{key}={value}" for key, value in given.items()],
        own,
        options,
        save=save,
        top=arguments.top,
    )


def run(
    name: str,
    target: str,
    keys: list[str],
    own: dict[str, int],
    options: dict[str, Any] | None = None,
    *,
    save: str | None = None,
    top: int = 15,
) -> Any:
    """Compile and print; return the compiled program and the counted memory."""
    import jax.numpy as jnp

    from anima_jax.checkpoints.hub import headers_only
    from anima_jax.config.sizes import Size
    from anima_jax.parallel.mesh import replicas, resolve_sizes
    from anima_jax.training import aot, estimate
    from anima_jax.training.flops import Workload
    from anima_jax.training.memory import abstract_batch, lowered_step
    from anima_jax.training.run import Run
    from anima_jax.training.state import build_optimizer
    from anima_jax.training.step import StepConfig

    topology = parse_topology(target)
    with in_folder(own["blocks"]) as load, headers_only():
        config = load(name, [*keys, *([f"micro_batch_size_per_gpu={own['batch']}"] if own["batch"] else [])])
        sizes = resolve_sizes(config.mesh.sizes, topology.count)
        partition = estimate.abstract_partition(config)
        optimizer = build_optimizer(config, partition)
        step_config, run_ = StepConfig.of(config), Run(config, replicas(sizes))
        size = Size(own["size"], own["size"], 1)
        batch, rows = run_.global_batch(size), own["rows"]
        work = Workload(str(own["size"]), batch, run_.accumulation_of(size), size.tokens, size.grid, rows, rows)
        counted = estimate.run_memory(
            config,
            step_config,
            partition,
            optimizer,
            [work],
            sizes=sizes,
            platform=topology.hardware.platform,
            measure=False,
        )
        print(
            f"== {name} on {topology.name} {sizes} {' '.join(keys)}: {batch} examples in {work.accumulation}",
            flush=True,
        )
        print(
            f"counted: {counted.total / 2**30:.2f} GiB,", {k: round(v / 2**30, 3) for k, v in counted.rows.items() if v}
        )
        with aot.on_topology(topology, sizes):
            optimizer = build_optimizer(config, partition)  # for this hardware: moments in host memory
            dtype = jnp.dtype(config.cached_dtype)
            given = abstract_batch(work, batch, partition.config, dtype, text_ids=partition.text_ids)
            found = aot.compile_for(
                topology, lambda: lowered_step(partition, optimizer, step_config, work, given), options
            )
    if save and found.text:
        pathlib.Path(save).write_text(found.text)
    step = counted.total - sum(counted.rows.get(row, 0) for row in ("encoders", "samples and evaluation"))
    print(
        f"compiled in {found.seconds:.0f} s: {found.memory.total / 2**30:.3f} GiB; counted for the step alone "
        f"{step / 2**30:.3f} GiB, {step / found.memory.total - 1:+.1%}"
    )
    print("\n".join(aot.report(found, dearest=top)), flush=True)
    return found, counted


def other_program(
    program: str, name: str, target: str, keys: list[str], own: dict[str, int], *, save: str | None, top: int
) -> None:
    """Compile the sampling program of a configuration, or the VAE's decoder, and print what the compiler says."""
    from anima_jax.checkpoints.hub import headers_only
    from anima_jax.compiler import compiler_options
    from anima_jax.parallel.mesh import current_mesh, resolve_sizes
    from anima_jax.training import aot, compiled_run, estimate

    topology, size = parse_topology(target), own["size"]
    with in_folder(own["blocks"]) as load, headers_only():
        config = load(name, [f"sample.width={size}", f"sample.height={size}", *keys])
        partition = estimate.abstract_partition(config)
        with aot.on_topology(topology, resolve_sizes(config.mesh.sizes, topology.count)):
            lower, options = functools.partial(compiled_run.lowered_samples, config, partition), None
            if program == "vae":
                lower, options = functools.partial(lowered_decoder, size), compiler_options(current_mesh(), program)
            before = os.times()
            found = aot.compile_for(topology, lower, options)
            after = os.times()
    cpu = after.user - before.user
    print(f"== {program} of {name} on {topology.name} {' '.join(keys)}: compiled in {cpu:.0f} CPU-seconds")
    if save and found.text:
        pathlib.Path(save).write_text(found.text)
    print("\n".join(aot.report(found, dearest=top)), flush=True)


def lowered_decoder(size: int) -> Any:
    """Return the released VAE's decoder in bfloat16 for an image of `size` × `size`, lowered for the current mesh."""
    import jax
    import jax.numpy as jnp

    from anima_jax.models.parameters import abstract
    from anima_jax.models.wan_vae import WanVAE, WanVAEConfig
    from anima_jax.parallel.mesh import current_mesh, replicated
    from anima_jax.platform import lower
    from anima_jax.sampling.latent_codec import decode_latents

    graphdef, params = abstract(lambda rngs: WanVAE(WanVAEConfig(), rngs=rngs))
    place = replicated(current_mesh())
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=place) for path, leaf in params.items()}
    latents = jax.ShapeDtypeStruct((1, 1, size // 8, size // 8, 16), jnp.float32, sharding=place)
    decode = functools.partial(inspect.unwrap(decode_latents), graphdef=graphdef, dtype=jnp.bfloat16)
    return lower(jax.jit(decode), shapes, latents)


@contextlib.contextmanager
def in_folder(blocks: int = 0) -> Any:
    """Run the block in a temporary folder that has files of the released sizes; yield what loads a configuration."""
    from anima_jax.config.load import load_config
    from tests import dry_runs

    root = pathlib.Path.cwd()
    with dry_runs.in_folder(blocks):

        def load(name: str, keys: list[str]) -> Any:
            path = next(
                (
                    one
                    for one in (
                        root / name,
                        dry_runs.CONFIGS / f"{name}.toml",
                        dry_runs.CONFIGS / f"anima_{name}.toml",
                        dry_runs.CONFIGS / f"anima_{pathlib.Path(name).name}",
                    )
                    if one.is_file()
                ),
                None,
            )
            if path is None:
                sys.exit(f"{name}: no such configuration")
            tokenizers = (
                [] if path.name == "shapes.toml" else [f"model.tokenizer_path={dry_runs.ASSETS / 'tokenizers'}"]
            )
            return load_config(str(path), [*tokenizers, *keys])

        yield load


if __name__ == "__main__":
    main()
