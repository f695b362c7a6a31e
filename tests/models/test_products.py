"""Products of activations and weights in 8 bits, against comfy-kitchen's, exact arithmetic and dequantised weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anima_jax.errors import UserError
from anima_jax.models.layers import linear
from anima_jax.models.products import product, quantised_rows
from anima_jax.models.quantised import Quantised, hadamard, quantise, storage_for
from anima_jax.platform import Hardware, compiling_for
from tests.models.networks import normal
from tests.models.test_quantised import adapter_gradients, divided

FLOAT32 = jnp.dtype("float32")


def stored(storage: str, compute: str, *, features: int = 512) -> Quantised:
    kernel = quantise(jnp.asarray(0.02 * normal(features, 96)), storage)
    return dataclasses.replace(kernel, compute=compute)


def activations(features: int = 512) -> np.ndarray:
    """Rows of different sizes, one with an outlier and one of zeros."""
    x = normal(2, 5, features, seed=1) * np.exp(normal(2, 5, 1, seed=2))
    x[0, 0, 3], x[1, 1] = 40.0, 0.0
    return x


@pytest.mark.parametrize("rotation", [0, 256])
def test_products_in_int8_are_those_of_comfy_kitchen(rotation):
    quantization = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    torch = pytest.importorskip("torch")
    weight, x = torch.from_numpy(0.02 * normal(96, 512)), torch.from_numpy(activations())
    if rotation:
        codes, scales = quantization.quantize_int8_convrot_weight(weight, rotation)
        values = quantization.dequantize_int8_convrot_weight(codes, scales, rotation)
    else:
        codes, scales = quantization.quantize_int8_rowwise(weight)
        values = quantization.dequantize_int8_simple(codes, scales)
    kernel = Quantised(codes.numpy().T, scales.numpy().reshape(1, -1), 512, FLOAT32, rotation, "int8")
    np.testing.assert_allclose(np.asarray(kernel), values.numpy().T, atol=1e-6)
    expected = quantization.int8_linear(x, codes, scales, None, torch.float32, convrot=bool(rotation)).numpy()
    found = np.asarray(linear(jnp.asarray(x.numpy()), jax.tree.map(jnp.asarray, kernel)))
    # A rounding of a value halfway between two integers may differ in float32: at most a step of one input.
    assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max()


def test_the_rotation_is_a_symmetric_hadamard_matrix():
    matrix = hadamard(64)
    np.testing.assert_allclose(matrix @ matrix, np.eye(64), atol=1e-6)
    np.testing.assert_array_equal(matrix, matrix.T)
    assert set(np.unique(matrix)) == {np.float32(-1 / 8), np.float32(1 / 8)}
    with pytest.raises(ValueError, match="power of 4"):
        hadamard(128)


@pytest.mark.parametrize(("storage", "compute"), [("int8", "int8"), ("float8", "fp8"), ("float8_e5m2", "fp8")])
@pytest.mark.parametrize("hardware", [Hardware("cpu"), Hardware("tpu", "TPU v4"), Hardware("tpu", "TPU v5e")])
def test_all_hardware_has_the_products_of_the_same_codes(storage, compute, hardware):
    kernel, x = stored(storage, compute), jnp.asarray(activations(), jnp.bfloat16)
    codes, scales = (np.asarray(part, np.float64) for part in quantised_rows(x, compute))
    expected = codes @ np.asarray(kernel.codes, np.float64) * scales * np.asarray(kernel.scales)
    with compiling_for(hardware):
        found = np.asarray(product(x, kernel.astype(x.dtype), FLOAT32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    # The steps of activations and weights: 1/254 of a peak for int8, 2^-4 (e5m2: 2^-3) of a value for float8.
    exact = np.asarray(x, np.float64) @ np.asarray(quantise(jnp.asarray(0.02 * normal(512, 96)), storage), np.float64)
    assert np.linalg.norm(found - exact) < 0.05 * np.linalg.norm(exact)


def test_hardware_is_known_by_its_products():
    cases = {("tpu", "TPU v4"): (), ("tpu", "TPU v5 lite"): ("int8",), ("tpu", "TPU7x"): ("int8", "fp8")}
    assert {key: Hardware(*key).narrow_products for key in cases} == cases
    gpus = {"7.0": (), "8.0": ("int8",), "8.9": ("int8", "fp8"), "9.0": ("int8", "fp8")}
    assert {one: Hardware("gpu", capability=one).narrow_products for one in gpus} == gpus


@pytest.mark.parametrize("rotation", [0, 64])
def test_the_gradient_of_activations_is_that_of_the_dequantised_weights(rotation):
    kernel = dataclasses.replace(stored("int8", "int8"), rotation=rotation)
    x, grad = jnp.asarray(activations()), jnp.asarray(normal(2, 5, 96, seed=3))
    found = jax.vjp(lambda x: linear(x, kernel), x)[1](grad)[0]
    expected = np.asarray(grad) @ np.asarray(kernel).T
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("size", "tolerance"), [(1.0, 1e-3), (1e-3, 1e-3), (1e-4, 3e-3), (1e-5, 2e-2)])
def test_small_gradients_do_not_vanish_in_float16(size, tolerance):
    kernel, grad = stored("int8", "int8").astype(jnp.float16), jnp.asarray(size * normal(10, 96, seed=3), jnp.float16)
    x = jnp.asarray(activations().reshape(10, 512), jnp.float16)
    found = np.asarray(jax.vjp(lambda x: linear(x, kernel), x)[1](grad)[0], np.float64)
    expected = np.asarray(grad, np.float64) @ np.asarray(kernel.astype(FLOAT32), np.float64).T
    # float16 is exact to 5e-4, and below 6e-5 to multiples of 6e-8.
    assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("compute", ["int8", None])
def test_an_update_of_low_rank_is_added_to_the_product(compute):
    base = stored("int8", "int8")
    factors = jnp.asarray(1e-4 * normal(512, 4)), jnp.asarray(normal(4, 96, seed=5))
    changed, x = dataclasses.replace(base, compute=compute, update=factors), jnp.asarray(activations())
    added = np.asarray(linear(x, changed)) - np.asarray(linear(x, dataclasses.replace(base, compute=compute)))
    expected = np.asarray(x) @ np.asarray(factors[0]) @ np.asarray(factors[1])
    np.testing.assert_allclose(added, expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(np.asarray(changed) - np.asarray(base), factors[0] @ factors[1], atol=1e-6)


def test_a_lora_has_the_gradients_of_one_on_the_dequantised_base():
    adapter, frozen = divided("int8")
    multiplied = divided("int8", "int8")[1]
    assert {v.compute for v in multiplied.values() if isinstance(v, Quantised)} == {None, "int8"}
    expected, found = (adapter_gradients(adapter, own) for own in (frozen, multiplied))
    a, b = (np.concatenate([np.asarray(g[path]).ravel() for path in sorted(g)]) for g in (expected, found))
    # Activations rounded to 8 bits change a product by a hundredth, here through four blocks.
    assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(a)


def test_the_storage_must_fit_the_product():
    assert [storage_for(*pair) for pair in ((None, None), (None, "int8"), (None, "fp8"), ("float8_e5m2", "fp8"))] == [
        *(None, "int8", "float8", "float8_e5m2")
    ]
    with pytest.raises(UserError, match="'fp8' multiplies weights stored as float8 or"):
        storage_for("nf4", "fp8")
