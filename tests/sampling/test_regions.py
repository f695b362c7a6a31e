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
    v = jnp.tanh(1.3 * z + c) * (0.7 + 0.3 * sigma) - 0.4 * z * jnp.cos(2 * sigma) + wave + 2.0 * mean
    return v.reshape(x_rlc.shape)


@pytest.mark.parametrize("name", CASES)
def test_prompts_are_combined_as_comfyuis_calc_cond_batch_combines_them(name):
    data, (base_strength, regions) = golden("regions"), CASES[name]
    packing = TokenPacking([SIZE])
    both = region_rows([regions], [SIZE], packing.length, base_strength)
    context_r = [-0.3] * len(both.negative.image_r) + [0.2, *(float(region.prompt) for region in regions)]

    @jax.jit
    def estimates(x_blc, both, sigma):
        rows = both.evaluated(with_negative=True)
        velocities_rlc = field(rows_of(x_blc, rows), rows, context_r, sigma)
        return x_blc - sigma * both.combined(velocities_rlc, x_blc, sigma)

    x_blc = packing.pack([channel_last(data["x"].astype(np.float32))[0]])
    for sigma in (0.95, 0.6, 0.2):
        negative, positive = estimates(x_blc, both, np.float32(sigma))
        for found_lc, expected in zip((positive, negative), data[f"{name}|{sigma}"], strict=True):
            (found,) = packing.unpack(found_lc[None])
            # float32's rounding of sums of up to four rows.
            assert relative_error(np.moveaxis(found, -1, 0).reshape(-1)[::17], expected) < 2e-6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{mask}=a red kite", ("{mask}", "a red kite", 1.0)),
        ("{mask}=a=b, (c:1.2)", ("{mask}", "a=b, (c:1.2)", 1.0)),
        ("{mask}=a: b:1.5", ("{mask}", "a: b", 1.5)),
        ("{mask}=ratio 16:9:1", ("{mask}", "ratio 16:9", 1.0)),
        ("{mask}=", ("{mask}", "", 1.0)),
        ("0,0,50%,100%=a:.5", ("0,0,50%,100%", "a", 0.5)),
        ("no=such.png=a", ("no", "such.png=a", 1.0)),
    ],
)
def test_a_flag_is_mask_prompt_and_strength(tmp_path, text, expected):
    mask = tmp_path / "a=1:2.png"
    Image.new("L", (8, 8), 255).save(mask)
    region = Region.parse(text.format(mask=mask))
    assert (region.where, region.prompt, region.strength) == (expected[0].format(mask=mask), *expected[1:])


@pytest.mark.parametrize("text", ["", "a.png", "=a", " =a:2"])
def test_a_flag_without_mask_or_prompt_is_refused(text):
    with pytest.raises(UserError, match="expected MASK=PROMPT"):
        Region.parse(text)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("0,0,64,32", (0, 0, 4, 8)),
        ("13, 17, 39, 1000", (2, 1, 13, 4)),  # in whole latent pixels, cut off at the image's edge
        ("50%,0%,50%,100%", (0, 11, 15, 11)),
        ("10%,10%,1%,1%", (2, 2, 1, 1)),  # of 1.5 and 2.2, Python's round
        ("0,0,5e1%,25%", (0, 0, 4, 11)),
    ],
)
def test_areas_are_whole_latent_pixels_as_in_comfyui(text, part):
    area = Area.parse(text)
    assert area
    assert area.latent(SIZE[1:]) == part
    assert Area.parse(str(area)) == area


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (Region("176,0,8,8", "a"), "region 176,0,8,8: is outside of the image of 176×120 pixels"),
        (Region("0,99%,50%,50%", "a"), "region 0%,99%,50%,50%: is outside of the image of 176×120 pixels"),
        (Region("-8,0,16,16", "a"), "expected x, y ≥ 0 and a width and a height above 0"),
        (Region((0, 0, 0, 16), "a"), "expected x, y ≥ 0 and a width and a height above 0"),
        (Region((0, 0, 4, 16), "a"), "expected at least 8 pixels in width and height"),
        (Region("8,0,50%,100%", "a"), "expected four numbers of pixels or four with %"),
        (Region(np.ones((120, 168)), "a"), "region 'a': the mask is 168×120 pixels, expected the image's 176×120"),
        (Region(np.zeros((120, 176)), "a"), "region 'a': the mask is black everywhere"),
        (Region(np.full((120, 176), 1.5), "a"), "a mask of values 1.5 to 1.5, expected 0 to 1"),
        (Region(np.ones((1, 120, 176)), "a"), "found float64 (1, 120, 176), expected a mask (y, x), or x, y, width"),
        (Region(LEFT, "a", 10.5), "region 'a': strength 10.5, expected a number from 0 to 10"),
        (Region(LEFT, "a", float("nan")), "strength nan, expected a number from 0 to 10"),
        (Region(LEFT, "a", start_percent=0.6, end_percent=0.5), "start_percent 0.6 is above end_percent 0.5"),
        (Region("0,0,8,8", "a", bounds=True), "bounds are those of a mask, found an area"),
        (Region("x.mp4", "a"), "x.mp4: no such file"),
    ],
)
def test_a_region_that_cannot_count_is_refused(region, message):
    with pytest.raises(UserError) as error:
        region.placed(SIZE[1:])
    assert message in str(error.value)
    assert len(error.value.messages) == 1
