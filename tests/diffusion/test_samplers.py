"""Samplers against ComfyUI's (golden/samplers), the formulas of those without a record, and properties of a plan."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anima_jax.diffusion import samplers
from anima_jax.diffusion.samplers import SAMPLERS, StepInputs, controller, initial_carry, run_scan, sampler_plan
from anima_jax.diffusion.schedules import sigmas
from tests.golden_files import VALUE_TOLERANCE, golden, relative_error

DATA = golden("samplers")
MORE = golden("samplers_more")
RECORDS = {key: data for data in (DATA, MORE) for key in data if key.split(".")[0] in SAMPLERS and key.count(".") == 2}
GUIDANCE = 1.6
"""Guidance scale of the records of the CFG++ samplers."""

KSAMPLER_NAMES = """
    euler euler_cfg_pp euler_ancestral euler_ancestral_cfg_pp heun heunpp2 exp_heun_2_x0 exp_heun_2_x0_sde dpm_2
    dpm_2_ancestral lms dpm_fast dpm_adaptive dpmpp_2s_ancestral dpmpp_2s_ancestral_cfg_pp dpmpp_sde dpmpp_sde_gpu
    dpmpp_2m dpmpp_2m_cfg_pp dpmpp_2m_sde dpmpp_2m_sde_gpu dpmpp_2m_sde_heun dpmpp_2m_sde_heun_gpu dpmpp_3m_sde
    dpmpp_3m_sde_gpu ddpm lcm ipndm ipndm_v deis cfgpp_ud10_ab res_multistep res_multistep_cfg_pp
    res_multistep_ancestral res_multistep_ancestral_cfg_pp gradient_estimation gradient_estimation_cfg_pp er_sde seeds_2
    seeds_3 sa_solver sa_solver_pece ddim uni_pc uni_pc_bh2
"""
"""ComfyUI's `KSampler.SAMPLERS` (comfy/samplers.py) since `cfgpp_ud10_ab` was added, in its order."""


def test_the_samplers_are_all_of_comfyuis():
    assert list(SAMPLERS) == KSAMPLER_NAMES.split()


def field(x, sigma):
    """The velocity field that ComfyUI's samplers ran on (tests/golden/README.md, `samplers`)."""
    return jnp.tanh(1.3 * x + 0.2) * (0.7 + 0.3 * sigma) - 0.4 * x * jnp.cos(2 * sigma) + 0.1


def guided(x, sigma):
    """The estimates of the records of CFG++ samplers (tests/golden/README.md, `samplers_more`)."""
    positive = x - sigma * np.asarray(field(x, sigma), np.float64)
    velocity = 0.8 * np.tanh(0.9 * x - 0.1) * (0.6 + 0.4 * sigma) - 0.3 * x * np.cos(1.7 * sigma) - 0.05
    negative = x - sigma * velocity
    return negative + GUIDANCE * (positive - negative), negative


def unguided(x, sigma):
    estimate = x - sigma * np.asarray(field(x, sigma), np.float64)
    return estimate, estimate


def sample(name, x, levels, step_noise):
    """The sampler's result on `field` from `x` along `levels`, in float32; `step_noise` are its noises in order."""
    plan = sampler_plan(name, levels, 3.0)
    noises = np.zeros((*plan.draw_numbers_nq.shape, *x.shape), np.float32)
    for index, number in np.ndenumerate(plan.draw_numbers_nq):
        if number >= 0:
            noises[index] = step_noise[number]
    steps = StepInputs(plan.sigmas_n, plan.factors_nkj, noises)
    return run_scan(denoise, initial_carry(plan, jnp.asarray(x)), steps, both=plan.both)[0][0]


def denoise(x, step):
    estimate = x - step.sigma * field(x, step.sigma)
    return estimate, estimate


@pytest.mark.parametrize("key", RECORDS)
def test_samplers_equal_comfyuis(key):
    sampler, schedule, steps = key.split(".")
    data, levels = RECORDS[key], DATA[f"sigmas.{schedule}.{steps}"]
    noise = data.get(f"{key}.step_noise", np.zeros(0))
    # ComfyUI draws noise here that it multiplies by 0.
    noise = noise[:0] if sampler == "res_multistep_cfg_pp" else noise
    if SAMPLERS[sampler].controller:
        result = in_adaptive_steps(levels, data["noise"])
    elif data is DATA:
        result = sample(sampler, data["noise"], levels, noise)
    else:
        result = on_host(sampler, levels, noise, data["noise"], guided if "cfg_pp" in sampler else unguided)
    assert relative_error(result, data[key]) < VALUE_TOLERANCE
    assert SAMPLERS[sampler].controller or len(sampler_plan(sampler, levels, 3.0).draws) == len(noise)


def in_adaptive_steps(levels, x, step_noise=(), estimates=unguided, **options):
    """The result of `dpm_adaptive`, by default on `field`, with the error taken over all of `x`."""
    steps = controller("dpm_adaptive", levels, options)
    low, accepted = x, 0
    while not steps.finished:
        noise = step_noise[accepted : accepted + 1]
        results = run_on_host(sampler_plan("dpm_adaptive", steps.levels, 3.0, options), noise, x, estimates)
        tolerance = np.maximum(steps.atol, steps.rtol * np.maximum(abs(results[1]), abs(low)))
        if steps.accept(float(np.sqrt(np.mean((results[2] / tolerance) ** 2)))):
            x, low = results[:2]
            accepted += 1
    return x


def on_host(name, levels, noises, x, estimates, **options):
    """The result of `name` in float64; `estimates(x, σ)` are the guided one and the negative prompt's."""
    return run_on_host(sampler_plan(name, levels, 3.0, options), noises, x, estimates)[0]


def run_on_host(plan, noises, x, estimates):
    """The results of a plan in float64."""
    x = np.asarray(x, np.float64)
    arrays = [x, *[np.zeros_like(x)] * (plan.factors_nkj.shape[1] - 1)]
    for sigma, factors, drawn in zip(plan.sigmas_n, plan.factors_nkj, plan.draw_numbers_nq, strict=True):
        guided, negative = estimates(arrays[0], float(sigma))
        fresh = [noises[number] if number >= 0 else 0 * x for number in drawn]
        inputs = [*arrays, guided, *([negative] if plan.both else []), *fresh]
        arrays = [sum(f * array for f, array in zip(row, inputs, strict=True)) for row in factors.astype(np.float64)]
    return arrays


def two_fields(x, sigma):
    """Estimates of a prompt and a negative prompt with different velocities."""
    return x - sigma * np.asarray(field(x, sigma), np.float64), x - sigma**2 * np.cos(x)


def test_euler_cfg_pp_equals_its_formula():
    x = expected = DATA["noise"].astype(np.float64)
    levels = sigmas("simple", 6).astype(np.float64)
    for sigma, after in itertools.pairwise(levels):
        guided, negative = two_fields(expected, sigma)
        expected = (1 - after) * guided + after * (expected - (1 - sigma) * negative) / sigma
    found = on_host("euler_cfg_pp", levels, [], x, two_fields)
    assert relative_error(found, expected) < VALUE_TOLERANCE


@pytest.mark.parametrize("first", [0.9, 1.0])
def test_ancestral_cfg_pp_splits_sigma_over_alpha(first):
    x = expected = DATA["noise"].astype(np.float64)
    levels, noises = np.array([first, 0.8, 0.55, 0.2, 0.0]), DATA["er_sde.simple.10.step_noise"].astype(np.float64)
    for index, (sigma, after) in enumerate(itertools.pairwise(levels)):
        guided, negative = two_fields(expected, sigma)
        if after == 0:
            expected = guided
            continue
        # From σ = 1 the ratio is infinite: in the limit all noise is new.
        ratio, target = (np.inf if sigma == 1 else sigma / (1 - sigma)), after / (1 - after)
        up = target if sigma == 1 else np.sqrt(target**2 * (ratio**2 - target**2) / ratio**2)
        down = np.sqrt(target**2 - up**2)
        direction = (expected - (1 - sigma) * negative) / sigma
        expected = (1 - after) * (guided + down * direction + up * noises[index])
    found = on_host("euler_ancestral_cfg_pp", levels, noises, x, two_fields)
    assert relative_error(found, expected) < VALUE_TOLERANCE


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("dpm_fast", "dpm_adaptive")])
def test_a_sampler_ends_at_the_estimate_if_that_never_changes(name):
    """If every estimate is the same image, that is the result, no matter what noise was added on the way.

    The DPM-Solvers end at the last level above 0.
    """
    noise = np.random.default_rng(0).standard_normal((40, 3, 2))
    target = noise[-1]
    result = on_host(name, sigmas("beta", 7), noise, noise[-2], lambda x, sigma: (target, target))
    # Factors are float32; UniPC stops at a level of 0.001.
    assert np.abs(result - target).max() < (5e-3 if SAMPLERS[name].ends_at else 2e-6)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "dpm_adaptive"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_every_sampler_works_with_few_steps(name, steps):
    levels = sigmas("simple", steps, without_penultimate=SAMPLERS[name].without_penultimate)
    plan = sampler_plan(name, levels, 3.0)
    assert np.isfinite(plan.factors_nkj).all()
    assert steps <= len(plan.sigmas_n) <= 3 * steps


@pytest.mark.parametrize("name", ["heun", "dpmpp_3m_sde", "uni_pc"])
def test_a_run_in_parts_equals_the_run_at_once(name):
    plan = sampler_plan(name, DATA["sigmas.beta.10"], 3.0)
    noise = np.random.default_rng(1).standard_normal((*plan.draw_numbers_nq.shape, 4), np.float32)
    steps, x = StepInputs(plan.sigmas_n, plan.factors_nkj, noise), jnp.linspace(-2.0, 2.0, 4)

    full, estimate, _ = run_scan(denoise, initial_carry(plan, x), steps, both=False)
    carry = initial_carry(plan, x)
    for part in (slice(0, 4), slice(4, 5), slice(5, None)):
        carry, last, _ = run_scan(denoise, carry, jax.tree.map(lambda leaf, part=part: leaf[part], steps), both=False)
    np.testing.assert_allclose(carry[0], full[0], rtol=1e-6)
    np.testing.assert_allclose(last, estimate, rtol=1e-6)


def test_plans_of_one_sampler_have_the_same_shape_for_other_levels():
    shapes = set()
    for schedule, shift in (("simple", 3.0), ("beta", 1.0), ("karras", 6.0)):
        plan = sampler_plan("er_sde", sigmas(schedule, 20, shift), shift)
        shapes.add(tuple(array.shape for array in plan[:3]))
    assert len(shapes) == 1


def test_sampling_starts_between_the_image_and_noise():
    np.testing.assert_allclose(samplers.start(np.array(2.0), 0.75, np.array(-4.0)), 0.5)
