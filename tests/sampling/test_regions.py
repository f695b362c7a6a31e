"""Regions: ComfyUI's own combination of prompts, whole samplings in NumPy, what must not change an image, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from anima_jax.errors import UserError
from anima_jax.models.dit import PATCH, token_positions
from anima_jax.sampling.packing import TokenPacking, grid_of, wrapped
from anima_jax.sampling.regions import Area, Region, region_rows, rows_of
from tests.golden_files import channel_last, golden, relative_error

SIZE = (1, 15, 22)
Y, X = np.indices((8 * SIZE[1], 8 * SIZE[2]))
LEFT = np.clip(255 - 2 * X, 0, 255).astype(np.uint8)
DISC = np.where((Y - 70) ** 2 + (X - 120) ** 2 < 1400, 200, 0).astype(np.uint8)

CASES = {
    "masks": (1.0, [Region(LEFT, "0.9", 1.5), Region(DISC, "-0.6", 4.0)]),
    "areas": (
        0.5,
        [Region((24, 8, 88, 72), "0.9", 2.0), Region("104,0,400,120", "-0.6"), Region((0, 40, 64, 48), "0.4", 0.7)],
    ),
    "bounds": (
        1.0,
        [
            Region(DISC, "0.9", 2.0, bounds=True, start_percent=0.2, end_percent=0.8),
            Region((40, 0, 136, 64), "-0.6", start_percent=0.5),
        ],
    ),
    "no base": (0.0, [Region(LEFT, "0.9"), Region((88, 24, 72, 56), "-0.6", 3.0)]),
}
"""The cases of tests/golden/README.md: the weight of the prompt, and regions with their contexts as prompts."""


def field(x_rlc, rows, context_r, sigma):
    """The golden file's network on packed rows: it sees positions and the mean of its own row only."""
    size_r3, (r, length, _) = jnp.asarray(rows.size_r3), x_rlc.shape
    z = wrapped(x_rlc, size_r3).reshape(r, length, PATCH, PATCH, -1)
    grid_r3 = grid_of(size_r3)
    place_rl3 = token_positions(grid_r3, length)
    y, x = (place_rl3[..., axis, None, None] * PATCH for axis in (1, 2))
    y, x = y + np.arange(PATCH)[:, None], x + np.arange(PATCH)
    real_rl = jnp.arange(length) < grid_r3.prod(axis=1)[:, None]
    mean_r = jnp.sum(jnp.where(real_rl[..., None], z.reshape(r, length, -1), 0), (1, 2)) / (real_rl.sum(1) * 64)
    c, mean = (jnp.asarray(values).reshape(-1, 1, 1, 1, 1) for values in (context_r, mean_r))
    wave = 0.05 * c * jnp.sin(0.7 * y + 0.3 * x)[..., None]
    v = jnp.tanh(1.3 * z + c) * (0.7 + 0.3 * sigma) - 0.4 * z * np.cos(2 * sigma) + wave + 2.0 * mean
    return v.reshape(x_rlc.shape)


@pytest.mark.parametrize("name", CASES)
def test_prompts_are_combined_as_comfyuis_calc_cond_batch_combines_them(name):
    data, (base_strength, regions) = golden("regions"), CASES[name]
    packing = TokenPacking([SIZE])
    x = channel_last(data["x"].astype(np.float32))[0]
    both = jax.tree.map(jnp.asarray, region_rows([regions], [SIZE], packing.length, base_strength))
    rows, x_blc = both.evaluated(with_negative=True), jnp.asarray(packing.pack([x]))
    context_r = [-0.3] * len(both.negative.image_r) + [0.2, *(float(region.prompt) for region in regions)]
    for sigma in (0.95, 0.6, 0.2):
        velocities_rlc = field(rows_of(x_blc, rows), rows, context_r, sigma)
        negative, positive = both.combined(velocities_rlc, x_blc, jnp.float32(sigma))
        for found, expected in zip((positive, negative), data[f"{name}|{sigma}"], strict=True):
            (estimate,) = packing.unpack((x_blc[0] - sigma * found)[None])
            # float32's rounding of sums of up to five rows.
            assert relative_error(np.moveaxis(estimate, -1, 0).reshape(-1)[::17], expected) < 2e-6
