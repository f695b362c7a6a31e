"""The pipeline: ComfyUI's own sampling of the golden model, what must not change an image, what compiles nothing."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from anima_jax import AnimaPipeline, load_dit, load_text_encoder, load_vae
from anima_jax.checkpoints.models import save_dit
from anima_jax.diffusion.samplers import SAMPLERS
from anima_jax.diffusion.samplers.plan import Draw
from anima_jax.diffusion.schedules import sigmas
from anima_jax.diffusion.step_cache import Savings
from anima_jax.diffusion.torch_random import CPUStream
from anima_jax.errors import UserError
from anima_jax.models import parameters
from anima_jax.models.dit import patchify, unpatchify
from anima_jax.sampling import program
from anima_jax.sampling.context import Context, context_rows
from anima_jax.sampling.images import latent_mask, mask_values, to_images, to_pixels
from anima_jax.sampling.noise import BatchNoise
from anima_jax.sampling.request import ImageRequest, SamplingParams, batch_of_requests
from anima_jax.text.prompts import spans
from anima_jax.text.states import padded
from anima_jax.text.tokenizers import load_tokenizers
from tests.compilation import compilations
from tests.golden_files import GOLDEN, VALUE_TOLERANCE, channel_last, golden, relative_error
from tests.models.networks import normal
from tests.small_run import ASSETS, write_transformer

SETTINGS = {"width": 32, "height": 48, "steps": 3, "seed": 5}


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline") / "base.safetensors"
    write_transformer(path)
    return path


def load(transformer, dtype=jnp.float32, **options):
    return AnimaPipeline.load(
        transformer=transformer,
        vae=ASSETS / "tiny_vae.safetensors",
        text_encoder=ASSETS / "tiny_qwen3.safetensors",
        tokenizers=ASSETS / "tokenizers",
        dtype=dtype,
        **options,
    )


@pytest.fixture(scope="module")
def pipeline(transformer):
    return load(transformer)


@dataclasses.dataclass
class Recorded:
    """Recorded noise instead of a `BatchNoise`."""

    start: np.ndarray
    steps: list[np.ndarray]
    keys_b3 = None

    def step(self, draw):
        return self.steps.pop(0)


@pytest.mark.parametrize("schedule", ["simple.12", "beta.8"])
@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m", "heun", "er_sde"])
def test_latents_equal_comfyuis(sampler, schedule):
    data = golden("pipeline")
    pipeline = AnimaPipeline.__new__(AnimaPipeline)
    pipeline.savings = Savings()
    pipeline.dtype = jnp.dtype(jnp.float32)
    pipeline.dit_graphdef, pipeline.dit_params = parameters.split(load_dit(GOLDEN / "dit_image.model.safetensors"))
    positive, negative = (Context(jnp.asarray(data[f"context_{name}"]), None) for name in ("pos", "neg"))
    noises = [channel_last(noise) for noise in data.get(f"{sampler}.{schedule}.step_noise", [])]
    # With a callback, runs of all lengths share a program; one sampler runs without, all steps at once.
    (latents,) = pipeline.sample(
        positive,
        negative,
        Recorded(channel_last(data["noise"]), noises),  # type: ignore[arg-type]
        data[f"sigmas.{schedule}"],
        SamplingParams(guidance_scale=float(data["guidance"][0]), sampler=sampler),
        callback=None if sampler == "euler" else ignore,
    )
    assert not noises
    # 1e-3 as tests/golden/README.md says: a random network amplifies rounding.
    assert relative_error(latents, channel_last(data[f"{sampler}.{schedule}"])[0]) < 1e-3


@pytest.mark.parametrize("name", ["pos", "neg"])
def test_weighted_context_rows_equal_comfyuis(name):
    data = golden("pipeline")
    graphdef, params = parameters.split(load_dit(GOLDEN / "dit_image.model.safetensors"))
    (source, source_mask), (ids, mask), (weights, _) = (
        padded([data[f"{key}_{name}"][0]], length)
        for key, length in (("qwen", 16), ("t5_ids", 512), ("t5_weights", 512))
    )
    rows = context_rows(params, source, source_mask, ids, mask, weights, graphdef=graphdef)
    assert relative_error(rows, data[f"context_{name}"]) < VALUE_TOLERANCE


def batch_noise(*arguments):
    return BatchNoise(batch_of_requests("x", *arguments), "torch-cpu", SAMPLERS["euler_ancestral"], sigmas("simple", 4))


DRAW = Draw(1.0, 0.9)


def test_a_batch_has_the_noise_that_torch_draws_for_its_seed():
    data = golden("pipeline")
    np.testing.assert_allclose(batch_noise(96, 64, 42, 1).start[0], channel_last(data["noise"])[0], atol=1e-6)
    noise, shape, stream = batch_noise(32, 16, 7, 3), (3, 16, 1, 2, 4), CPUStream(8)
    np.testing.assert_array_equal(noise.start, channel_last(CPUStream(7).randn(shape)))
    for _ in range(2):
        np.testing.assert_array_equal(noise.step(DRAW), channel_last(stream.randn(shape)))


def test_with_several_seeds_each_image_has_the_noise_it_has_alone():
    several = batch_noise(32, 16, [7, 8], 1)
    np.testing.assert_array_equal(several.start[1], batch_noise(32, 16, 8, 1).start[0])
    np.testing.assert_array_equal(several.step(DRAW)[0], batch_noise(32, 16, 7, 1).step(DRAW)[0])


def test_images_of_one_size_have_the_noise_of_a_batch_of_their_own():
    sizes = batch_noise([32, 16, 32], [16, 16, 16], 7, 1)
    np.testing.assert_array_equal(sizes.start[2], batch_noise(32, 16, 7, 2).start[1])
    np.testing.assert_array_equal(sizes.start[1], batch_noise(16, 16, 7, 1).start[0])


def test_a_seed_gives_the_same_image_before_and_after_saving_and_loading(pipeline, transformer, tmp_path):
    before = np.asarray(pipeline("a red circle", **SETTINGS)[0])
    assert before.shape == (48, 32, 3)
    model = load_dit(transformer)
    save_dit(tmp_path / "again.safetensors", parameters.split(model)[1])
    offloaded = load(tmp_path / "again.safetensors", offload=True)
    np.testing.assert_array_equal(np.asarray(offloaded("a red circle", **SETTINGS)[0]), before)
    idle = [*offloaded._vae.params.values(), *offloaded.text_encoder_params.values()]
    assert all(isinstance(array, np.ndarray) for array in idle)
    direct = AnimaPipeline(
        model,
        load_vae(ASSETS / "tiny_vae.safetensors", jnp.float32),
        load_text_encoder(ASSETS / "tiny_qwen3.safetensors", jnp.float32),
        load_tokenizers(ASSETS / "tokenizers"),
        dtype=jnp.float32,
    )
    np.testing.assert_array_equal(np.asarray(direct("a red circle", **SETTINGS)[0]), before)
    other = np.asarray(pipeline("a red circle", **(SETTINGS | {"seed": 6}))[0])
    assert not np.array_equal(other, before)


def test_prompt_and_negative_prompt_change_the_image_and_guidance_one_ignores_the_negative(pipeline):
    def draw(*prompts, **changes):
        return np.asarray(pipeline(*prompts, **(SETTINGS | changes))[0]).astype(int)

    base = draw("a red circle")
    assert np.any(draw("a green square") != base)
    assert np.any(draw("a (red:1.5) circle") != base)
    assert np.any(draw("a red circle", "a green square") != base)
    assert np.any(draw("a red circle", cfg_zero_star=True) != base)
    plain = draw("a red circle", guidance_scale=1.0)
    np.testing.assert_array_equal(draw("a red circle", "a green square", guidance_scale=1.0), plain)
    np.testing.assert_array_equal(draw("a red circle", "x", guidance_interval=(1.0, 1.0)), plain)


def test_prompt_seed_guidance_levels_and_parameters_compile_nothing(pipeline):
    for scale in (4.0, 1.0):  # Without guidance there is no negative prompt, nor its half of the program.
        pipeline("a red circle", **SETTINGS, guidance_scale=scale)
    params = pipeline.dit_params
    others = {path: value * 1.01 for path, value in params.items()}
    with compilations() as names:
        pipeline("x " * 100, "a green square", **(SETTINGS | {"seed": 2**63}))
        for changes in ({"guidance_scale": 1.0}, {"guidance_interval": (0.2, 0.8)}, {"cfg_zero_star": True}):
            pipeline("a red circle", **SETTINGS, **changes)
        pipeline("a red circle", **SETTINGS, rescale_cfg=0.5, cfg_norm=1, apg=True, apg_momentum=-0.5)
        pipeline("a red circle", **SETTINGS, sigmas=[0.9, 0.5, 0.1, 0])
        pipeline("a red circle", **SETTINGS, shift=1.0, schedule="karras")
        pipeline.dit_params = others
        pipeline("a red circle", **SETTINGS)
    pipeline.dit_params = params
    assert names == []


def ignore(done, total, latents):
    """A callback that does nothing: evaluations run one by one, in a program that runs of all lengths share."""


def latents_of(pipeline, *requests, callback=ignore, **params):
    requests = [ImageRequest(*request) for request in requests]
    return pipeline.draw_latents(requests, SamplingParams(**({"steps": 5} | params)), callback=callback)


def test_sizes_within_a_budget_share_the_program_and_with_a_callback_so_do_all_lengths(pipeline):
    latents_of(pipeline, ("x", 32, 48), callback=None)
    latents_of(pipeline, ("x", 32, 48))
    with compilations() as names:
        latents_of(pipeline, ("x", 48, 32), callback=None)
        latents_of(pipeline, ("x", 64, 56), callback=None)
        latents_of(pipeline, ("x", 8, 64), steps=9)
    assert "jit(advance)" not in names
    with compilations() as names:
        latents_of(pipeline, ("x", 64, 80))
    assert "jit(advance)" in names


def test_images_of_several_sizes_in_one_batch_equal_those_drawn_alone(pipeline):
    requests = [("a red circle", 32, 48, 5), ("x", 64, 32, 6)]
    for found, request in zip(latents_of(pipeline, *requests), requests, strict=True):
        (alone,) = latents_of(pipeline, request)
        assert found.shape == alone.shape == (1, request[2] // 8, request[1] // 8, 16)
        assert relative_error(found, alone) < 1e-4  # a random network amplifies rounding


def test_an_odd_size_is_sampled_as_comfyui_pads_it(pipeline, monkeypatch):
    """Oracle: Euler's method written out, with the network on latents that are padded circularly and cropped again."""
    monkeypatch.setattr(program, "LEVELS", 2)  # the third evaluation is also the first one without guidance
    request = ImageRequest("x", 40, 56, 5)
    model = parameters.merge(pipeline.dit_graphdef, pipeline.dit_params)
    positive, negative = (pipeline.encode([prompt]).rows_bnd for prompt in ("x", ""))
    levels = sigmas("simple", 3, 3.0)
    x = BatchNoise([request], "torch-cpu", SAMPLERS["euler"], levels).start[0][None]

    @jax.jit
    def velocity(x, sigma, context):
        padded = jnp.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)), mode="wrap")
        out = model.velocity(patchify(padded), jnp.array([[1, 4, 3]]), sigma[None], context)
        return unpatchify(out, 1, 4, 3)[:, :, :7, :5]

    for scale, (sigma, to) in zip((4.0, 4.0, 1.0), itertools.pairwise(levels), strict=True):
        of_negative, of_positive = (velocity(x, np.float32(sigma), context) for context in (negative, positive))
        x = x + (to - sigma) * (of_negative + scale * (of_positive - of_negative))
    beside, found = latents_of(
        pipeline,
        ("y", 64, 64, 3),
        dataclasses.astuple(request),
        callback=None,
        **{"steps": 3, "sampler": "euler", "guidance_scale": 4.0, "guidance_interval": (0.0, 0.5)},
    )
    assert found.shape == (1, 7, 5, 16)
    assert beside.shape == (1, 8, 8, 16)
    assert relative_error(found, x[0]) < 1e-4  # a random network amplifies rounding


def test_jaxs_noise_of_an_image_does_not_depend_on_the_batch(pipeline):
    requests = [("x", 32, 48, 5), ("x", 64, 64, 6)]
    together, other = latents_of(pipeline, *requests, noise="jax")
    (alone,) = latents_of(pipeline, requests[0], noise="jax")
    assert relative_error(together, alone) < 1e-4
    # It is not torch's noise, and another position in the batch has other noise.
    assert relative_error(latents_of(pipeline, requests[0])[0], alone) > 1e-2
    assert relative_error(latents_of(pipeline, ("x", 32, 48, 5, 2, 1), noise="jax")[0], alone) > 1e-2
    assert np.isfinite(other).all()


def test_prompts_in_a_batch_have_the_context_that_each_has_alone(pipeline):
    prompts = ["a red circle on a blue background", "", "x"]
    together = pipeline.encode(prompts)
    for row, prompt in enumerate(prompts):
        assert relative_error(together.rows_bnd[row : row + 1], pipeline.encode([prompt]).rows_bnd) < 2e-5


def test_a_prompt_longer_than_512_tokens_is_used_in_full_and_does_not_change_others(pipeline):
    long = "a red circle " * 300
    lengths = pipeline.encode(["a red circle", long]).lengths_b
    assert int(lengths[0]) == 512
    assert int(lengths[1]) == len(pipeline.tokenizers.prompt_ids(long)[1]) > 512

    def draw(prompts):
        noise = Recorded(np.tile(normal(1, 1, 6, 4, 16), (len(prompts), 1, 1, 1, 1)), [])
        levels, params = np.array([1.0, 0.5, 0.0], np.float32), SamplingParams(sampler="euler")
        return pipeline.sample(pipeline.encode(prompts), pipeline.encode([""] * len(prompts)), noise, levels, params)

    together, alone = draw(["a red circle", long]), draw(["a red circle"])
    assert relative_error(together[0], alone[0]) < 1e-4
    assert relative_error(together[1], alone[0]) > 1e-3


def test_a_weight_that_is_not_finite_is_an_error(pipeline):
    assert spans("(a:nan)")[0].text == "a"
    with pytest.raises(UserError, match=r"prompt '\(a:nan\)': a weight is not a finite number"):
        pipeline.encode(["(a:nan)"])


# From images


def random_image(width=32, height=48, seed=0):
    """A smooth random image."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def test_without_denoising_the_result_is_the_vaes_reconstruction(pipeline):
    image = random_image()
    (expected,) = to_images(pipeline.decode([pipeline.encode_image(to_pixels(image))]))
    (found,) = pipeline("a red circle", **SETTINGS, image=image, denoise=0.0)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_the_less_is_denoised_the_nearer_the_image_stays(pipeline):
    image = random_image()
    start = pipeline.encode_image(to_pixels(image))
    apart = []
    for amount in (0.2, 0.6, 1.0):
        params = SamplingParams(steps=5, denoise=amount)
        (found,) = pipeline.draw_latents([ImageRequest("x", 32, 48)], params, original=start, callback=ignore)
        apart.append(np.abs(found - start).mean())
    assert 0 < apart[0] < apart[1] < apart[2]


def test_two_calls_with_noise_left_over_are_one_sampling(pipeline):
    requests = [ImageRequest("x", 32, 48, 1), ImageRequest("y", 48, 32, 2)]
    params = SamplingParams(sampler="dpm_2", steps=5)

    def drawn(original=None, **changes):
        changed = dataclasses.replace(params, **changes)
        return pipeline.draw_latents(requests, changed, original=original, callback=ignore)

    first = drawn(end_at_step=2, return_with_leftover_noise=True)
    found = drawn(first, start_at_step=2, add_noise=False)
    by_hand = drawn(sigmas=params.levels()[:3])
    at_once = drawn()
    for index, latents in enumerate(at_once):
        assert relative_error(found[index], latents) < 1e-5
        np.testing.assert_array_equal(by_hand[index], first[index])
        assert relative_error(first[index], latents) > 1e-2
    assert drawn(first, start_at_step=5)[1] is first[1]


@pytest.mark.parametrize("sampler", ["er_sde", "uni_pc"])
def test_inpainting_keeps_the_latents_where_the_mask_is_black(pipeline, sampler):
    image, mask = random_image(), Image.new("L", (32, 48))
    mask.paste(255, (16, 0, 32, 48))
    requests, params = [ImageRequest("x", 32, 48, 1)], SamplingParams(sampler=sampler, steps=5)
    latents, area = pipeline.encode_image(to_pixels(image)), latent_mask(mask_values(mask))
    (found,) = pipeline.draw_latents(requests, params, original=latents, mask=area, callback=ignore)
    np.testing.assert_array_equal(found[:, :, :2], latents[:, :, :2])
    assert np.abs(found[:, :, 2:] - latents[:, :, 2:]).min(axis=-1).max() > 1e-3
    # The redrawn part fits the kept part: it is not what would be drawn alone.
    (alone,) = latents_of(pipeline, ("x", 32, 48, 1), sampler=sampler)
    assert relative_error(found[:, :, 2:], alone[:, :, 2:]) > 1e-2


def test_inpainting_keeps_the_pixels_where_the_mask_is_black(pipeline):
    image, mask = random_image(), Image.new("L", (32, 48))
    mask.paste(255, (13, 0, 32, 48))
    kept = np.asarray(pipeline("x", **SETTINGS, image=image, denoise=0.0)[0])
    found = np.asarray(pipeline("x", **SETTINGS, image=image, mask=mask)[0])
    np.testing.assert_array_equal(found[:, :13], kept[:, :13])
    assert np.all(np.any(found[:, 13:] != kept[:, 13:], axis=(0, 2)))


def test_a_grey_mask_mixes_the_estimate_with_the_image_once(pipeline):
    # One step of Euler from pure noise: the result is the estimate, of which ComfyUI's wrapper keeps the mask's share.
    options = {"steps": 1, "sampler": "euler"}
    original, area = normal(1, 6, 4, 16), np.linspace(0, 1, 24, dtype=np.float32).reshape(1, 6, 4, 1)
    (alone,) = latents_of(pipeline, ("x", 32, 48, 1), **options)
    (found,) = pipeline.draw_latents(
        [ImageRequest("x", 32, 48, 1)], SamplingParams(**options), original=original, mask=area, callback=ignore
    )
    assert relative_error(found, area * alone + (1 - area) * original) < 1e-5


def test_ddim_adds_the_next_seeds_noise_to_what_it_keeps():
    kept = BatchNoise([ImageRequest("x", 32, 48, 1)], "torch-cpu", SAMPLERS["ddim"], sigmas("simple", 3))
    np.testing.assert_array_equal(kept.start[0], channel_last(CPUStream(1).randn((1, 16, 1, 6, 4)))[0])
    np.testing.assert_array_equal(kept.outside_mask[0], channel_last(CPUStream(2).randn((1, 16, 1, 6, 4)))[0])


def test_a_mask_redraws_white_or_transparent_pixels_and_is_scaled_as_in_torch():
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).integers(0, 256, (48, 32), np.uint8)
    expected = torch.nn.functional.interpolate(torch.from_numpy(values / 255.0)[None, None], (6, 4), mode="bilinear")
    found = latent_mask(mask_values(Image.fromarray(values)))
    np.testing.assert_allclose(found[0, :, :, 0], expected[0, 0], atol=1e-6)
    transparent = Image.new("RGBA", (32, 48), "red")
    transparent.putalpha(Image.fromarray(255 - values))
    np.testing.assert_allclose(latent_mask(mask_values(transparent)), found, atol=1e-6)
    opaque = Image.fromarray(values).convert("RGBA")  # as browsers write masks
    np.testing.assert_array_equal(latent_mask(mask_values(opaque)), found)


def test_the_vae_runs_in_tiles_where_the_memory_is_short_or_the_user_says_so(pipeline, monkeypatch):
    pixels = to_pixels(random_image())
    latents = pipeline.encode_image(pixels)
    whole = pipeline.decode([latents])[0]
    in_tiles = lambda run, x, *units, tile: run(x) + sum(units) + tile  # noqa: E731 - it stands for a function
    monkeypatch.setattr("anima_jax.sampling.tiles.in_tiles", in_tiles)
    np.testing.assert_array_equal(pipeline.decode([latents], 0)[0], whole)
    np.testing.assert_allclose(pipeline.decode([latents], 64)[0], whole + 17.0, atol=1e-5)
    monkeypatch.setattr("anima_jax.sampling.tiles.free_bytes", lambda device: 10**5)
    np.testing.assert_allclose(pipeline.decode([latents])[0], whole + 41.0, atol=1e-5)
    np.testing.assert_allclose(pipeline.encode_image(pixels), latents + 41.0, atol=1e-5)
    np.testing.assert_array_equal(pipeline.decode([latents], 0)[0], whole)


def test_the_vae_runs_in_tiles_after_it_ran_out_of_memory(pipeline, monkeypatch, capsys):
    latents = pipeline.encode_image(to_pixels(random_image()))
    tiles = []

    def decode(params, latents, **_):
        if not tiles:
            tiles.append(latents)
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9GiB")
        return latents[..., :3].repeat(8, 2).repeat(8, 3)

    monkeypatch.setattr("anima_jax.sampling.latent_codec.decode_latents", decode)
    np.testing.assert_allclose(pipeline.decode([latents])[0][:, ::8, ::8], latents[..., :3], rtol=1e-6)
    assert capsys.readouterr().err == "the VAE ran out of memory: it runs in tiles of 1024 pixels\n"


@pytest.mark.parametrize("feather", [0, 3])
def test_pasted_pixels_are_the_images_own_where_the_mask_is_black(pipeline, feather):
    image, mask = random_image(), Image.new("L", (32, 48))
    mask.paste(255, (13, 0, 32, 48))
    options = SETTINGS | {"image": image, "mask": mask}
    found, plain = (np.asarray(pipeline("x", **options, paste=paste)[0], float) for paste in (feather, None))
    own = np.asarray(image, float)
    np.testing.assert_array_equal(found[:, :13], own[:, :13])
    assert np.any(plain[:, :13] != own[:, :13])
    # Inside, the share of what was drawn rises by 1 / (feather + 1) per pixel; redrawn pixels do not depend on `paste`.
    share = np.minimum(np.arange(1, 20) / (feather + 1), 1.0)[:, None]
    np.testing.assert_allclose(found[:, 13:], share * plain[:, 13:] + (1 - share) * own[:, 13:], atol=0.501)


def test_pixels_are_clipped_and_rounded_down():
    pixels = np.array([-2.0, -1.0, 0.0, 0.999, 1.0, 7.0], np.float32).reshape(1, 1, 1, 2, 3)
    assert np.asarray(to_images(pixels)[0]).ravel().tolist() == [0, 0, 127, 254, 255, 255]


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "eulr"}, r"sampler 'eulr', expected one of .*\(did you mean 'euler'\?\)"),
        ({"schedule": "bta"}, r"schedule 'bta', expected one of .*\(did you mean 'beta'\?\)"),
        ({"noise": "torch-gpu"}, "noise 'torch-gpu', expected one of torch-cpu, torch-cuda, jax"),
        ({"width": 44}, r"width 44, expected a positive multiple of 8 \(nearest: 40 and 48\)"),
        ({"width": 10**12}, "width 1000000000000, expected at most 16384"),
        ({"height": 0}, "height 0, expected a positive multiple of 8"),
        ({"steps": -3}, "steps -3, expected 1 to 1000"),
        ({"shift": 0.0}, "shift 0.0, expected a number above 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale nan, expected a finite number"),
        ({"guidance_interval": (0.6, 0.4)}, "guidance_interval 0.6 0.4, expected two ascending numbers from 0 to 1"),
        ({"denoise": 1.5}, "denoise 1.5, expected 0, or 0.001 to 1"),
        ({"denoise": 0.5}, "denoise 0.5 needs an image to start from"),
        ({"seed": 2**64}, "seed 18446744073709551616, expected a whole number ≥ 0 and < 2⁶⁴"),
        ({"seed": [1, 2, 3], "width": [32, 48]}, "2 widths for 3 images, expected 1 or 3"),
        ({"mask": Image.new("L", (32, 48))}, "a mask without an image"),
        ({"paste": 3}, "paste 3 needs an image and a mask"),
        ({"paste": 3, "image": Image.new("RGB", (32, 48))}, "paste 3 needs a mask"),
        ({"paste": -1}, "paste -1, expected a number of pixels from 0 to 16384"),
        ({"rescale_cfg": 1.5}, "rescale_cfg 1.5, expected 0 to 1"),
        ({"apg": True, "apg_momentum": float("nan")}, "apg_momentum nan, expected -5 to 1"),
        ({"apg_eta": 0.5}, "apg_eta 0.5 without apg: expected apg, too"),
        ({"apg": True, "guidance_scale": 0.0}, "guidance_scale 0 with apg, which divides by it"),
        ({"start_at_step": -1}, "start_at_step -1, end_at_step None, expected at least 0"),
        ({"sigmas": [14.6, 7.0, 0.0]}, r"sigmas 14.6 7.0 0.0, expected two or more noise levels from 1 \(noise\) to 0"),
        ({"sigmas": [1.0]}, "sigmas 1.0, expected two or more noise levels"),
        ({"sigmas": [1.0, 0.0, 0.0]}, "sigmas 1.0 0.0 0.0, expected levels above 0 up to the last one"),
        ({"sigmas": [0.1, 0.9], "sampler": "dpmpp_2m_sde"}, "sampler 'dpmpp_2m_sde': no finite numbers at the noise"),
        ({"sampler": "lms", "order": 0}, "order '0' of sampler 'lms', expected a whole number from 1 to 100"),
        ({"sampler": "lcm", "noise": "jax", "noise_clip_std": 2}, "noise_clip_std: works with torch's noise"),
        ({"tile": 40}, "tile 40, expected 0, or a multiple of 8 from 64 to 16384"),
        ({"image": Image.new("RGB", (32, 32))}, "the image is 32×32, expected 32×48"),
        (
            {"image": Image.new("RGB", (32, 48)), "mask": Image.new("L", (48, 32))},
            "the mask is 48×32, expected the image's 32×48",
        ),
    ],
)
def test_errors_are_one_line(pipeline, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        pipeline("x", **(SETTINGS | changes))
    assert len(str(caught.value).splitlines()) == 1


def test_networks_that_do_not_fit_each_other_are_an_error(transformer):
    with pytest.raises(UserError, match="width of the text encoder is 48, the transformer expects 64"):
        AnimaPipeline.load(
            transformer=transformer,
            vae=ASSETS / "tiny_vae.safetensors",
            text_encoder=GOLDEN / "qwen3.model.safetensors",
            tokenizers=ASSETS / "tokenizers",
        )


def test_repr_names_sizes_dtype_and_devices(pipeline):
    text = repr(pipeline)
    assert "blocks=2, width=64, heads=4, dtype=float32" in text
    parameters_of_dit = sum(value.size for value in pipeline.dit_params.values())
    assert f"transformer: {parameters_of_dit:,} parameters (float32) on {jax.devices()[0]}" in text
