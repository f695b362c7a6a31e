"""docs/sampling.md lists every sampler, schedule and parameter."""

import dataclasses
import pathlib
import re

from anima_jax.diffusion.samplers import OPTIONS, SAMPLERS, sampler_plan
from anima_jax.diffusion.schedules import SCHEDULES, sigmas
from anima_jax.diffusion.step_noise import KINDS
from anima_jax.sampling.request import ImageRequest, SamplingParams
from anima_jax.sampling.tiles import OVERLAP, TILE

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "sampling.md").read_text("utf-8")
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| `")]
NAMED = {name: row for row in ROWS for name in re.findall(r"`([a-z0-9_-]+)`", row[0])}


def test_every_sampler_schedule_noise_and_parameter_has_its_row():
    parameters = {field.name for kind in (ImageRequest, SamplingParams) for field in dataclasses.fields(kind)}
    samplers = {name for name in SAMPLERS if not name.endswith("_gpu")}
    for name in {*samplers, *SCHEDULES, *KINDS, *parameters} - {"batch_index"}:
        assert name in NAMED, name


def test_options_are_those_of_the_samplers():
    above = ""
    for name, sampler in SAMPLERS.items():
        if not name.endswith("_gpu"):
            listed = NAMED[name][3]
            options = (above if listed == "the same" else listed).replace(", ", " ").split()
            assert set(options) >= set(sampler.options), name
            above = listed
    assert NAMED.keys() >= set(OPTIONS)


def test_the_page_says_how_closely_every_sampler_agrees_with_comfyui():
    rows = [re.fullmatch(r"\| ([a-z0-9_]+) \| (\d+) \| (\d+) \|", line) for line in PAGE.splitlines()]
    figures = {row[1]: (int(row[2]), int(row[3])) for row in rows if row}
    assert list(figures) == list(SAMPLERS)
    assert min(map(min, figures.values())) >= 80


def test_evaluations_and_noises_are_those_of_the_samplers():
    count = 12
    for name, sampler in SAMPLERS.items():
        if name.endswith("_gpu") or sampler.controller:
            continue
        _, evaluations, noises, *_ = NAMED[name]
        names = re.findall(r"`([a-z0-9_]+)`", NAMED[name][0])
        evaluations, noises = (
            cell.split(",")[names.index(name) if "," in cell else 0] for cell in (evaluations, noises)
        )
        levels = sigmas("karras", count, without_penultimate=sampler.without_penultimate)
        plan = sampler_plan(name, levels, 3.0)
        assert len(plan.sigmas_n) == number(evaluations, count), name
        if "N" in noises:
            assert len(plan.draws) == number(noises, count), name
        else:
            assert bool(plan.draws) == (noises.strip() in ("path", "in the middle")), name
            assert (sampler.brownian_path_on is not None) == (noises == "path")


def number(text: str, n: int) -> int:
    """The value of `2N − 1`."""
    factor, _, less = text.strip().partition("N")
    return int(factor or 1) * n - int(less.replace("−", "").strip() or 0)


def test_tiles_are_as_large_as_the_page_says():
    assert f"tiles of {TILE * 8} pixels that overlap by {OVERLAP * 8}" in PAGE
