"""Pictures and encodings on meshes of eight devices: those of one device, whoever does which part of the work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anima_jax import AnimaPipeline, load_text_encoder, load_vae
from anima_jax.data.encoders import caption_encoder, clip_encoder
from anima_jax.parallel import rules
from anima_jax.parallel.mesh import make_mesh
from anima_jax.sampling.request import SamplingParams, batch_of_requests
from anima_jax.text.tokenizers import load_tokenizers
from tests.parallel.meshes import MESHES, name
from tests.small_run import ASSETS, write_transformer

ONE = dict.fromkeys(rules.AXES, 1)
SETTINGS = SamplingParams(steps=3, sampler="er_sde")
LARGE = {"width": 128, "height": 96, "seed": 3}
SIZES = {"width": [64, 48] * 4, "height": [64, 80] * 4, "seed": 5}


def pictures_on(sizes, transformer, described, offload=False):
    """Latents and pixels of some pictures, and the bytes of the transformer's parameters on each device."""
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
        count = len(described["width"]) if isinstance(described["width"], list) else 1
        latents = pipeline.draw_latents(batch_of_requests("a red square", **described, batch_size=count), SETTINGS)
        pixels = pipeline.decode(latents)
    held = dict.fromkeys((device.id for device in mesh.devices.flat), 0)
    for leaf in pipeline.dit_params.values():
        for shard in leaf.addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    return latents, pixels, set(held.values())


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded") / "base.safetensors"
    write_transformer(path)
    return path


def assert_near(found, expected):
    """Sums over devices are taken in another order, and three steps of a random network amplify that a little."""
    for picture, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(picture, other, atol=1e-4 * np.abs(other).max())


@pytest.fixture(scope="module")
def of_one(transformer):
    return pictures_on(ONE, transformer, SIZES)


@pytest.mark.parametrize("sizes", [MESHES[0], MESHES[2]], ids=name)
def test_a_batch_of_several_sizes_is_shared_out(on_eight, transformer, of_one, sizes):
    latents, pixels, held = on_eight(pictures_on, sizes, transformer, SIZES)
    assert_near(latents, of_one[0])
    assert_near(pixels, of_one[1])
    (each,) = held
    assert each <= 1.3 * max(of_one[2]) / (sizes["fsdp"] * sizes["tensor"])  # its ends are a large part of it


def test_one_large_picture_lies_over_context_and_encoders_may_wait_in_host_memory(on_eight, transformer):
    latents, pixels, _ = on_eight(pictures_on, MESHES[4], transformer, LARGE, True)
    of_one = pictures_on(ONE, transformer, LARGE)
    assert_near(latents, of_one[0])
    assert_near(pixels, of_one[1])


def encoded():
    """Eleven clips and eleven captions, two of each to a device."""
    rng = np.random.default_rng(0)
    clips = rng.integers(0, 255, (11, 1, 32, 48, 3), np.uint8)
    captions = [f"a red square number {number}" for number in range(11)]
    encode = clip_encoder(load_vae(ASSETS / "tiny_vae.safetensors", jnp.float32), batch_size=2)
    qwen = load_text_encoder(ASSETS / "tiny_qwen3.safetensors", jnp.float32)
    tokenizers = load_tokenizers(ASSETS / "tokenizers")
    texts = caption_encoder(qwen, tokenizers, batch_size=2, dtype=jnp.float32)(captions)
    return list(encode(clips)), [text.states_nd for text in texts]


def test_encoders_share_out_their_batches(on_eight):
    for found, expected in zip(on_eight(encoded), encoded(), strict=True):
        assert len(found) == 11
        for array, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(array, other, atol=2e-5 * np.abs(other).max())
