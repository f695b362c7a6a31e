"""Options of samplers, and levels that end above 0, against ComfyUI's own code (golden/sampler_options)."""

import numpy as np
import pytest

from anima_jax.diffusion.samplers import SAMPLERS, check_options, controller, sampler_plan
from anima_jax.errors import UserError
from tests.diffusion.test_samplers import guided, in_adaptive_steps, run_on_host, unguided
from tests.golden_files import VALUE_TOLERANCE, golden, relative_error

DATA = golden("sampler_options")
CASES = [key for key in DATA if key.split()[0] in SAMPLERS]


def result(name, levels, options):
    """The sampler's result in float64, on the fields and noises of the golden file."""
    noises = DATA["step_noise"].astype(np.float64)
    if SAMPLERS[name].controller:
        return in_adaptive_steps(levels, DATA["noise"], noises, **options)
    plan = sampler_plan(name, levels, 3.0, options)
    return run_on_host(plan, noises, DATA["noise"], guided if plan.both else unguided)[0]


@pytest.mark.parametrize("key", CASES)
def test_options_have_the_effect_that_they_have_in_comfyui(key):
    name, *texts = key.split()
    options = dict(text.replace("_SDE", " SDE").split("=") for text in texts)
    assert relative_error(result(name, DATA["sigmas"], options), DATA[key]) < VALUE_TOLERANCE


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling_may_end_above_0(name):
    assert relative_error(result(name, DATA["part"], {}), DATA[f"part {name}"]) < VALUE_TOLERANCE


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        ("euler", {"eta": 1}, "sampler 'euler' has no option 'eta': it has none"),
        (
            "lcm",
            {"s_nois": 1},
            r"no option 's_nois': its options are s_noise, .*std \(did you mean 's_noise'\?\)",
        ),
        ("lms", ["order"], r"sampler_options \['order'\], expected names with values"),
        ("lms", {"order": 0}, "order '0' of sampler 'lms', expected a whole number from 1 to 100"),
        ("lms", {"order": "2.5"}, "order '2.5' of sampler 'lms'"),
        ("er_sde", {"solver_type": "ode"}, "solver_type 'ode' of .*, expected one of ER-SDE, Reverse-time SDE, ODE"),
        ("sa_solver", {"use_pece": "1"}, "use_pece '1' of sampler 'sa_solver', expected True or False"),
        ("seeds_2", {"r": float("nan")}, "r 'nan' of sampler 'seeds_2', expected a number from 0.01 to 1"),
        ("seeds_2", {"eta": True}, "eta 'True' of sampler 'seeds_2'"),
        ("seeds_2", {"eta": None}, "eta 'None' of sampler 'seeds_2'"),
        ("dpmpp_sde", {"r": 0}, "sampler 'dpmpp_sde', r=0.0: no finite numbers at the noise levels 1, 0.9378"),
        ("euler_ancestral", {"eta": 30}, "sampler 'euler_ancestral', eta=30.0: no finite numbers"),
    ],
)
def test_wrong_options_are_an_error(sampler, options, message):
    with pytest.raises(UserError, match=message):
        sampler_plan(sampler, DATA["sigmas"], 3.0, options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, float("nan"), "the error of a step is nan"),
        ({"accept_safety": 100}, 1e-9, "no step is accepted with these rtol, atol and accept_safety"),
        ({"h_init": 0}, 1e-9, "no finite numbers at the noise levels"),
        ({"icoeff": 100, "pcoeff": 100}, 1e-9, "pcoeff, icoeff or dcoeff is too large"),
    ],
)
def test_adaptive_steps_that_would_never_end_are_an_error(options, error, message):
    def steps():
        chosen = controller("dpm_adaptive", DATA["sigmas"], options)
        while not chosen.finished:
            sampler_plan("dpm_adaptive", chosen.levels, 3.0)
            chosen.accept(error)

    with pytest.raises(UserError, match=message):
        steps()


def test_options_may_be_texts():
    texts = {"eta": "0.5", "use_pece": "true", "predictor_order": "2"}
    assert check_options("sa_solver", texts) == {"eta": 0.5, "use_pece": True, "predictor_order": 2}
