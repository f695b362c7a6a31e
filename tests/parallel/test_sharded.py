"""A training step on meshes of eight devices: the numbers of one device, memory per device, and traffic."""

import itertools
import math
import re
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from anima_jax.adapters import modules
from anima_jax.adapters.kinds import TRAINABLE
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT, DiTConfig
from anima_jax.models.llm_adapter import Text
from anima_jax.parallel import rules
from anima_jax.parallel.mesh import make_mesh, rows_of_process, shard_local_rows
from anima_jax.training.step import StepConfig, TrainBatch, compile_step, init_state, loss_and_gradients
from tests.models.networks import random_params
from tests.parallel.meshes import CONFIG, MESHES, name

BATCH, TOKENS, ROWS = 8, 64, 32
FLOAT32 = StepConfig(compute_dtype=jnp.float32)
EDIT = StepConfig(compute_dtype=jnp.float32, edit=True)


def transformer(rngs) -> AnimaDiT:
    return AnimaDiT(CONFIG, rngs=rngs)


def with_adapters(rngs) -> AnimaDiT:
    model = AnimaDiT(CONFIG, rngs=rngs)
    kinds, shapes = itertools.cycle(TRAINABLE), modules.target_shapes(model).items()
    modules.attach(model, {path: modules.adapter_spec(next(kinds), shape, [4] * shape[0]) for path, shape in shapes})
    return model


def examples(grids: list[list[int]]) -> TrainBatch:
    """Return a batch with two aspect ratios or numbers of references and captions of different lengths."""
    rng = np.random.default_rng(0)
    lengths = np.arange(ROWS - BATCH, ROWS)[:, None]
    mask = (np.arange(ROWS) < lengths).astype(np.int32)
    return TrainBatch(
        rng.normal(size=(BATCH, TOKENS, 64)).astype(np.float32),
        np.array(grids * (BATCH // 2), np.int32),
        rng.integers(0, 2**31, (BATCH, 2)).astype(np.uint32),
        np.zeros(BATCH, np.int32),
        Text(
            rng.normal(size=(BATCH, ROWS, 64)).astype(np.float32) * mask[..., None],
            mask,
            rng.integers(0, 500, (BATCH, ROWS)).astype(np.int32),
            mask,
        ),
    )


SIZES = [[1, 8, 8], [1, 7, 9]]
WITH_REFERENCES = [[2, 4, 8], [3, 7, 3]]


def on_mesh(sizes, build, grids=SIZES):
    """Return the mesh, graphdef, parameters and batch of a step."""
    mesh = make_mesh(sizes)
    graphdef, abstract = parameters.abstract(build)
    params = random_params(abstract)
    placed = jax.device_put(params, rules.shardings(params, params, mesh))
    return mesh, graphdef, placed, shard_local_rows(examples(grids), mesh, rows_of_process(mesh, BATCH), BATCH)


def step_on(sizes, build=transformer, accumulation=1, config=FLOAT32):
    """Return loss and gradients on a mesh, and the transfers in the compiled loops over blocks."""
    mesh, graphdef, params, batch = on_mesh(sizes, build, WITH_REFERENCES if config.edit else SIZES)
    frozen = {path: value for path, value in params.items() if build is with_adapters and not modules.is_factor(path)}
    trained = {path: value for path, value in params.items() if path not in frozen}

    def of(trained, frozen, batch):
        return loss_and_gradients(
            trained, frozen, batch, None, graphdef=graphdef, config=config, accumulation=accumulation
        )

    with jax.set_mesh(mesh):
        places = rules.shardings(trained, trained, mesh)
        compiled = jax.jit(of, out_shardings=(None, places)).lower(trained, frozen, batch).compile()
        loss, grads = compiled(trained, frozen, batch)
    return (
        float(loss),
        {path: np.asarray(grad) for path, grad in grads.items()},
        collectives_in_loops(compiled.as_text()),
    )


def collectives_in_loops(program):
    """Return (operation, shape) of every transfer inside a loop."""
    found = []
    for line in program.splitlines():
        match = re.search(r"= (\(.*?\)|\S+) (all-gather|all-to-all|collective-permute)(?:-start)?\(", line)
        if match and "while/body" in line:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            # A layer's slice of a stack keeps the stack's axis, of size 1.
            found += [(match[2], tuple(size for size in map(int, shape.split(",")) if size > 1)) for shape in shapes]
    return found


ONE = dict.fromkeys(rules.AXES, 1)


@pytest.fixture(scope="module")
def alone():
    """Steps on one device, and one with reference pictures."""
    steps: dict = {build: step_on(ONE, build) for build in (transformer, with_adapters)}
    return steps | {EDIT: step_on(ONE, config=EDIT)}


def assert_equal(found, expected):
    """Sums over batch, features and heads have another order: 1e-6 of the loss, 1e-5 of the gradients."""
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys()
    for path, grad in expected[1].items():
        assert np.linalg.norm(found[1][path] - grad) <= 1e-5 * np.linalg.norm(grad), path


@pytest.mark.parametrize("sizes", MESHES, ids=name)
def test_a_step_has_the_numbers_of_one_device_and_sends_only_weights_and_tokens(on_eight, alone, sizes):
    config = EDIT if sizes is MESHES[4] else FLOAT32
    loss, grads, transfers = on_eight(step_on, sizes, transformer, 1, config)
    assert_equal((loss, grads), alone[EDIT if config.edit else transformer])
    params = parameters.abstract(transformer)[1]
    layers = {leaf.shape[1:] for path, leaf in params.items() if ".kernel" in path and "blocks." in path}
    split = {
        tuple(size // sizes["tensor"] if axis == i else size for i, size in enumerate(shape))
        for shape in layers
        for axis in (0, 1)
    }
    gathered = {shape for operation, shape in transfers if operation == "all-gather"}
    assert gathered <= layers | split
    assert bool(gathered) == (sizes["fsdp"] > 1)
    # Around attention tokens are exchanged for heads.
    exchanged = {np.prod(shape) for operation, shape in transfers if operation == "all-to-all"}
    share = BATCH * TOKENS * CONFIG.width // (sizes["data"] * sizes["fsdp"] * sizes["tensor"] * sizes["context"])
    assert exchanged == ({share // sizes["context"]} if sizes["context"] > 1 else set())
    moved = {np.prod(shape) for operation, shape in transfers if operation == "collective-permute"}
    assert max(moved, default=0) <= max(map(np.prod, layers))


def test_adapters_of_every_kind_in_micro_batches_have_the_gradients_of_one_device(on_eight, alone):
    assert_equal(on_eight(step_on, MESHES[4], with_adapters, 2), alone[with_adapters])


def state_bytes_on(sizes, step):
    """Return the bytes of the state (with moments and average) per device, the ideal, and the replicated bytes.

    Ideal is each leaf divided by the axes of its spec.
    """
    mesh, graphdef, params, batch = on_mesh(sizes, transformer)
    with jax.set_mesh(mesh):
        config, optimizer = StepConfig(compute_dtype=jnp.float32, ema_decay=0.9), optax.adamw(1e-3)
        state = init_state(params, optimizer, config)
        if step:
            places = jax.tree.map(lambda leaf: leaf.sharding, state)
            state, _ = compile_step(graphdef, optimizer, config, shardings=places)(state, {}, batch, None)
    held, ideal, whole = dict.fromkeys((device.id for device in mesh.devices.flat), 0), 0, 0
    for leaf in jax.tree.leaves(state):
        ideal += leaf.nbytes // math.prod(rules.parts(axes, sizes) for axes in leaf.sharding.spec)
        whole += leaf.nbytes if leaf.is_fully_replicated else 0
        for shard in leaf.addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    return list(held.values()), ideal, whole, sum(leaf.nbytes for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("sizes", MESHES[1:], ids=name)
def test_parameters_moments_and_average_are_divided_equally(on_eight, sizes):
    held, ideal, everywhere, whole = on_eight(state_bytes_on, sizes, sizes is MESHES[2])
    assert set(held) == {ideal}
    assert everywhere <= 0.02 * whole  # norms and biases, in a network of width 64
    assert ideal <= 1.25 * whole / (sizes["fsdp"] * sizes["tensor"])  # its ends are a large part of it


@pytest.mark.parametrize("sizes", MESHES, ids=name)
def test_the_released_model_is_sharded_within_three_per_cent_of_the_ideal(sizes):
    params = parameters.abstract(lambda rngs: AnimaDiT(DiTConfig(), rngs=rngs))[1]
    ideal = sum(leaf.size * leaf.dtype.itemsize for leaf in params.values()) / (sizes["fsdp"] * sizes["tensor"])
    assert ideal <= rules.shard_bytes(params, params, sizes) <= 1.03 * ideal


def dump_partitioned(sizes, folder):
    """Dump the program after partitioning into `folder`."""
    mesh, graphdef, params, batch = on_mesh(sizes, transformer)
    # A new seed: a cached program would not be compiled, and so not dumped.
    config = StepConfig(compute_dtype=jnp.bfloat16, seed=secrets.randbits(31))

    def of(params, batch):
        return loss_and_gradients(params, {}, batch, None, graphdef=graphdef, config=config)

    # Later passes for CPUs widen bfloat16, so the finished program would have float32.
    options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
    with jax.set_mesh(mesh):
        jax.jit(of).lower(params, batch).compile(compiler_options=options)
    return folder


def test_blocks_that_compute_in_bfloat16_gather_bfloat16(on_eight, tmp_path):
    """The modulations too, although they continue in float32."""
    on_eight(dump_partitioned, MESHES[1], str(tmp_path))
    (dump,) = tmp_path.glob("*jit_of*after_spmd-partitioning*.txt")
    in_loops = (line for line in dump.read_text().splitlines() if "while/body" in line)
    gathered = [match[1] for line in in_loops if (match := re.search(r"= (\w+)\[[\d,]+\]\S* all-gather\(", line))]
    paths = parameters.abstract(transformer)[1]
    # Forward and backward.
    assert len(gathered) == 2 * sum("blocks." in path and path.endswith(".kernel") for path in paths)
    assert set(gathered) == {"bf16"}
