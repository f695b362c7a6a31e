"""The sampler's options on the command line."""

import re

import pytest

from anima_jax.errors import UserError
from anima_jax.sampling.arguments import sampling_params
from anima_jax.sampling.flags import parse_arguments
from anima_jax.sampling.recipe import Recipe


def options_of(*flags, like=()):
    params = sampling_params(
        parse_arguments(["--prompt", "x", "-o", "x.png", *flags]), None, Recipe("y.png", dict(like))
    )
    params.check()
    return params.sampler_options


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("--sampler dpmpp_2m_sde --eta 0.5 --solver_type heun", {"eta": 0.5, "solver_type": "heun"}),
        ("--sampler_options eta=0.25 max_stage=2 --s_noise 1.003", {"eta": 0.25, "max_stage": 2, "s_noise": 1.003}),
        ("--sampler sa_solver --use_pece --predictor_order 2", {"use_pece": True, "predictor_order": 2}),
        ("--sampler sa_solver --simple_order_2 false", {"simple_order_2": False}),
        ("--sampler euler_cfg_pp --sampler_options version=alternative", {"version": "alternative"}),
        ("--sampler lms --order 2", {"order": 2}),
        ("", {}),
    ],
)
def test_each_option_is_a_flag_or_one_of_sampler_options(flags, options):
    assert options_of(*flags.split()) == options


def test_a_value_may_have_a_space():
    found = options_of("--sampler_options", "solver_type=Reverse-time SDE")
    assert found == options_of("--solver_type", "Reverse-time SDE") == {"solver_type": "Reverse-time SDE"}


def test_an_older_images_options_are_kept_with_its_sampler():
    older = {"sampler": "seeds_2", "sampler_options": {"eta": 0.5, "r": 0.25}}
    assert options_of(like=older) == {"eta": 0.5, "r": 0.25}
    assert options_of("--r", "0.75", like=older) == {"eta": 0.5, "r": 0.75}
    assert options_of("--sampler", "euler", like=older) == {}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--eta 1 --sampler heun", "sampler 'heun' has no option 'eta': it has none"),
        ("--sampler_options eta --sampler seeds_2", "--sampler_options eta: expected NAME=VALUE"),
        ("--eta --sampler seeds_2", "eta 'True' of sampler 'seeds_2', expected a number from 0 to 100"),
        ("--eta 0,5", "eta '0,5' of sampler 'er_sde', expected a number from 0 to 100"),
        ("--eta 1 --sampler hein", "sampler 'hein', expected one of"),
    ],
)
def test_wrong_options_end_in_one_line(flags, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        options_of(*flags.split())
    assert len(str(error.value).splitlines()) == 1
