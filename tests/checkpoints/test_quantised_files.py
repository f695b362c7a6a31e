"""Quantised files of ComfyUI and bitsandbytes are read as the weights that their own libraries compute from them."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import anima_jax
from anima_jax.checkpoints.tensor_files import open_tensors
from anima_jax.errors import UserError
from anima_jax.models import parameters
from tests.checkpoints.test_models import dit_tensors, saved

FLOAT8 = ml_dtypes.float8_e4m3fn


def is_quantised(key, array):
    return array.ndim == 2 and ".blocks." in key and key.endswith("layer1.weight")


def fp8_scaled(tensors, scale_name="weight_scale", per_row=False):
    """Return tensors with float8 codes and scales, and the weights that they stand for."""
    stored, values = {}, {}
    for key, array in tensors.items():
        stored[key] = values[key] = array
        if is_quantised(key, array):
            peak = np.abs(array).max(axis=1 if per_row else None, keepdims=per_row)
            scale = np.float32(peak / 448)
            stored[key] = (array / scale).astype(FLOAT8)
            stored[key.removesuffix("weight") + scale_name] = np.asarray(scale)
            values[key] = stored[key].astype(np.float32) * scale
    return stored, values


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("name", ["weight_scale", "scale_weight"])
def test_a_transformer_with_scaled_float8_weights_has_their_values(tmp_path, name, per_row):
    stored, values = fp8_scaled(dit_tensors("model.diffusion_model."), name, per_row)
    stored["model.diffusion_model.scaled_fp8"] = np.zeros(2, FLOAT8)
    params = parameters.split(anima_jax.load_dit(saved(tmp_path, stored)))[1]
    key = "model.diffusion_model.blocks.1.mlp.layer1.weight"
    np.testing.assert_array_equal(np.asarray(params["blocks.mlp.layer1.kernel"][1]), values[key].T)


def test_rows_are_read_alone(tmp_path):
    stored, values = fp8_scaled(dit_tensors(), per_row=True)
    with open_tensors(saved(tmp_path, stored)) as file:
        key = "net.blocks.0.mlp.layer1.weight"
        assert file.storage(key) == "fp8_scaled"
        assert file.storage("net.x_embedder.proj.1.weight") is None
        np.testing.assert_array_equal(file.read(key, slice(5, 9)), values[key][5:9])


def test_values_are_rounded_once_to_the_dtype_that_is_asked_for(tmp_path):
    stored, values = fp8_scaled(dit_tensors())
    params = parameters.split(anima_jax.load_dit(saved(tmp_path, stored), jnp.bfloat16))[1]
    expected = values["net.blocks.0.mlp.layer1.weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(params["blocks.mlp.layer1.kernel"][0]), expected.T)


def test_a_missing_scale_is_named(tmp_path):
    stored, _ = fp8_scaled(dit_tensors())
    del stored["net.blocks.1.mlp.layer1.weight_scale"]
    with pytest.raises(UserError, match=r"net\.blocks\.1\.mlp\.layer1\.weight_scale is missing"):
        anima_jax.load_dit(saved(tmp_path, stored))
