"""The programs of the released networks, two blocks deep, compiled by the compilers of TPUs and GPUs. Nothing runs.

Each program is compiled once, in a process of its own, and all that is asserted of it is read from its text. Slow: a
program takes one or two minutes of a core.
"""

import concurrent.futures
import functools
import importlib.util
import multiprocessing

import pytest

from anima_jax.parallel.topologies import parse_topology, use_compilers
from anima_jax.training.optimizers import rows

pytestmark = pytest.mark.slow

TOKENS = 4096
PLUGINS = {"tpu": "libtpu", "gpu": "jax_cuda13_plugin"}

ONCE = ["gradient_accumulation_steps=1", "micro_batch_size_per_gpu=1"]
LORA = [*ONCE, "adapter.rank=32"]
MESH = "mesh.data={} mesh.fsdp={} mesh.tensor={} mesh.context={}"

STEPS = {
    "lora int8": ("v5e:1x1", "anima_lora", [*LORA, "model.transformer_dtype=int8", "remat=full"]),
    "lora float8, nothing recomputed": (
        "v5e:1x1",
        "anima_lora",
        [*LORA, "model.transformer_dtype=float8", "remat=none", "optimizer.type=adamw8bit"],
    ),
    "lora, dots": ("v5e:1x1", "anima_lora", [*LORA, "remat=dots", "optimizer.type=prodigy"]),
    "offload": (
        "v5p:1x1x1",
        "anima_full",
        [*ONCE, "remat=offload", "optimizer.type=offload", "param_dtype=bfloat16"],
    ),
    "data × fsdp": ("v5p:2x2x2", "anima_full", [*MESH.format(2, 4, 1, 1).split(), *ONCE, "remat=attention"]),
    "tensor × context": ("v5p:2x2x2", "anima_full", [*MESH.format(1, 2, 2, 2).split(), *ONCE, "remat=full"]),
    "H100 lora": ("H100", "anima_lora", LORA),
    "H100 full": ("H100", "anima_full", [*ONCE, "remat=attention"]),
}
"""Between them all remat policies, storages of the base and meshes, and optimizers of each kind."""


@pytest.fixture(scope="module")
def in_process():
    """Return in_process(function, *arguments): compilers set up a process for good, and may end it."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn, initializer=use_compilers) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def need_compiler(target):
    plugin = PLUGINS[parse_topology(target).hardware.platform]
    if importlib.util.find_spec(plugin) is None:
        pytest.skip(f"{plugin} is not installed: pip install -e '.[aot-tpu]' or '.[aot-gpu]'")


def step_figures(target, name, keys):
    """Return the bytes of a compiled step, those that are counted for it, its collectives and its kernels' names."""
    from anima_jax.training.hlo import collectives
    from anima_jax.training.hlo_costs import rows_of
    from tests.benchmarks import aot

    found, counted = aot.run(name, target, keys, aot.OWN | {"blocks": 2}, top=3)
    program = found.program()
    beside = sum(counted.rows.get(row, 0) for row in ("encoders", "samples and evaluation"))
    kernels = [row.instruction.name for row in rows_of(program) if row.kernel]
    return found.memory.total, counted.total - beside, collectives(program), kernels


@pytest.fixture(scope="module")
def figures(in_process):
    found = {}

    def of(name):
        need_compiler(STEPS[name][0])
        if name not in found:
            found[name] = in_process(step_figures, *STEPS[name])
        return found[name]

    return of


@pytest.mark.parametrize("name", STEPS)
def test_a_step_compiles_with_the_memory_that_is_counted_and_fused_attention(figures, name):
    compiled, counted, _, kernels = figures(name)
    # Two blocks have the same buffers of the compiler's own as 28, so that these are a larger part.
    assert counted == pytest.approx(compiled, rel=0.25)
    assert kernels


@pytest.mark.parametrize("name", ["data × fsdp", "tensor × context"])
def test_weights_travel_in_bfloat16_and_gradients_are_scattered(figures, name):
    _, _, found, _ = figures(name)
    sent = sum(one.sent for one in found)
    # Scalars, norms and biases are in float32.
    assert sum(one.sent for one in found if "f32" in one.dtype) < 0.15 * sent
    gathered = sum(one.sent for one in found if one.kind == "all-gather" and one.dtype == "bf16")
    assert gathered > 0.2 * sent
    assert any(one.kind == "reduce-scatter" and one.dtype == "bf16" for one in found)


def test_no_activation_is_gathered_over_data_and_fsdp(figures):
    _, _, found, _ = figures("data × fsdp")
    # Activations are (examples, tokens, …); the LLM adapter has kernels of 4096 × 1024.
    found = [one for one in found if one.kind == "all-gather" and "llm_adapter" not in one.source]
    assert [one for one in found if f",{TOKENS}," in one.arrays] == []


def sampler_bytes(target):
    from anima_jax.checkpoints.hub import headers_only
    from anima_jax.training import aot, compiled_run, estimate
    from tests.benchmarks.aot import in_folder

    topology = parse_topology(target)
    with in_folder(2) as load, headers_only():
        config = load("anima_lora", ["sample.steps=8", "sample.width=1024", "sample.height=1024"])
        partition = estimate.abstract_partition(config)
        with aot.on_topology(topology, config.mesh.sizes):
            found = aot.compile_for(topology, lambda: compiled_run.lowered_samples(config, partition))
    return found.memory.total


def test_the_sampler_compiles(in_process):
    need_compiler("v5e:1x1")
    assert 0 < in_process(sampler_bytes, "v5e:1x1") < 4 * 2**30


def vae_bytes(target):
    from anima_jax.compiler import compiler_options
    from anima_jax.parallel.mesh import current_mesh
    from anima_jax.training import aot
    from tests.benchmarks.aot import lowered_decoder

    topology = parse_topology(target)
    with aot.on_topology(topology, {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}):
        options = compiler_options(current_mesh(), "vae")
        return aot.compile_for(topology, lambda: lowered_decoder(1024), options).memory.total


def test_the_vae_decodes_a_megapixel_in_less_than_four_gib(in_process):
    need_compiler("v5e:1x1")
    assert in_process(vae_bytes, "v5e:1x1") < 4 * 2**30


def splash_kernels(target):
    """Return the number of kernels in the program of attention and of its gradient."""
    import jax
    import jax.numpy as jnp

    from anima_jax.models.attention import attention
    from anima_jax.parallel.mesh import current_mesh, replicated
    from anima_jax.platform import lower
    from anima_jax.training import aot

    topology = parse_topology(target)

    def loss(q, k, v, lengths):
        return attention(q, k, v, key_lengths_b=lengths).astype(jnp.float32).sum()

    with aot.on_topology(topology, {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}):
        place = replicated(current_mesh())
        x = jax.ShapeDtypeStruct((1, 1024, 16, 128), jnp.bfloat16, sharding=place)
        lengths = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=place)
        programs = [
            aot.compile_for(topology, functools.partial(lower, jax.jit(run), x, x, x, lengths))
            for run in (loss, jax.grad(loss, (0, 1, 2)))
        ]
    return [found.text.count("tpu_custom_call") for found in programs]


@pytest.mark.parametrize("target", ["v5e:1x1", "v5p:1x1x1"])
def test_splash_attention_compiles_forward_and_backward(in_process, target):
    need_compiler(target)
    forward, backward = in_process(splash_kernels, target)
    assert forward > 0
    assert backward > forward


def updates_fail(target, names):
    """Return the error of each optimizer whose update of stacked and other parameters does not compile."""
    import jax
    import jax.numpy as jnp

    from anima_jax.errors import UserError
    from anima_jax.parallel.mesh import current_mesh, replicated
    from anima_jax.platform import lower
    from anima_jax.training import aot
    from anima_jax.training.step import StepConfig, apply_gradients, init_state
    from tests.training.test_optimizer_table import SHAPES, build

    topology, failed = parse_topology(target), {}
    with aot.on_topology(topology, {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}):
        mesh = current_mesh()
        place = replicated(mesh)

        def placed(tree):
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

        config = StepConfig(param_dtype=jnp.bfloat16, ema_decay=0.9)
        params = {path: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for path, shape in SHAPES.items()}
        for name in names:
            optimizer = build(name, clip_norm=1.0)
            state = jax.eval_shape(lambda given, tx=optimizer: init_state(given, tx, config, mesh), params)

            def update(state, loss, grads, optimizer=optimizer):
                return apply_gradients(state, loss, grads, optimizer=optimizer, config=config)

            loss, run = jax.ShapeDtypeStruct((), jnp.float32, sharding=place), jax.jit(update)
            try:
                aot.compile_for(topology, functools.partial(lower, run, placed(state), loss, placed(params)))
            except UserError as error:
                failed[name] = str(error)
    return failed


def test_every_optimizers_update_compiles(in_process):
    need_compiler("v5e:1x1")
    # The state of `offload` is in host memory: it is in `STEPS`.
    assert in_process(updates_fail, "v5e:1x1", [name for name in rows() if name != "offload"]) == {}
