"""Checkpoints: items are restored bit for bit, and a failed save leaves the checkpoint before it intact."""

import contextlib
import functools
import logging
import resource
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from anima_jax.checkpoints.names import dit, file_tensors
from anima_jax.checkpoints.orbax import RunCheckpoints, errors_reported_once
from anima_jax.config.optimizer import OptimizerConfig
from anima_jax.errors import UserError
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT, DiTConfig
from anima_jax.models.llm_adapter import LLMAdapterConfig
from anima_jax.training import optimizers

DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "int8", "uint8", "int32", "uint32"]


@pytest.fixture
def checkpoints(tmp_path):
    opened: list[RunCheckpoints] = []

    def open_(keep=None):
        opened.append(RunCheckpoints(tmp_path / "checkpoints", keep=keep))
        return opened[-1]

    with errors_reported_once():
        yield open_
        for each in opened:
            each.close()


def bits(leaf) -> tuple:
    """A leaf's dtype, shape and bytes, which are equal only for equal bits, NaN and -0.0 included."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), *bits(jax.random.key_data(leaf))
    array = np.asarray(leaf)
    return str(array.dtype), array.shape, array.tobytes()


def every_kind() -> dict:
    """Trees with every dtype, with values that a cast would change, and with every kind of container."""
    raw = np.random.default_rng(0).bytes(256)
    arrays = {name: np.frombuffer(raw, getattr(ml_dtypes, name, name)) for name in DTYPES if name != "int4"}
    arrays["float32"] = np.array([0.0, -0.0, np.nan, np.inf, 1e-45, 1 + 2**-23], np.float32)
    arrays["int4"] = np.arange(-8, 8).astype(ml_dtypes.int4)
    return {
        "params": {f"blocks.{name}.kernel": jnp.asarray(array) for name, array in arrays.items()},
        "state": (
            optax.EmptyState(),
            optax.MaskedNode(),
            {"layer": [jnp.array(3, jnp.int32), None, ()], "a/b": jnp.array([True, False])},
            optax.ScaleByScheduleState(jnp.array(7, jnp.int32)),
            jax.random.key(5),
            jnp.zeros((0, 3), jnp.bfloat16),
        ),
        "nothing": (optax.EmptyState(), None),
    }


def test_every_dtype_and_container_is_restored_bit_for_bit(checkpoints):
    items = every_kind()
    metadata = {"step": 4, "notes": ["é", None, {"x": 1.5}]}
    first = checkpoints()
    first.save(4, items, metadata)
    first.close()
    again = checkpoints()
    assert again.latest() == 4
    assert again.metadata(4) == metadata
    abstract = jax.eval_shape(lambda: items)
    for wanted in (items, abstract):
        found = again.restore(4, wanted)
        assert jax.tree.structure(found) == jax.tree.structure(items)
        assert jax.tree.map(bits, found) == jax.tree.map(bits, items)
    assert jax.tree.map(bits, again.restore(4, {"params": items["params"]})["params"]) == jax.tree.map(
        bits, items["params"]
    )


CONFIG = DiTConfig(16, 2, 1, 32, 16, 4, adapter=LLMAdapterConfig(16, 1, 1, 32, 16, 16, 10))


PATHS = [
    "x_embedder.kernel",
    "blocks.mlp.layer1.kernel",
    "blocks.self_attn.q_norm.scale",
    "llm_adapter.norm.scale",
]


@pytest.mark.parametrize("wrap", [lambda tx: tx, functools.partial(optax.MultiSteps, every_k_schedule=2)])
def test_a_restored_optimizer_state_continues_with_the_same_steps(checkpoints, wrap):
    abstract = parameters.abstract(lambda rngs: AnimaDiT(CONFIG, rngs=rngs))[1]
    params = {path: jnp.ones(abstract[path].shape) for path in PATHS}
    rates = optimizers.LearningRates({group: 1e-3 for group, _ in optimizers.GROUPS}, total_steps=10)
    config = OptimizerConfig(type="adamw", lr=1e-3)
    optimizer = wrap(optimizers.build(config, rates, file_tensors(dit.RULES, params)))

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(params, optimizer.init(params))
    saver = checkpoints()
    saver.save(1, {"params": params, "optimizer": state}, {})
    saver.wait()
    found = saver.restore(1, {"params": params, "optimizer": optimizer.init(params)})
    for _ in range(3):
        params, state = step(params, state)
        found["params"], found["optimizer"] = step(found["params"], found["optimizer"])
    assert jax.tree.map(bits, found["optimizer"]) == jax.tree.map(bits, state)
    assert jax.tree.map(bits, found["params"]) == jax.tree.map(bits, params)


def test_a_checkpoint_has_the_values_at_the_call_although_later_steps_reuse_the_buffers(checkpoints):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = step({"w": jnp.arange(2_000_000, dtype=jnp.float32)})
    saver = checkpoints()
    for number in range(1, 4):
        saver.save(number, {"params": state}, {})
        for _ in range(10):
            state = step(state)
    saver.wait()
    for number in range(1, 4):
        found = saver.restore(number, {"params": state})["params"]["w"]
        np.testing.assert_array_equal(found, np.arange(2_000_000) + (number - 1) * 10 + 1)


def test_the_newest_are_kept_and_an_existing_one_is_not_replaced(checkpoints):
    saver = checkpoints(keep=2)
    for step in (1, 2, 10):
        saver.save(step, {"params": {"w": jnp.full(3, step)}}, {"step": step})
    saver.wait()
    assert saver.steps() == [2, 10]
    saver.save(10, {"params": {"w": jnp.zeros(3)}}, {})
    saver.wait()
    assert saver.metadata(10) == {"step": 10}
    np.testing.assert_array_equal(saver.restore(10, {"params": {"w": jnp.zeros(3, int)}})["params"]["w"], [10, 10, 10])


@pytest.fixture
def limit_file_size():
    """A context in which no file of this process can grow beyond 100 kB."""

    @contextlib.contextmanager
    def limited():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture
def state():
    return {"w": jax.random.normal(jax.random.key(0), (300_000,))}


def test_a_full_disk_is_reported_once_on_one_line(checkpoints, state, limit_file_size, caplog):
    saver = checkpoints(keep=1)
    saver.save(1, {"params": state}, {})
    saver.wait()
    with limit_file_size(), caplog.at_level(logging.WARNING):
        saver.save(2, {"params": {"w": state["w"] + 1}}, {})
        saver.wait()
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == saver.failure
    assert "\n" not in message
    assert "step 2 could not be saved" in message
    assert "ulimit -f" in message
    assert "the newest is still that of step 1" in message


def test_a_full_disk_leaves_the_earlier_checkpoint_and_later_saves_succeed(
    checkpoints, state, limit_file_size, tmp_path
):
    saver = checkpoints(keep=1)
    saver.save(1, {"params": state}, {})
    saver.wait()
    with limit_file_size():
        saver.save(2, {"params": {"w": state["w"] + 1}}, {})
        saver.wait()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert bits(saver.restore(1, {"params": state})["params"]["w"]) == bits(state["w"])
    saver.save(3, {"params": state}, {})
    saver.wait()
    assert saver.failure is None
    assert saver.steps() == [3]


def test_the_programs_hooks_and_filters_are_restored():
    hook, absl = sys.unraisablehook, list(logging.getLogger("absl").filters)
    with errors_reported_once():
        assert sys.unraisablehook is not hook
    assert sys.unraisablehook is hook
    assert logging.getLogger("absl").filters == absl


def test_a_folder_that_cannot_be_created_is_a_failed_save(tmp_path):
    (tmp_path / "file").write_text("")
    saver = RunCheckpoints(tmp_path / "file" / "checkpoints", keep=None)
    saver.save(1, {"params": {"w": jnp.zeros(3)}}, {})
    saver.close()
    assert saver.failure is not None
    assert "there is no earlier one" in saver.failure


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"w": jnp.zeros((2, 4)), "b": jnp.zeros(3)}, "w was float32[2,3], now float32[2,4]"),
        ({"w": jnp.zeros((2, 3), jnp.bfloat16), "b": jnp.zeros(3)}, "now bfloat16[2,3]"),
        ({"w": jnp.zeros((2, 3))}, "b is gone"),
        ({"w": jnp.zeros((2, 3)), "b": jnp.zeros(3), "c": jnp.zeros(3)}, "c is new"),
    ],
)
def test_another_layout_is_refused_and_never_cast_or_cut(checkpoints, params, message):
    saver = checkpoints()
    saver.save(1, {"params": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}}, {})
    saver.wait()
    with pytest.raises(UserError) as refused:
        saver.restore(1, {"params": params})
    assert message in str(refused.value)
    with pytest.raises(UserError, match="has no ema, only params"):
        saver.restore(1, {"ema": params})


def test_a_damaged_checkpoint_is_named_in_one_line(checkpoints, tmp_path):
    state = {"params": {"w": jax.random.normal(jax.random.key(0), (10_000,))}}
    saver = checkpoints()
    for step in (1, 2):
        saver.save(step, state, {})
    saver.wait()
    largest = max((tmp_path / "checkpoints" / "2").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.raises(UserError) as refused:
        saver.restore(2, state)
    assert str(refused.value) == f"{tmp_path}/checkpoints/2: cannot be read (its files are damaged)"


def test_unfinished_and_other_folders_are_not_checkpoints(checkpoints, tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / "5.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (folder / "6").mkdir()
    (folder / "notes").mkdir()
    saver = checkpoints()
    assert saver.latest() is None
    saver.save(1, {"params": {"w": jnp.zeros(3)}}, {})
    saver.wait()
    assert saver.latest() == 1
    assert sorted(path.name for path in folder.iterdir()) == ["1", "6", "notes"]
