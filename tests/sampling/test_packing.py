"""Images of several sizes in one batch of tokens."""

import numpy as np
import pytest

from anima_jax.models.dit import patchify
from anima_jax.sampling.packing import TokenPacking, grid_of, real_values, token_budget, wrapped
from tests.models.networks import normal


@pytest.mark.parametrize("tokens", [1, 16, 17, 100, 1000, 3952, 4033, 4096, 4097, 16384, 100_000])
def test_a_budget_is_large_enough_and_wastes_little(tokens):
    budget = token_budget(tokens)
    assert tokens <= budget <= max(1.126 * tokens, tokens + 15)
    assert budget % 16 == 0


def test_one_megapixel_in_the_usual_shapes_is_one_budget():
    sizes = [(1024, 1024), (896, 1152), (1152, 896), (832, 1216), (768, 1344), (1344, 768)]
    assert {token_budget(width * height // 256) for width, height in sizes} == {4096}


def test_unpacking_returns_the_packed_images_and_padding_is_zero():
    latents = [normal(1, 4, 6, 16, seed=1), normal(1, 8, 2, 16, seed=2), normal(2, 2, 2, 16, seed=3)]
    latents.append(normal(1, 5, 3, 16, seed=4))
    packing = TokenPacking([array.shape[:3] for array in latents])
    tokens = packing.pack(latents)
    assert grid_of(packing.size_b3).tolist() == [[1, 2, 3], [1, 4, 1], [2, 1, 1], [1, 3, 2]]
    assert tokens.shape == (4, 16, 64)
    assert not tokens[0, 6:].any()
    # A token is a patch of 2×2 latent pixels, row by row.
    np.testing.assert_array_equal(tokens[0, 4].reshape(2, 2, 16), latents[0][0, 2:4, 2:4])
    for found, expected in zip(packing.unpack(tokens), latents, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_odd_images_are_continued_from_the_opposite_edge_and_only_there():
    """NumPy's "wrap" is torch's circular padding, by which ComfyUI's pad_to_patch_size fills whole patches."""
    sizes = [(1, 5, 7), (1, 4, 7), (2, 3, 2), (1, 4, 4), (1, 1, 1)]
    latents = [normal(*size, 16, seed=seed) for seed, size in enumerate(sizes)]
    packing = TokenPacking(sizes)
    tokens = packing.pack(latents)
    found = np.asarray(wrapped(tokens, packing.size_b3))
    real = np.asarray(real_values(packing.size_b3, packing.length))
    np.testing.assert_array_equal(tokens[~real], 0.0)
    np.testing.assert_array_equal(real, packing.pack([np.ones_like(image) for image in latents]) == 1.0)
    for row, image in zip(found, latents, strict=True):
        edges = [(0, 0), *((0, side % 2) for side in image.shape[1:3]), (0, 0)]
        expected = np.asarray(patchify(np.pad(image, edges, mode="wrap")[None])[0])
        np.testing.assert_array_equal(row[: len(expected)], expected)
        np.testing.assert_array_equal(row[len(expected) :], 0.0)
