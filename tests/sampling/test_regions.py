"""Regions: ComfyUI's own combination of prompts, whole samplings in NumPy, what must not change an image, bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from anima_jax.diffusion.samplers import SAMPLERS
from anima_jax.diffusion.step_cache import Savings
from anima_jax.errors import UserError
from anima_jax.models.dit import PATCH, AnimaDiT, token_positions
from anima_jax.models.dit_inputs import KeysValues, Modulations
from anima_jax.sampling.context import Context
from anima_jax.sampling.noise import BatchNoise
from anima_jax.sampling.packing import TokenPacking, grid_of, wrapped
from anima_jax.sampling.region_rows import region_rows, rows_of
from anima_jax.sampling.regions import Area, Region
from anima_jax.sampling.request import ImageRequest, SamplingParams
from tests.compilation import compilations
from tests.golden_files import channel_last, golden, relative_error
from tests.models.networks import random_model, velocity
from tests.parallel.meshes import CONFIG
from tests.sampling.test_step_cache import pipeline_of

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


def field(x_rlc, grid_r3, context_r, sigma):
    """The golden file's network on packed rows: it sees positions and the mean of its own row only."""
    r, length, _ = x_rlc.shape
    z = x_rlc.reshape(r, length, PATCH, PATCH, -1)
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
    both = region_rows([regions], packing, (packing.size_b3, packing.length), base_strength)
    context_r = [-0.3] * len(both.negative.image_r) + [0.2, *(float(region.prompt) for region in regions)]

    @jax.jit
    def estimates(x_blc, both, sigma):
        rows = both.evaluated(with_negative=True)
        x_rlc, grid_r3 = wrapped(rows_of(x_blc, rows), rows.size_r3), grid_of(rows.size_r3)
        velocities_rlc = field(x_rlc, grid_r3, context_r, sigma)
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
        ("0,0,50%,100%=a:.5", ("0,0,50%,100%", "a", 0.5)),
        ("no=such.png=a", ("no", "such.png=a", 1.0)),
    ],
)
def test_a_flag_is_mask_prompt_and_strength(tmp_path, text, expected):
    mask = tmp_path / "a=1:2.png"
    Image.new("L", (8, 8), 255).save(mask)
    region = Region.parse(text.format(mask=mask))
    assert (region.where, region.prompt, region.strength) == (expected[0].format(mask=mask), *expected[1:])


@pytest.mark.parametrize(
    ("mode", "colour", "value", "channel"),
    [
        ("RGBA", (255, 255, 255, 255), 1, "red"),
        ("RGBA", (0, 0, 0, 51), 0.8, "alpha"),
        ("L", 51, 0.2, "red"),
        ("1", 1, 1, "red"),
    ],
)
def test_transparency_counts_only_where_there_is_some(mode, colour, value, channel):
    """White of a drawing program's file with an opaque alpha channel is white."""
    region = Region(Image.new(mode, (176, 120), colour), "a")
    assert region.channel == channel
    np.testing.assert_allclose(region.placed(SIZE[1:]).weight_yx, value, atol=1e-7)


@pytest.mark.parametrize("text", ["", "a.png", "=a", " =a:2", "a.png=", "a.png= :0.5", "0,0,8,8=", "=" * 10**6])
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
        (Region("x.mp4", "a"), "region x.mp4: no such file; expected a mask's picture, or an area x,y,width,height"),
        (Region("0,0,64", "a"), "region 0,0,64: no such file; expected a mask's picture, or an area x,y,width,height"),
        (Region("", "a"), "regions Region(where='', prompt='a', strength=1.0"),
        (Region("0,0,8,8", 5), "regions Region(where='0,0,8,8', prompt=5, strength=1.0"),  # type: ignore[arg-type]
    ],
)
def test_a_region_that_cannot_count_is_refused(region, message):
    with pytest.raises(UserError) as error:
        region.placed(SIZE[1:])
    assert message in str(error.value)
    assert len(error.value.messages) == 1


class WavyField(nnx.Module):
    """The golden file's network as a transformer. A prompt's only row is its context c."""

    def __init__(self):
        self.blocks = nnx.Module()
        self.blocks.cross_attn = nnx.Module()
        self.blocks.cross_attn.k_proj = nnx.Module()
        self.blocks.cross_attn.k_proj.kernel = nnx.Param(jnp.zeros((1, 1, 64)))

    def keys_values(self, rows_bnd):
        return KeysValues(rows_bnd[None, :, None], rows_bnd[None, :, None])

    def modulations(self, sigmas_s):
        return Modulations((), sigmas_s[:, None, None])

    def velocity(self, x, grid, level, context, after_first=None, **options):
        v = field(x, grid, context.keys[0, :, 0, 0, 0], level.final.reshape(()))
        return v if after_first is None else after_first(x, x + 0.3 * v, lambda x1: x1 + 0.7 * v) - x


@pytest.fixture(scope="module")
def wavy():
    return pipeline_of(WavyField())


PROMPT, NEGATIVE = 0.2, -0.3
BATCH = [(15, 22), (16, 24), (18, 20)]


def scalar(c):
    return np.full((1, 1), c)


def drawn(pipeline, sizes_yx, regions, params, first=0, context=scalar, **options):
    """Latents of images of these sizes with these regions; image n has the seed `first` + n.

    `context` makes the rows of a prompt from its number.
    """
    pipeline.savings = Savings()
    requests = [ImageRequest("x", x * 8, y * 8, first + n) for n, (y, x) in enumerate(sizes_yx)]
    noise = BatchNoise(requests, "torch-cpu", SAMPLERS[params.sampler], params.levels())
    prompts = [PROMPT] * len(sizes_yx) + [float(region.prompt) for own in regions for region in own]
    contexts = [
        Context(jnp.asarray(np.stack([context(c) for c in values]), jnp.float32), None)
        for values in (prompts, [NEGATIVE] * len(sizes_yx))
    ]
    return pipeline.sample(*contexts, noise, params.levels(), params, regions=regions, **options)


def estimate(x_yxc, context, sigma):
    """What the network says of an image, in float64."""
    y, x, _ = x_yxc.shape
    z = np.pad(x_yxc, ((0, y % 2), (0, x % 2), (0, 0)), mode="wrap")
    rows, columns = np.indices(z.shape[:2])
    wave = 0.05 * context * np.sin(0.7 * rows + 0.3 * columns)[..., None]
    v = np.tanh(1.3 * z + context) * (0.7 + 0.3 * sigma) - 0.4 * z * np.cos(2 * sigma) + wave + 2.0 * z.mean()
    return x_yxc - sigma * v[:y, :x]


def guided_estimate(x_yxc, sigma, scale, disc_yx):
    """The mean of a prompt of weight 0.5, a mask of strength 3, and an area at (3, 2) of 9 × 11 with soft edges."""
    kinds = {"prompt": [(0, PROMPT, 0.5), (1, 0.9, 3 * disc_yx)], "negative": [(0, NEGATIVE, 1.0)]}
    soft = np.ones((9, 11))
    for index, weight in enumerate((1 / 2, 1.0)):  # over a quarter of 9 and of 11 latent pixels
        soft[[index, 8 - index]] *= weight
        soft[:, [index, 10 - index]] *= weight
    combined = {}
    for name, rows in kinds.items():
        total, weights = np.zeros_like(x_yxc), np.zeros((*x_yxc.shape[:2], 1))
        for _, context, weight in rows:
            weight_yx1 = np.broadcast_to(weight, x_yxc.shape[:2])[..., None]
            total += weight_yx1 * estimate(x_yxc, context, sigma)
            weights += weight_yx1
        part = slice(3, 12), slice(2, 13)
        weight_yx1 = 1.5 * soft[..., None]
        total[part] += weight_yx1 * estimate(x_yxc[part], -0.6 if name == "prompt" else NEGATIVE, sigma)
        weights[part] += weight_yx1
        combined[name] = total / weights
    return combined["negative"] + scale * (combined["prompt"] - combined["negative"])


def test_a_sampling_is_the_same_arithmetic_in_numpy(wavy):
    params = SamplingParams(steps=5, sampler="euler", guidance_scale=3.0, base_strength=0.5)
    regions = [(), (Region(np.pad(DISC, ((0, 8), (0, 16))), "0.9", 3.0), Region((16, 24, 88, 72), "-0.6", 1.5))]
    levels = params.levels()
    plain, found = drawn(wavy, BATCH[:2], regions, params)
    disc_yx = np.pad(DISC, ((0, 8), (0, 16))) / 255.0
    disc_yx = sum(disc_yx[y::8, x::8] for y in (3, 4) for x in (3, 4)) / 4
    noise = BatchNoise([ImageRequest("x", 192, 128, 1)], "torch-cpu", SAMPLERS["euler"], levels)
    x_yxc = noise.start[0][0].astype(np.float64)
    for level, lower in zip(levels[:-1].astype(float), levels[1:].astype(float), strict=True):
        x_yxc += (x_yxc - guided_estimate(x_yxc, level, 3.0, disc_yx)) / level * (lower - level)
    # float32 along five steps.
    assert relative_error(found[0], x_yxc) < 1e-5
    (alone,) = drawn(wavy, BATCH[:1], [()], params)
    assert relative_error(plain, alone) < 1e-6


ROWS = np.random.default_rng(1).standard_normal((2, 16, 32))


def rows_of_prompt(c):
    return ROWS[0] + c * ROWS[1]


def test_the_transformer_sees_whole_images_and_parts_and_nothing_is_compiled_for_other_regions():
    """Oracle: the estimates of the first level, each from a call of the network of its own; the part's place is odd.

    Of a reference it sees the same part.
    """
    model = random_model(AnimaDiT, dataclasses.replace(CONFIG, adapter=None))
    params = SamplingParams(steps=1, sampler="euler", guidance_scale=3.0)
    mask = np.indices((96, 128)).sum(axis=0) % 256 / 255
    area = Region((40, 24, 64, 48), "-0.6", 1.5)
    pipeline = pipeline_of(model)
    reference = np.random.default_rng(2).standard_normal((1, 12, 16, 16)).astype(np.float32)
    options = {"context": rows_of_prompt, "references": [[reference]]}
    (found,) = drawn(pipeline, [(12, 16)], [[Region(mask, "0.9", 3.0), area]], params, **options)

    x = BatchNoise([ImageRequest("x", 128, 96)], "torch-cpu", SAMPLERS["euler"], params.levels()).start[0][None]
    inside = np.s_[:, :, 3:9, 5:13]

    def of(x, c):
        clean = reference[None] if x.shape[2] == 12 else reference[None][inside]
        seen = np.concatenate([x, clean], axis=1)
        context = rows_of_prompt(c)[None].astype(np.float32)
        return np.array(x - velocity(model, seen, np.ones(1, np.float32), context)[:, :1])

    mask_yx1 = 3 * sum(mask[y::8, x::8] for y in (3, 4) for x in (3, 4))[..., None] / 4
    soft_yx1 = 1.5 * np.array([[0.5, 1, 1, 1, 1, 1, 1, 0.5]] * 6)[..., None]
    total, weight = of(x, PROMPT) + mask_yx1 * of(x, 0.9), 1 + np.broadcast_to(mask_yx1, x.shape)
    negative, own = of(x, NEGATIVE), np.ones(x.shape)
    for sums, weights, c in ((total, weight, -0.6), (negative, own, NEGATIVE)):
        sums[inside] += soft_yx1 * of(x[inside], c)
        weights[inside] += soft_yx1
    expected = negative / own + 3.0 * (total / weight - negative / own)
    assert relative_error(found, expected[0]) < 1e-4  # a random network amplifies rounding

    others = [Region(mask.T[:96].repeat(2, axis=1)[:, :128], "0.1", 0.3), Region("0%,50%,50%,50%", "0.7", 2.0)]
    with compilations() as names:
        drawn(pipeline, [(12, 16)], [others], params, **options)
    assert names == []


@pytest.mark.parametrize(
    "changes",
    [
        {"sampler": "heun", "guidance_interval": (0.2, 0.7), "apg": True, "apg_momentum": -0.5, "rescale_cfg": 0.7},
        {"sampler": "dpm_adaptive", "guidance_scale": 1.0},
        {"cache": "easy:0.05", "steps": 12, "cfg_zero_star": True, "cfg_norm": 1.0},
    ],
    ids=str,
)
def test_a_region_with_the_words_of_the_prompt_changes_nothing(wavy, changes):
    params = SamplingParams(**{"steps": 4, "sampler": "euler"} | changes)
    region = Region(LEFT, str(PROMPT), 2.0, start_percent=0.3)
    found, plain = (drawn(wavy, BATCH[:1], [own], params) for own in ((region,), ()))
    assert relative_error(found[0], plain[0]) < 1e-5  # the mean's rounding


def test_an_image_does_not_depend_on_the_regions_of_others(wavy):
    """The step cache decides for each image, from all of its rows and no others."""
    params = SamplingParams(steps=12, sampler="euler", cache="first_block:0.3")
    areas = Region((32, 8, 88, 72), "0.9", 2.0), Region("50%,0,50%,100%", "-0.6", 3.0, start_percent=0.3)
    together = drawn(wavy, BATCH, [(Region(LEFT, "0.9", 2.0),), (), areas], params, callback=lambda *_: None)
    (alone,) = drawn(wavy, BATCH[2:], [areas], params, 2, callback=lambda *_: None)
    assert wavy.savings.saved > 0
    assert relative_error(together[2], alone) < 1e-5  # of sums; another decision would change a percent
