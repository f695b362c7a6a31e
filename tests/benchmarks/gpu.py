"""Speed and memory on this machine's GPU, in one table: `python -m tests.benchmarks.gpu`, under nine minutes.

Each row runs in its own process, so that peak memory is per row, at the released sizes with random weights and images
of 1024². MFU is relative to the bfloat16 matrix-product speed that the first row measures. A row that runs out of time
is skipped and says so. The table is printed and appended to RESULTS.md with the device and the date.

`--small` runs every row within seconds on a CPU, to check that all of them run.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.benchmarks.compile import adamw

RESULTS = pathlib.Path(__file__).parent / "RESULTS.md"
TOTAL_SECONDS = 9 * 60 - 20  # the rest is for startup and shutdown
ROW_SECONDS = 150


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the networks and of their inputs."""

    small: bool = False

    @property
    def side(self) -> int:
        """Rows and columns of images, in pixels."""
        return 64 if self.small else 1024

    @property
    def tokens(self) -> int:
        return (self.side // 16) ** 2

    @property
    def steps(self) -> int:
        return 3 if self.small else 30

    def transformer(self):
        from anima_jax.models.dit import DiTConfig
        from anima_jax.models.llm_adapter import LLMAdapterConfig

        if not self.small:
            return DiTConfig()
        return DiTConfig(64, 2, 4, 128, 32, 8, adapter=LLMAdapterConfig(32, 1, 2, 64, 64, 32, 512))

    def vae(self):
        from anima_jax.models.wan_vae import WanVAEConfig

        return WanVAEConfig(base_width=8) if self.small else WanVAEConfig()


Result = dict[str, Any]
"""A row's results: `seconds`, `images`, `tflops` of one run, `peak_gib`, `note`; each may be missing."""


def ceiling(sizes: Sizes) -> Result:
    """Speed of bfloat16 matrix products alone, the best of a few sizes."""
    import jax
    import jax.numpy as jnp

    best = 0.0
    for n in (256,) if sizes.small else (4096, 8192, 16384):
        a, b = (jnp.ones((n, n), jnp.bfloat16) for _ in range(2))
        seconds = timed(jax.jit(lambda a, b: a @ b), a, b)
        best = max(best, 2.0 * n**3 / seconds / 1e12)
    return {"note": f"{best:.4g} TFLOP/s", "ceiling": best}


def forward(sizes: Sizes, batch: int = 4, implementation: str = "auto") -> Result:
    """The transformer's forward pass on a batch."""
    import jax
    import jax.numpy as jnp

    from anima_jax.models.parameters import cast_to_compute, merge
    from anima_jax.training.flops import Workload, flops

    graphdef, params = random_transformer(sizes)
    params = cast_to_compute(params, jnp.bfloat16)
    latents, times, context = inputs(sizes, batch)
    grid = (1, sizes.side // 16, sizes.side // 16)

    @jax.jit
    def run(params, latents_blc, times_b, context_bnd):
        model = merge(graphdef, params)
        return model.velocity(latents_blc, grid, times_b, context_bnd, attention_implementation=implementation)

    config = sizes.transformer()
    workload = Workload("", batch, 1, sizes.tokens, grid, 64, 512)
    per_example = flops(config, params, workload, "none")
    seconds = timed(run, params, latents, times, context)
    return {"seconds": seconds, "images": batch, "tflops": batch * per_example.forward / 1e12}


def train(sizes: Sizes, kind: str, remat: str, batch: int, storage: str | None = None) -> Result:
    """An optimizer step: AdamW on every weight, or on a LoRA of rank 32 with frozen weights in bfloat16 or 8 bits."""
    import jax
    import jax.numpy as jnp

    from anima_jax.checkpoints.names import dit, file_tensors
    from anima_jax.models.quantised import quantise_transformer
    from anima_jax.training.flops import Workload, flops
    from anima_jax.training.memory import abstract_batch
    from anima_jax.training.step import StepConfig, compile_step, init_state

    config = sizes.transformer()
    graphdef, params = random_transformer(sizes)
    frozen: dict = {}
    if kind == "lora":
        graphdef, trained, scales, tensors = with_lora(config)
        frozen = {path: value.astype(jnp.bfloat16) for path, value in params.items()}
        if storage:
            frozen = {path: quantise_transformer(path, value, storage) for path, value in frozen.items()}
        frozen |= scales
        params = trained
    else:
        tensors = file_tensors(dit.RULES, params)
    optimizer, settings = adamw(tensors), StepConfig(remat=remat)
    state = init_state(params, optimizer, settings)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = compile_step(graphdef, optimizer, settings, shardings=shardings)
    grid = (1, sizes.side // 16, sizes.side // 16)
    workload = Workload("", batch, 1, sizes.tokens, grid, 128, 128)
    examples = zeros_like(abstract_batch(workload, batch, config, jnp.bfloat16))
    examples = examples._replace(grid_b3=jnp.array([grid] * batch, jnp.int32))
    per_example = flops(config, params, workload, remat)
    del params  # the step donates their memory to the new ones

    def run():
        nonlocal state
        state, metrics = step(state, frozen, examples, None)
        return metrics.loss

    began = time.perf_counter()
    jax.block_until_ready(run())
    first = time.perf_counter() - began
    seconds = timed(run)
    tflops = batch * per_example.model / 1e12
    return {"seconds": seconds, "images": batch, "tflops": tflops, "note": f"first step {first:.1f} s"}


def sample(sizes: Sizes) -> Result:
    """30 steps with guidance, both prompts in one evaluation; without the VAE."""
    import jax.numpy as jnp
    import numpy as np

    from anima_jax.diffusion import samplers, schedules
    from anima_jax.diffusion.samplers.plan import make_plan
    from anima_jax.models.parameters import cast_to_compute
    from anima_jax.sampling import program
    from anima_jax.sampling.context import Context
    from anima_jax.sampling.evaluation import SharedInputs
    from anima_jax.sampling.packing import TokenPacking

    graphdef, params = random_transformer(sizes)
    params = cast_to_compute(params, jnp.bfloat16)
    _, _, context = inputs(sizes, 2)
    sigmas = schedules.sigmas("simple", sizes.steps, 3.0)
    plan = make_plan(samplers.SAMPLERS["euler"].formulas, sigmas, 3.0)
    size = (1, sizes.side // 8, sizes.side // 8)
    start, packing = np.random.default_rng(0).standard_normal((*size, 16), np.float32), TokenPacking([size])
    shared = SharedInputs(packing.size_b3, Context(context, None))
    scales = np.full(len(plan.sigmas_n), 4.0, np.float32)

    def run():
        return program.sample(params, graphdef, jnp.dtype("bfloat16"), plan, packing, [start], shared, scales)

    run()
    seconds = timed(run)
    return {"seconds": seconds, "images": 1, "note": f"{sizes.steps / seconds:.3g} it/s"}


def vae(sizes: Sizes, decode: bool) -> Result:
    """One image through the VAE in bfloat16."""
    import jax
    import jax.numpy as jnp

    from anima_jax.models.parameters import initial, merge
    from anima_jax.models.wan_vae import WanVAE

    config = sizes.vae()
    graphdef, params = initial(lambda rngs: WanVAE(config, rngs=rngs), 0)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    side = sizes.side // 8 if decode else sizes.side
    given = jnp.zeros((1, 1, side, side, 16 if decode else 3), jnp.bfloat16)
    run = jax.jit(lambda params, x: merge(graphdef, params).decode(x) if decode else merge(graphdef, params).encode(x))
    return {"seconds": timed(run, params, given), "images": 1}


def compilation(sizes: Sizes) -> Result:
    """The full train step, compiled and then loaded from the cache, each in its own process."""
    code = (
        "from tests.benchmarks import compile, gpu; "
        f"sizes = gpu.Sizes({sizes.small}); "
        "print(sum(compile.compile_seconds(sizes.transformer(), sizes.tokens, 128)))"
    )
    with tempfile.TemporaryDirectory() as folder:
        cache = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        command, environment = [sys.executable, "-c", code], os.environ | cache
        runs = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(2)]
    cold, warm = (float(run.stdout.split()[-1]) for run in runs)
    return {"note": f"cold {cold:.1f} s, from the cache {warm:.1f} s"}


def parity(sizes: Sizes) -> Result:
    """cuDNN's attention against ours, forward and backward: the largest difference over the largest value."""
    import jax
    import jax.numpy as jnp

    from anima_jax.models.attention import attention

    if jax.default_backend() != "gpu":
        return {"note": "no GPU"}
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, target = (jax.random.normal(key, (2, 1024, 16, 128), jnp.bfloat16) for key in keys)
    lengths = jnp.array([1024, 700])

    def loss(q, k, v, name):
        out = attention(q, k, v, key_lengths_b=lengths, implementation=name)
        return jnp.sum(out.astype(jnp.float32) * target), out

    of = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True), static_argnums=3)
    (grads, out), (others, other) = (of(q, k, v, name) for name in ("cudnn", "xla"))
    far = [
        float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
        for a, b in zip((out, *grads), (other, *others), strict=True)
    ]
    return {"note": "out {:.1e}, gradients of q {:.1e}, k {:.1e}, v {:.1e}".format(*far)}


def torch_noise(sizes: Sizes) -> Result:
    """Our CUDA stream of normal numbers against torch.cuda's own, several draws of several shapes."""
    import numpy as np

    torch = peer("torch")
    if torch is None or not torch.cuda.is_available():
        return {"note": "no torch with CUDA"}
    from anima_jax.diffusion.torch_random import CUDAStream

    worst = 0.0
    for seed in (0, 2**40 + 7):
        generator = torch.Generator("cuda").manual_seed(seed)
        stream = CUDAStream(seed)
        for shape in ((1, 16, 1, 128, 128), (2, 3), (4, 16, 1, 160, 96), (1, 1)):
            theirs = torch.randn(shape, generator=generator, device="cuda").cpu().numpy()
            worst = max(worst, float(np.abs(stream.randn(shape) - theirs).max()))
    return {"note": f"largest difference {worst:.1e}"}


def diffusers(sizes: Sizes, batch: int = 4) -> Result:
    """The same transformer in diffusers, bfloat16 and torch.compile."""
    torch = peer("torch")
    if torch is None or peer("diffusers") is None or (not sizes.small and not torch.cuda.is_available()):
        return {"note": "no torch with CUDA, or no diffusers"}
    from tests.models import dit_peer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device), torch.no_grad():
        model = dit_peer.transformer(dataclasses.replace(sizes.transformer(), adapter=None)).to(torch.bfloat16)
        run = torch.compile(model) if device == "cuda" else model
        side = sizes.side // 8
        latents = torch.randn(batch, 16, 1, side, side, dtype=torch.bfloat16)
        context = torch.randn(batch, 512, sizes.transformer().context_width, dtype=torch.bfloat16)

        def call():
            dit_peer.velocity_tensor(run, latents, torch.full((batch,), 0.5, dtype=torch.bfloat16), context)
            if device == "cuda":
                torch.cuda.synchronize()

        call()
        seconds = timed(call)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    return {"seconds": seconds, "images": batch, "peak_gib": peak}


ROWS: dict[str, Callable[[Sizes], Result]] = {
    "bfloat16 products, ceiling": ceiling,
    "transformer forward, 4 images": forward,
    "transformer forward, attention of xla": lambda sizes: forward(sizes, implementation="xla"),
    "diffusers forward, torch.compile": diffusers,
    "train step, every weight, full remat, 4": lambda sizes: train(sizes, "full", "full", 4),
    "train step, every weight, attention remat, 4": lambda sizes: train(sizes, "full", "attention", 4),
    "train step, every weight, no remat, 1": lambda sizes: train(sizes, "full", "none", 1),
    "train step, LoRA 32, full remat, 1": lambda sizes: train(sizes, "lora", "full", 1),
    "train step, LoRA 32, full remat, 1, float8 base": lambda sizes: train(sizes, "lora", "full", 1, "float8"),
    "train step, LoRA 32, no remat, 1": lambda sizes: train(sizes, "lora", "none", 1),
    "sampling, 30 steps with guidance": sample,
    "VAE encode": lambda sizes: vae(sizes, False),
    "VAE decode": lambda sizes: vae(sizes, True),
    "compilation of the train step": compilation,
    "cuDNN's attention against xla": parity,
    "CUDA noise against torch": torch_noise,
}
"""Most useful first: rows that do not fit into the time are skipped from the end."""


# Shared by the rows


def peer(name: str):
    """Import a library to compare with; None if it is not installed."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def timed(run: Callable, *arguments, runs: int = 5) -> float:
    """Median seconds of a run, after one run to compile."""
    import statistics

    import jax

    jax.block_until_ready(run(*arguments))
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        seconds.append(time.perf_counter() - began)
        if sum(seconds) > 20:
            break
    return statistics.median(seconds)


def random_transformer(sizes: Sizes):
    """Graph and float32 parameters of a randomly initialised network."""
    from anima_jax.models.dit import AnimaDiT
    from anima_jax.models.parameters import initial

    config = sizes.transformer()
    return initial(lambda rngs: AnimaDiT(config, rngs=rngs), 0)


def inputs(sizes: Sizes, batch: int):
    """Tokens, times and context rows in bfloat16."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0))
    latents = jax.random.normal(keys[0], (batch, sizes.tokens, 64), jnp.bfloat16)
    context = jax.random.normal(keys[1], (batch, 512, sizes.transformer().context_width), jnp.bfloat16)
    return latents, jnp.full(batch, 0.5), context


def zeros_like(tree):
    import jax
    import jax.numpy as jnp

    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def with_lora(config):
    """Graph of a transformer with a LoRA of rank 32 on every module that can have one; parameters, scales, tensors."""
    import jax.numpy as jnp
    from flax import nnx

    from anima_jax.adapters import modules
    from anima_jax.adapters.dialects import ADAPTER_RULES
    from anima_jax.adapters.kinds import SCALE
    from anima_jax.checkpoints.names import file_tensors
    from anima_jax.models.dit import AnimaDiT
    from anima_jax.models.parameters import abstract

    bare = nnx.eval_shape(lambda: AnimaDiT(config, rngs=nnx.Rngs(0)))
    specs = {
        path: modules.adapter_spec("lora", shape, [32] * shape[0])
        for path, shape in modules.target_shapes(bare).items()
    }

    def build(rngs):
        model = AnimaDiT(config, rngs=rngs)
        modules.attach(model, specs)
        return model

    graphdef, shapes = abstract(build)
    params = modules.initial(shapes, specs, 0)
    scales = {path: jnp.ones(leaf.shape) for path, leaf in shapes.items() if path.endswith(SCALE)}
    return graphdef, params, scales, file_tensors(ADAPTER_RULES, params)


# The table


def main() -> None:
    options = parse_arguments()
    if options.row:
        print(json.dumps(measured(options.row, Sizes(options.small))))
        return
    lines, device = [], ""
    peak = None
    for name, result in rows(options):
        device = result.pop("device", device)
        peak = result.pop("ceiling", peak)
        lines.append(line(name, result, peak))
        print(lines[-1], flush=True)
    table = f"\n## {device}, {datetime.date.today()}\n\n{HEAD}\n" + "\n".join(lines) + "\n"
    if options.results:
        with open(options.results, "a", encoding="utf-8") as file:
            file.write(table)


HEAD = "| `python -m tests.benchmarks.gpu` | seconds | images/s | TFLOP/s | MFU | peak memory | |\n" + 7 * "|---" + "|"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure speed and memory on this machine's GPU.")
    parser.add_argument("--small", action="store_true", help="small networks, to check that every row runs")
    parser.add_argument("--row", choices=list(ROWS), help="run only this row, print JSON")
    parser.add_argument("--results", default=str(RESULTS), metavar="FILE", help="file to append to; empty: none")
    return parser.parse_args()


def rows(options: argparse.Namespace) -> Iterator[tuple[str, Result]]:
    """Each row's result, or a note why there is none."""
    print(HEAD, flush=True)
    ends = time.monotonic() + TOTAL_SECONDS
    for name in ROWS:
        left = min(ROW_SECONDS, ends - time.monotonic())
        if left < 5:
            yield name, {"note": "no time left"}
            continue
        command = [sys.executable, "-m", "tests.benchmarks.gpu", "--row", name, *(["--small"] if options.small else [])]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            yield name, {"note": f"took more than {left:.0f} s"}
            continue
        if run.returncode:
            reason = (run.stderr.strip() or "no message").splitlines()[-1]
            yield name, {"note": f"failed: {reason[:150]}"}
        else:
            yield name, json.loads(run.stdout.strip().splitlines()[-1])


def measured(name: str, sizes: Sizes) -> Result:
    import jax

    device = jax.devices()[0]
    result = ROWS[name](sizes)
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {"device": f"{device.device_kind}, jax {jax.__version__}", "peak_gib": peak and peak / 2**30, **result}


def line(name: str, result: Result, ceiling: float | None) -> str:
    seconds, images, tflops = (result.get(key) for key in ("seconds", "images", "tflops"))
    speed = tflops / seconds if tflops and seconds else None
    cells = [
        f"{seconds:.4g}" if seconds else "",
        f"{images / seconds:.3g}" if images and seconds else "",
        f"{speed:.4g}" if speed else "",
        f"{speed / ceiling:.0%}" if speed and ceiling else "",
        f"{result['peak_gib']:.1f} GiB" if result.get("peak_gib") else "",
        result.get("note", ""),
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
