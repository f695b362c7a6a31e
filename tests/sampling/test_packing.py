"""Images of several sizes in one batch of tokens."""

import numpy as np
import pytest

from anima_jax.sampling.packing import TokenPacking, token_budget
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
    packing = TokenPacking([array.shape[:3] for array in latents])
    tokens = packing.pack(latents)
    assert packing.grid_b3.tolist() == [[1, 2, 3], [1, 4, 1], [2, 1, 1]]
    assert tokens.shape == (3, 16, 64)
    assert not tokens[0, 6:].any()
    # A token is a patch of 2×2 latent pixels, row by row.
    np.testing.assert_array_equal(tokens[0, 4].reshape(2, 2, 16), latents[0][0, 2:4, 2:4])
    for found, expected in zip(packing.unpack(tokens), latents, strict=True):
        np.testing.assert_array_equal(found, expected)
