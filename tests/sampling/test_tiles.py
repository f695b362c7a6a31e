"""The VAE in tiles. Oracle: the same VAE on the full image."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from anima_jax.checkpoints.models import load_vae
from anima_jax.data.shapes import draw, scenes
from anima_jax.models import parameters
from anima_jax.sampling.latent_codec import decode_latents, encode_pixels
from anima_jax.sampling.tiles import TILE, in_tiles, tile_side, vae_bytes
from tests.models.networks import normal
from tests.small_run import ASSETS


def test_a_function_of_single_pixels_is_unchanged_by_tiles():
    array = normal(1, 2, 33, 50, 4)
    for tile, overlap in ((16, 4), (20, 0), (40, 12), (64, 8)):
        enlarged = in_tiles(lambda x: 2 * x.repeat(3, 2).repeat(3, 3), array, 1, 3, tile=tile, overlap=overlap)
        np.testing.assert_allclose(enlarged, 2 * array.repeat(3, 2).repeat(3, 3), rtol=1e-6)
        reduced = in_tiles(lambda x: x[:, :, ::3, ::3], enlarged, 3, 1, tile=tile, overlap=overlap)
        np.testing.assert_allclose(reduced, 2 * array, rtol=1e-6)


def test_tiles_have_one_size_and_blend():
    seen = []

    def run(x):
        seen.append(x.shape[2:4])
        return np.full_like(x, len(seen))

    out = in_tiles(run, np.zeros((1, 1, 8, 40, 1), np.float32), 1, 1, tile=24, overlap=8)[0, 0, 0, :, 0]
    assert seen == [(8, 24), (8, 24)]
    np.testing.assert_array_equal(out[:16], 1.0)
    np.testing.assert_array_equal(out[24:], 2.0)
    np.testing.assert_allclose(out[16:24], 1.0 + (np.arange(8) + 0.5) / 8, atol=1e-6)


@functools.cache
def vae_calls():
    graphdef, params = parameters.split(load_vae(ASSETS / "tiny_vae.safetensors", jnp.float32))
    options = {"graphdef": graphdef, "dtype": jnp.dtype("float32")}
    return [functools.partial(run, params, **options) for run in (encode_pixels, decode_latents)]


def shapes_image(side: int) -> np.ndarray:
    """Sixteen of the quick start's scenes as one image (1, 1, y, x, 3)."""
    tiles = [draw(scene, (32.0, 32.0), 18.0) for scene in scenes(held_out=True)]
    image = np.concatenate([np.concatenate(tiles[row : row + 4], 1) for row in range(0, 16, 4)])
    enlarged = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))
    return enlarged[None, None].astype(np.float32) / 127.5 - 1.0


def levels_apart(first, second) -> float:
    """Mean difference of two images in levels of 255."""
    return float(np.mean(np.abs(np.clip(first, -1, 1) - np.clip(second, -1, 1))) * 127.5)


def test_the_vae_in_tiles_is_within_one_level_of_the_full_image():
    encode, decode = vae_calls()
    latents = np.asarray(encode(shapes_image(256)))
    assert levels_apart(in_tiles(decode, latents, 1, 8, tile=24, overlap=8), decode(latents)) < 1.0


def test_the_estimate_of_the_vaes_memory_covers_what_xla_counts():
    graphdef, params = parameters.split(load_vae(ASSETS / "tiny_vae.safetensors", jnp.float32))
    width = parameters.merge(graphdef, params).config.base_width
    for run, unit, channels in ((decode_latents, 1, 16), (encode_pixels, 8, 3)):
        array = jax.ShapeDtypeStruct((1, 1, 64 * unit, 64 * unit, channels), jnp.float32)
        whole = functools.partial(run, graphdef=graphdef, dtype=jnp.dtype("float32"))
        program = jax.jit(whole).lower(params, array).compile()
        needed = program.memory_analysis().temp_size_in_bytes
        assert 0.5 * vae_bytes(64, 64, width) < needed < vae_bytes(64, 64, width)


def test_an_image_is_computed_whole_if_it_fits_the_free_memory_or_in_the_largest_tiles_that_do(monkeypatch, capsys):
    def side(rows, columns, free, tile=None):
        monkeypatch.setattr("anima_jax.sampling.tiles.free_bytes", lambda device: free)
        return tile_side(rows, columns, 96, tile)

    # 4096² pixels of the released VAE on devices of 80, 24 and 2 GB, and where nothing is known.
    expected = {80 * 10**9: None, 24 * 10**9: TILE, 2 * 10**9: 96, 10**7: 32, None: None}
    assert {free: side(512, 512, free) for free in expected} == expected
    assert side(135, 240, 24 * 10**9) is None
    needs = "the VAE needs about 51.5 GB for 4096×4096 pixels, 24.0 GB are free"
    assert capsys.readouterr().err.splitlines()[0] == f"{needs}: it runs in tiles of 1024 pixels"

    assert (side(512, 512, 80 * 10**9, tile=512), side(512, 512, 1, tile=0)) == (64, None)


@pytest.mark.slow
def test_smaller_tiles_than_the_default_are_within_one_level_at_1024():
    assert TILE > 96
    encode, decode = vae_calls()
    pixels = shapes_image(1024)
    latents = np.asarray(encode(pixels))
    full = decode(latents)
    assert levels_apart(in_tiles(decode, latents, 1, 8, tile=96), full) < 1.0
    assert levels_apart(decode(in_tiles(encode, pixels, 8, 1, tile=96)), full) < 1.0
