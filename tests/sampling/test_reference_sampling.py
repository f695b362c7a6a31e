"""Sampling with reference pictures: against diffusers' transformer on joined latents, and images of a batch alone."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from anima_jax import AnimaPipeline, load_text_encoder, load_vae
from anima_jax.diffusion.samplers import SAMPLERS
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT
from anima_jax.sampling.images import to_pixels
from anima_jax.sampling.noise import BatchNoise
from anima_jax.sampling.references import Reference
from anima_jax.sampling.request import ImageRequest, SamplingParams
from anima_jax.text.tokenizers import load_tokenizers
from tests.models import dit_peer
from tests.models.networks import random_params, randomise
from tests.small_run import ASSETS, CONFIG

pytestmark = pytest.mark.usefixtures("compiled_quickly")

BARE = dataclasses.replace(CONFIG, adapter=None)
EULER = SamplingParams(negative_prompt="blue", steps=3, sampler="euler", guidance_scale=3.0)


def pictures(number: int) -> tuple[Reference, ...]:
    rng = np.random.default_rng(number)
    return tuple(Reference.of(Image.fromarray(rng.integers(0, 256, (70, 90, 3), np.uint8))) for _ in range(number))


REQUESTS = [
    ImageRequest("a red square", 64, 48, seed=1, references=pictures(2)),
    ImageRequest("a cross", 72, 56, seed=2, references=pictures(1)),  # an odd number of latent rows and columns
    ImageRequest("a circle", 48, 64, seed=3),
]


@pytest.fixture(scope="module")
def params():
    return random_params(parameters.abstract(lambda rngs: AnimaDiT(CONFIG, rngs=rngs))[1])


def pipeline_of(params) -> AnimaPipeline:
    graphdef, _ = parameters.abstract(lambda rngs: AnimaDiT(CONFIG, rngs=rngs))
    return AnimaPipeline(
        parameters.merge(graphdef, params),
        load_vae(ASSETS / "tiny_vae.safetensors", jnp.float32),
        load_text_encoder(ASSETS / "tiny_qwen3.safetensors", jnp.float32),
        load_tokenizers(ASSETS / "tokenizers"),
        dtype=jnp.float32,
    )


def on_torch(peer, pipeline, request) -> np.ndarray:
    """Euler's method with guidance on the joined latents, (1, y, x, 16)."""
    sigmas = EULER.levels()
    noise = BatchNoise([request], EULER.noise, SAMPLERS["euler"], sigmas).start[0]
    size = request.width, request.height
    clean = [pipeline.encode_image(to_pixels(reference.fitted(*size))) for reference in request.references]
    contexts = [np.asarray(pipeline.encode([text]).rows_bnd) for text in (EULER.negative_prompt, request.prompt)]
    x, (_, rows, columns, _) = sigmas[0] * noise, noise.shape
    for sigma, after in itertools.pairwise(sigmas):
        joined = np.concatenate([x, *clean])
        joined = np.pad(joined, [(0, 0), (0, rows % 2), (0, columns % 2), (0, 0)], mode="wrap")
        latents, times = np.moveaxis(joined, -1, 0)[None].astype(np.float32), np.array([sigma], np.float32)
        negative, positive = (
            dit_peer.velocity(peer, latents, times, context)[0, :1, :rows, :columns] for context in contexts
        )
        x = x + (after - sigma) * (negative + EULER.guidance_scale * (positive - negative))
    return x


def test_a_mixed_batch_equals_torchs_transformer_on_joined_latents(params):
    pytest.importorskip("diffusers")
    peer = randomise(dit_peer.transformer(BARE))
    pipeline = pipeline_of(params | dit_peer.our_params(peer, BARE))
    found = pipeline.draw_latents(REQUESTS, EULER)
    for request, latents in zip(REQUESTS, found, strict=True):
        expected = on_torch(peer, pipeline, request)
        # Three steps of a random network, guided, amplify the rounding of one velocity, 2e-5, a little.
        np.testing.assert_allclose(latents, expected, atol=1e-4 * np.abs(expected).max())


def test_an_images_references_count_for_itself_alone(params):
    """The step cache decides by the picture's own tokens, whatever the others of the batch are."""
    settings = {"sampler": "er_sde", "cache": "first_block:0.2", "steps": 6, "apg": True}
    pipeline, settings = pipeline_of(params), dataclasses.replace(EULER, **settings)
    other = dataclasses.replace(REQUESTS[0], references=pictures(2)[::-1])
    before, after = (pipeline.draw_latents([one, *REQUESTS[1:]], settings) for one in (REQUESTS[0], other))
    assert np.abs(before[0] - after[0]).max() > 0.01 * np.abs(before[0]).max()
    for one, again in zip(before[1:], after[1:], strict=True):
        np.testing.assert_allclose(one, again, atol=2e-4 * np.abs(one).max())
