"""Quantised files on the devices: the file's own codes, whose values are those that the file stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anima_jax.checkpoints.models import load_dit, load_text_encoder, open_dit, save_dit
from anima_jax.checkpoints.stored import Storage
from anima_jax.checkpoints.tensor_files import open_tensors
from anima_jax.errors import UserError
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT, DiTConfig
from anima_jax.models.llm_adapter import LLMAdapterConfig
from anima_jax.models.quantised import Quantised
from convert.__main__ import main as convert
from tests.golden_files import GOLDEN
from tests.models.networks import random_params

CONFIG = DiTConfig(256, 3, 2, 256, 256, 16, adapter=LLMAdapterConfig(64, 1, 2, 64, 64, 64, 40))
LAYER1 = "blocks.mlp.layer1.kernel"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A transformer of three blocks; `convert` quantises the matrices of the second and third."""
    path = tmp_path_factory.mktemp("codes")
    params = random_params(parameters.abstract(lambda rngs: AnimaDiT(CONFIG, rngs=rngs))[1])
    save_dit(path / "base.safetensors", params, dtype="bfloat16")
    return path


def quantised(folder, storage):
    path = folder / f"{storage.replace(':', '_')}.{'gguf' if ':' in storage else 'safetensors'}"
    if not path.exists():
        convert(["checkpoint", str(folder / "base.safetensors"), str(path), "--dtype", storage])
    return path


def params_of(path, **options):
    return parameters.split(load_dit(path, jnp.float32, **options))[1]


@pytest.mark.parametrize(
    ("storage", "codes", "scales", "rotation"),
    [
        ("fp8_scaled", "float8_e4m3fn", 1, 0),
        ("int8_convrot", "int8", 1, 256),
        ("mxfp8", "float8_e4m3fn", 8, 0),
        ("gguf:q8_0", "int8", 8, 0),
        ("gguf:q6_k", "int8", 16, 0),
    ],
)
def test_codes_of_8_bits_stay_on_the_devices(folder, capsys, storage, codes, scales, rotation):
    path = quantised(folder, storage)
    capsys.readouterr()
    found = params_of(path)
    assert "rounded bfloat16 to " in capsys.readouterr().out
    expected = params_of(path, transformer_dtype="float32")
    kernel = found[LAYER1]
    assert (kernel.codes.dtype, kernel.scales.shape, kernel.rotation) == (codes, (3, scales, 256), rotation)
    for layer in (1, 2):
        # Only a rotation rounds in float32, sums of 256 values.
        np.testing.assert_allclose(kernel[layer].values(), expected[LAYER1][layer], atol=1e-6, rtol=1e-6)
    # The first block is plain in the file: rounded to the stack's codes.
    assert 0 < np.abs(kernel[0].values() - expected[LAYER1][0]).max() < 0.07 * np.abs(expected[LAYER1][0]).max()


@pytest.mark.parametrize(
    ("storage", "options"),
    [
        *((name, ()) for name in ("fp8_scaled", "int8_convrot", "mxfp8", "gguf:q8_0", "gguf:q6_k", "gguf:q4_k")),
        ("int8_convrot", ("int8", "int8")),
        ("gguf:q8_0", (None, "int8")),
    ],
)
def test_a_files_header_says_which_codes_devices_will_have(folder, storage, options):
    own = Storage("bfloat16", *options)
    with open_dit(quantised(folder, storage)) as checkpoint:
        expected = {path: value for path, value in checkpoint.parameters(own, {}) if isinstance(value, Quantised)}
        found = checkpoint.kept(own)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), expected
    )


def test_other_formats_are_rounded_to_int8_with_a_line(folder, capsys):
    path = quantised(folder, "gguf:q4_k")
    capsys.readouterr()
    kernel, expected = params_of(path)[LAYER1], params_of(path, transformer_dtype="float32")[LAYER1]
    assert f"{path}: rounded bfloat16 and q4_k to int8 on the devices: 13 parameters" in capsys.readouterr().out
    assert np.abs(kernel.values() - expected).max() <= 0.51 / 127 * np.abs(expected).max()


@pytest.mark.parametrize(("storage", "kept"), [("gguf:q8_0", True), ("gguf:q5_1", False)])
def test_the_codes_of_a_text_encoder_stay_or_their_values_do(tmp_path, capsys, storage, kept):
    path = tmp_path / "text.gguf"
    convert(["checkpoint", str(GOLDEN / "qwen3.model.safetensors"), str(path), "--dtype", storage])
    capsys.readouterr()
    found = parameters.split(load_text_encoder(path))[1]["layers.mlp.down_proj.kernel"]
    assert isinstance(found, Quantised) == kept
    assert "rounded" not in capsys.readouterr().out
    with open_tensors(path) as file:
        expected = file.read("model.layers.1.mlp.down_proj.weight").T
    np.testing.assert_array_equal(np.asarray(found[1]), expected)


def test_a_product_takes_the_codes_that_fit_it(folder):
    rotated = params_of(quantised(folder, "int8_convrot"), compute="int8")[LAYER1]
    assert (rotated.compute, rotated.rotation, rotated.codes.dtype) == ("int8", 256, jnp.int8)
    other = params_of(quantised(folder, "gguf:q8_0"), compute="int8")[LAYER1]
    assert (other.compute, other.scales.shape) == ("int8", (3, 1, 256))
    assert params_of(quantised(folder, "int8_convrot"), compute="fp8")[LAYER1].codes.dtype == jnp.float8_e4m3fn
    with pytest.raises(UserError, match="compute 'int4', expected one of int8, fp8"):
        params_of(folder / "base.safetensors", compute="int4")
    plain = params_of(folder / "base.safetensors")
    assert not any(isinstance(value, Quantised) for value in plain.values())
