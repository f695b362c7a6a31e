"""Guidance. Oracles: ComfyUI's nodes (golden/guidance), its formulas written out in float64, and their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anima_jax.diffusion import guidance
from anima_jax.diffusion.guidance import Estimates, Variants
from anima_jax.diffusion.schedules import percent_to_sigma
from anima_jax.models.dit import token_positions
from anima_jax.sampling import evaluation
from anima_jax.sampling.packing import TokenPacking, grid_of, real_values
from tests.golden_files import channel_last, golden, relative_error

DATA = golden("guidance")

# Names of the golden file → the settings of ComfyUI's nodes that made it.
CASES = {
    "rescale": Variants(rescale=0.7),
    "rescale_all": Variants(rescale=1.0),
    "zero_star": Variants(zero_star=True),
    "norm": Variants(norm=1.0),
    "norm_strength": Variants(norm=1.3),
    "apg": Variants(apg=True),
    "apg_eta": Variants(apg=True, apg_eta=0.2, apg_norm_threshold=0.0),
    "apg_momentum": Variants(apg=True, apg_eta=0.5, apg_norm_threshold=8.0, apg_momentum=-0.6),
    "apg_momentum_limit": Variants(apg=True, apg_norm_threshold=3.0, apg_momentum=0.4),
    "all": Variants(True, 0.6, 1.1, True, 0.3, 6.0, -0.5),
}


@jax.jit
def guide(estimates, variants, momentum, size_b3):
    shape = (*momentum.shape[:2], 2, 2, -1)
    x, positive, negative = (array.reshape(shape) for array in estimates[:3])
    out, momentum = guidance.guided_by_variants(
        Estimates(x, positive, negative, estimates.sigma),
        DATA["scale"],
        variants,
        momentum.reshape(shape),
        token_positions(grid_of(size_b3), shape[1])[..., 2],
        real_values(size_b3, shape[1]).reshape(shape),
    )
    return out.reshape(*shape[:2], -1), momentum.reshape(*shape[:2], -1)


@pytest.mark.parametrize("case", CASES)
def test_variants_equal_comfyuis_nodes(case):
    """Two images of 4 × 3 latents, packed with padding; APG forgets the past where the level rises."""
    packing = TokenPacking([(1, 4, 3)] * 2)
    momentum = np.zeros(packing.shape, np.float32)
    for index, sigma in enumerate(DATA["sigmas"]):
        arrays = (packing.pack(channel_last(DATA[name][index])) for name in ("x", "positive", "negative"))
        if index and sigma > DATA["sigmas"][index - 1]:
            momentum = np.zeros(packing.shape, np.float32)
        out, momentum = guide(Estimates(*arrays, sigma), CASES[case], momentum, packing.size_b3)
        # float32: sums over 200 values, and quotients of them.
        assert relative_error(packing.unpack(out), channel_last(DATA[case][index])) < 5e-6
        assert not np.asarray(out)[:, 4:].any()


def test_every_case_is_recorded_and_only_the_defaults_are_off():
    assert set(CASES) == set(DATA) - {"x", "positive", "negative", "sigmas", "scale"}
    assert all(case.are_on() for case in CASES.values())
    assert not Variants().are_on()


def test_guidance_extrapolates_and_scale_one_is_the_prompts_estimate():
    x, positive, negative = (DATA[name][0] for name in ("x", "positive", "negative"))
    estimates = Estimates(*map(jnp.asarray, (x, positive, negative, 0.5)))
    assert relative_error(guidance.guided(estimates, jnp.float32(4.0)), negative + 4.0 * (positive - negative)) < 1e-6
    assert relative_error(guidance.guided(estimates, jnp.float32(1.0)), positive) < 1e-6


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((0.0, 1.0), [4, 4, 4, 4]),
        ((0.0, 0.5), [4, 4, 4, 1]),  # half of the sampling ends at 0.75, with a shift of 3
        ((0.5, 1.0), [1, 1, 4, 4]),
        ((0.2, 0.4), [1, 4, 1, 1]),
    ],
)
def test_outside_the_interval_there_is_no_guidance(interval, expected):
    levels = np.array([1.0, 0.9, 0.75, 0.1])
    assert guidance.scale_schedule(levels, 4.0, interval, 3.0).tolist() == expected


def test_a_step_at_the_ends_of_the_interval_is_on_the_side_where_comfyui_puts_it():
    """ComfyUI compares a float32 level with the end rounded to float32 (`get_area_and_mult`): both ends are inside."""
    levels = np.array([np.float32(percent_to_sigma(0.3, 2.2)), np.float32(percent_to_sigma(0.6, 2.2))])
    beyond = np.nextafter(levels, np.array([2, 0], np.float32))
    assert guidance.scale_schedule(levels, 4.0, (0.3, 0.6), 2.2).tolist() == [4, 4]
    assert guidance.scale_schedule(beyond, 4.0, (0.3, 0.6), 2.2).tolist() == [1, 1]


def test_what_an_image_without_variants_remembers_does_not_depend_on_the_others_of_its_batch():
    """APG is off where the negative prompt is not evaluated, even if the level rises there."""

    def remembered(others_apg):
        apg_b = np.array([False, others_apg]).reshape(2, 1, 1)
        variants = Variants(*(np.full((2, 1, 1), value) for value in Variants(apg_momentum=0.5)))._replace(apg=apg_b)
        shared = evaluation.SharedInputs(np.array([[1, 4, 8]] * 2, np.int32), None, variants)
        array_blc = np.random.default_rng(0).normal(size=(2, 16, 64)).astype(np.float32)
        step = evaluation.GuidanceInputs(np.ones((2, 1, 1), np.float32), np.ones((2, 1, 1), np.bool_), None)
        estimates = Estimates(array_blc, array_blc + 1, array_blc, np.full((2, 1, 1), 0.5, np.float32))
        return evaluation.guided(estimates, step, shared, array_blc)[1][0], array_blc[0]

    for others_apg in (False, True):
        np.testing.assert_array_equal(*remembered(others_apg))
