"""Sampling and encoding on meshes of eight devices give the results of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from anima_jax import AnimaPipeline, load_text_encoder, load_vae
from anima_jax.data.encoders import caption_encoder, clip_encoder
from anima_jax.parallel import rules
from anima_jax.parallel.mesh import make_mesh
from anima_jax.sampling.references import Reference
from anima_jax.sampling.request import SamplingParams, batch_of_requests
from anima_jax.text.tokenizers import load_tokenizers
from tests.parallel.meshes import MESHES, name
from tests.small_run import ASSETS, write_transformer

ONE = dict.fromkeys(rules.AXES, 1)
VARIANTS = {"cfg_zero_star": True, "rescale_cfg": 0.5, "cfg_norm": 1.0, "apg": True, "apg_momentum": -0.5}
PARAMS = SamplingParams(steps=3, sampler="er_sde", **VARIANTS)
REFERENCE = Reference.of(Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)))
LARGE = {"width": 128, "height": 96, "seed": 3, "references": [REFERENCE]}
SIZES = {"width": [64, 48] * 4, "height": [64, 80] * 4, "seed": 5, "references": [[], [REFERENCE]] * 4}


def sampled_on(sizes, transformer, request, offload=False):
    """Latents and pixels of these images, and the bytes of the transformer's parameters on each device."""
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    with jax.set_mesh(mesh):
        pipeline = AnimaPipeline.load(
            transformer=transformer,
            vae=ASSETS / "tiny_vae.safetensors",
            text_encoder=ASSETS / "tiny_qwen3.safetensors",
            tokenizers=str(ASSETS / "tokenizers"),
            dtype=jnp.float32,
            offload=offload,
        )
        count = len(request["width"]) if isinstance(request["width"], list) else 1
        latents = pipeline.draw_latents(batch_of_requests("a red square", **request, batch_size=count), PARAMS)
        pixels = pipeline.decode(latents)
    stored = dict.fromkeys((device.id for device in mesh.devices.flat), 0)
    for leaf in pipeline.dit_params.values():
        for shard in leaf.addressable_shards:
            stored[shard.device.id] += shard.data.nbytes
    return latents, pixels, set(stored.values())


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded") / "base.safetensors"
    write_transformer(path)
    return path


def assert_near(found, expected):
    """Sums over devices have another order, and three steps of a random network amplify the rounding a little."""
    for image, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(image, other, atol=1e-4 * np.abs(other).max())


@pytest.fixture(scope="module")
def on_one(transformer):
    return sampled_on(ONE, transformer, SIZES)


@pytest.mark.parametrize("sizes", [MESHES[0], MESHES[2]], ids=name)
def test_a_batch_of_several_sizes_is_sharded(on_eight, transformer, on_one, sizes):
    latents, pixels, stored = on_eight(sampled_on, sizes, transformer, SIZES)
    assert_near(latents, on_one[0])
    assert_near(pixels, on_one[1])
    (each,) = stored
    assert each <= 1.3 * max(on_one[2]) / (sizes["fsdp"] * sizes["tensor"])  # the ends are replicated


def test_one_large_image_is_sharded_over_context_with_encoders_in_host_memory(on_eight, transformer):
    latents, pixels, _ = on_eight(sampled_on, MESHES[4], transformer, LARGE, True)
    on_one = sampled_on(ONE, transformer, LARGE)
    assert_near(latents, on_one[0])
    assert_near(pixels, on_one[1])


def encoded():
    """Eleven clips and eleven captions, two of each per device."""
    rng = np.random.default_rng(0)
    clips = rng.integers(0, 255, (11, 1, 32, 48, 3), np.uint8)
    captions = [f"a red square number {number}" for number in range(11)]
    encode = clip_encoder(load_vae(ASSETS / "tiny_vae.safetensors", jnp.float32), batch_size=2)
    qwen = load_text_encoder(ASSETS / "tiny_qwen3.safetensors", jnp.float32)
    tokenizers = load_tokenizers(ASSETS / "tokenizers")
    texts = caption_encoder(qwen, tokenizers, batch_size=2, dtype=jnp.float32)(captions)
    return list(encode(clips)), [text.states_nd for text in texts]


def test_encoders_shard_their_batches(on_eight):
    for found, expected in zip(on_eight(encoded), encoded(), strict=True):
        assert len(found) == 11
        for array, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(array, other, atol=2e-5 * np.abs(other).max())
