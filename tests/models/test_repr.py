"""`repr` of the networks: sizes, number of parameters, dtypes and devices, also where there are no arrays."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT, DiTConfig
from anima_jax.models.quantised import quantise_text_encoder
from anima_jax.models.qwen3 import Qwen3, Qwen3Config
from anima_jax.models.wan_vae import WanVAE, WanVAEConfig
from tests.models.networks import random_model

QWEN3 = Qwen3Config(width=16, layers=2, heads=4, key_heads=2, head_size=8, mlp_width=32, vocabulary=40)
VAE = WanVAEConfig(base_width=8)


def abstract(module, config):
    return parameters.merge(*parameters.abstract(lambda rngs: module(config, rngs=rngs)))


def test_a_loaded_network_says_where_it_is():
    device = jax.devices()[0]
    assert repr(random_model(Qwen3, QWEN3)) == (
        "Qwen3(width 16, 2 layers, 4 query and 2 key heads of 8, MLP 32, vocabulary 40; "
        f"6,896 parameters, float32, on {device})"
    )


def test_an_abstract_network_says_so():
    assert repr(abstract(WanVAE, VAE)).startswith("WanVAE(widths 8, 16, 32, 32, 16 latent channels; ")
    assert repr(abstract(WanVAE, VAE)).endswith(" parameters, float32, abstract)")


def test_the_released_transformer_has_two_billion_parameters():
    text = repr(abstract(AnimaDiT, DiTConfig()))
    assert "width 2048, 28 blocks, 16 heads of 128, MLP 8192" in text
    assert "with adapter; 2,091," in text


def test_a_traced_network_says_so():
    texts = []
    graphdef, params = parameters.split(random_model(Qwen3, QWEN3))
    jax.eval_shape(lambda params: texts.append(repr(parameters.merge(graphdef, params))), params)
    assert texts[0].endswith("; 6,896 parameters, float32, traced)")


def test_mixed_dtypes_and_shardings_are_listed():
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    graphdef, params = parameters.split(random_model(Qwen3, QWEN3))
    params = jax.device_put(parameters.cast_to_compute(params, jnp.bfloat16), NamedSharding(mesh, PartitionSpec()))
    text = repr(parameters.merge(graphdef, params))
    assert text.endswith(f"6,896 parameters, bfloat16 and float32, on {jax.devices()[0]})")


def test_quantised_weights_count_as_the_numbers_that_they_stand_for():
    assert "; 6,896 parameters, float32, on " in repr(quantise_text_encoder(random_model(Qwen3, QWEN3), "int8"))


def test_flax_still_shows_the_tree_of_modules():
    assert "layers=Layer(" in str(abstract(Qwen3, QWEN3))
    assert nnx.state(abstract(Qwen3, QWEN3))
