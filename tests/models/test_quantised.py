"""Weights in 8 and 4 bits: bytes, errors, and what a LoRA on them learns."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load_file

from anima_jax.adapters import modules
from anima_jax.adapters.kinds import SCALE
from anima_jax.checkpoints.models import save_dit
from anima_jax.checkpoints.names import dit, file_tensors
from anima_jax.models import parameters, quantised
from anima_jax.models.dit import AnimaDiT, DiTConfig
from anima_jax.models.llm_adapter import LLMAdapterConfig
from anima_jax.models.quantised import Quantised, quantise
from anima_jax.models.qwen3 import Qwen3, Qwen3Config
from tests.models.networks import normal, quick_jit, random_model, random_params

CONFIG = DiTConfig(64, 4, 2, 128, 32, 16, adapter=LLMAdapterConfig(32, 1, 2, 64, 24, 32, 40))

RMS_ERROR = {"float8": 0.03, "float8_e5m2": 0.06, "int8": 0.01, "nf4": 0.11}
"""Of normal weights. A spacing / √12: 2^-3 and 2^-2 of a mantissa in [1, 2) for float8, a 127th of a peak of two to
three deviations for int8. NF4's is about a tenth (arXiv 2305.14314)."""


def values(*shape, seed=0):
    return jnp.asarray(0.02 * normal(*shape, seed=seed))


@pytest.mark.parametrize("storage", RMS_ERROR)
def test_normal_weights_are_stored_within_the_formats_error(storage):
    kernel = values(2, 128, 48)
    error = np.asarray(quantise(kernel, storage)) - kernel
    relative = float(jnp.sqrt(jnp.mean(error**2) / jnp.mean(kernel**2)))
    assert 0.3 * RMS_ERROR[storage] < relative < RMS_ERROR[storage]


@pytest.mark.parametrize(
    ("storage", "nbytes"),
    [
        ("float8", 3 * 128 * 40 + 3 * 40 * 4),
        ("int8", 3 * 128 * 40 + 3 * 40 * 4),
        ("nf4", 3 * 128 * 40 // 2 + 3 * 2 * 40 * 4),  # two codes a byte, a float32 for each 64
    ],
)
def test_storage_has_the_expected_size(storage, nbytes):
    stored = quantise(values(3, 128, 40), storage)
    assert stored.nbytes == nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(stored))
    assert stored.shape == (3, 128, 40)


@pytest.mark.parametrize("storage", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_weights_are_stored_exactly(storage):
    dtype = getattr(ml_dtypes, storage)
    every = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    every = every[np.isfinite(every)]
    kernel = np.stack([every, every[::-1] / 64], axis=1).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(quantise(jnp.asarray(kernel), storage)), kernel)


@settings(deadline=None, max_examples=30)
@given(
    arrays(np.float32, (5, 4), elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False)),
    st.sampled_from(["float8", "float8_e5m2", "int8"]),
)
@example(np.full((5, 4), 2.5e-36, np.float32), "float8")  # peak / 448 is below the smallest normal number
@example(np.full((5, 4), 1.4e-36, np.float32), "int8")
@example(np.full((5, 4), 1e-34, np.float32), "float8_e5m2")
def test_no_value_is_off_by_more_than_half_a_step(kernel, storage):
    peak = np.abs(kernel).max(0)
    found = np.asarray(quantise(jnp.asarray(kernel), storage))
    # Half a step is 2^-(m+1) of the value for m mantissa bits; below the smallest normal, and for int8, of the peak.
    relative, absolute = {"float8": (2**-4, 2**-17), "float8_e5m2": (2**-3, 2**-31), "int8": (0, 0.5 / 127)}[storage]
    assert np.all(np.abs(found - kernel) <= 1.0001 * (relative * np.abs(kernel) + absolute * peak) + 1e-37)


def test_nf4_is_the_nearest_of_sixteen_levels_times_the_peak_of_64_inputs():
    kernel = np.asarray(values(150, 8))  # 150: the last block is not full
    found = np.asarray(quantise(jnp.asarray(kernel), "nf4"))
    for start in range(0, 150, 64):
        block = kernel[start : start + 64]
        peaks = np.abs(block).max(0)
        nearest = np.abs(block[..., None] / peaks[:, None] - quantised.NF4_LEVELS).argmin(-1)
        np.testing.assert_allclose(found[start : start + 64], quantised.NF4_LEVELS[nearest] * peaks, rtol=1e-6)


def test_a_shard_of_nf4_contains_its_own_rows():
    stored = quantise(values(256, 8), "nf4")
    half = Quantised(stored.codes[64:], stored.scales[2:], 128, stored.dtype)
    np.testing.assert_array_equal(np.asarray(half), np.asarray(stored)[128:])


def test_nf4_levels_are_quantiles_of_a_normal_distribution():
    # arXiv 2305.14314 and bitsandbytes' create_normal_map: 8 quantiles above and 7 below zero, from the tail's 0.9677.
    from statistics import NormalDist

    tail = 0.9677083
    above = [NormalDist().inv_cdf(q) for q in np.linspace(tail, 0.5, 9)[:-1]]
    below = [-NormalDist().inv_cdf(q) for q in np.linspace(tail, 0.5, 8)[:-1]]
    expected = np.sort([*below, 0.0, *above]) / max(above)
    np.testing.assert_allclose(quantised.NF4_LEVELS, expected, atol=1e-6)


def test_rows_of_a_table_are_selected_before_they_are_dequantised():
    table = values(40, 16)
    ids = jnp.array([[3, 39], [0, 3]])
    stored = quantise(table, "int8", table=True)
    np.testing.assert_array_equal(stored.take(ids), np.asarray(stored)[ids])
    assert np.abs(stored.take(ids) - table[ids]).max() <= 0.51 * jnp.abs(table).max() / 127


@functools.cache
def base() -> tuple[object, dict]:
    """A LoRA on every linear layer: the module's structure and all parameters, matrices in bfloat16."""

    def build(rngs):
        model = AnimaDiT(CONFIG, rngs=rngs)
        shapes = modules.target_shapes(model)
        modules.attach(
            model, {path: modules.adapter_spec("lora", shape, [4] * shape[0]) for path, shape in shapes.items()}
        )
        return model

    graphdef, shapes = parameters.abstract(build)
    return graphdef, parameters.cast_to_compute(random_params(shapes), jnp.bfloat16)


def loss(adapter, frozen, dtype, remat="full"):
    model = parameters.merge(base()[0], frozen | adapter)
    source, latents = jnp.asarray(normal(2, 5, 24), dtype), jnp.asarray(normal(2, 1, 8, 8, 16), dtype)
    context = model.llm_adapter(source, jnp.arange(12).reshape(2, 6))
    out = model(latents, jnp.array([0.3, 0.8]), context, remat=remat)
    return jnp.mean((out - normal(2, 1, 8, 8, 16, seed=1)) ** 2)


@quick_jit
def adapter_gradients(adapter, frozen):
    return jax.grad(loss)(adapter, frozen, jnp.bfloat16)


def divided(storage=None, compute=None):
    params = base()[1]
    adapter = {path: value.astype(jnp.float32) for path, value in params.items() if modules.is_factor(path)}
    frozen = {path: value for path, value in params.items() if path not in adapter}
    if storage:
        frozen = {p: quantised.quantise_transformer(p, v, storage, compute) for p, v in frozen.items()}
    return adapter, frozen


def test_diffusion_pipes_exceptions_are_not_quantised():
    frozen = divided("int8")[1]
    kept = {path.split(".")[0] for path, value in frozen.items() if not isinstance(value, Quantised)}
    assert kept == {"x_embedder", "t_embedder", "t_embedding_norm", "final_layer", "blocks", "llm_adapter"}
    for path, value in frozen.items():
        in_blocks = path.startswith(("blocks.", "llm_adapter."))
        assert isinstance(value, Quantised) == (in_blocks and path.endswith((".kernel", ".embedding"))), path


def test_a_saved_transformer_has_the_dequantised_values(tmp_path):
    frozen = {path: value for path, value in divided("float8")[1].items() if not path.endswith(SCALE)}
    save_dit(tmp_path / "model.safetensors", frozen)
    written = load_file(tmp_path / "model.safetensors")
    for tensor in file_tensors(dit.RULES, frozen):
        value = np.asarray(frozen[tensor.path])
        expected = tensor.layout.to_file(value if tensor.layer is None else value[tensor.layer])
        np.testing.assert_array_equal(written[f"net.{tensor.name}"], expected, err_msg=tensor.name)


@pytest.mark.parametrize("storage", ["float8", "int8"])
def test_a_lora_on_quantised_weights_has_the_gradients_of_one_on_bfloat16(storage):
    expected, found = (adapter_gradients(*divided(kind)) for kind in (None, storage))
    a, b = (np.concatenate([np.asarray(g[path]).ravel() for path in sorted(g)]) for g in (expected, found))
    assert abs(np.linalg.norm(b) / np.linalg.norm(a) - 1) < 0.05
    assert a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) > 0.99


def test_the_backward_keeps_no_dequantised_layer():
    adapter, frozen = divided("int8")

    def temporary_bytes(frozen):
        gradients = quick_jit(functools.partial(jax.grad(loss), dtype=jnp.float32, remat="none"))
        return gradients.lower(adapter, frozen).compile().memory_analysis().temp_size_in_bytes

    numbers = {p: jnp.asarray(np.asarray(v, np.float32)) for p, v in frozen.items()}
    in_blocks = sum(v.nbytes for p, v in numbers.items() if isinstance(frozen[p], Quantised))
    # One of five layers at a time may be numbers, on top of the activations; all layers may not.
    assert temporary_bytes(frozen) < temporary_bytes(numbers) + 0.2 * in_blocks


@pytest.mark.parametrize(("storage", "error"), [("float8_e4m3fn", 0.1), ("nf4", 0.3)])
def test_a_quantised_text_encoder_stays_near_the_original(storage, error):
    config = Qwen3Config(width=64, layers=2, heads=4, key_heads=2, head_size=16, mlp_width=128, vocabulary=50)
    model = random_model(Qwen3, config)
    smaller = quantised.quantise_text_encoder(model, storage)
    ids = jnp.arange(14).reshape(2, 7)
    run = quick_jit(lambda model: model(ids))
    expected, found = run(model), run(smaller)
    # The weights' own relative error (above) through four sums of two layers.
    assert 0 < float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)) < error
    params = parameters.split(smaller)[1]
    assert {p for p, v in params.items() if isinstance(v, Quantised)} == {p for p in params if p.endswith(".kernel")}
