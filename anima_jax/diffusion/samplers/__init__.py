"""Samplers by ComfyUI's names: each a few formulas, all run by one step function in one `lax.scan`.

Source: ComfyUI comfy/k_diffusion/sampling.py, for its flow model (`CONST` in comfy/model_sampling.py): the network's
velocity v gives the clean estimate D = x − σ·v.
Axes: n evaluations of the network, k arrays carried between them, j arrays at hand, q new noises.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from anima_jax.diffusion.samplers import ode, sde
from anima_jax.diffusion.samplers.plan import Formulas, Plan, make_plan


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A row of the table: formulas, and what else is particular to a sampler."""

    formulas: Formulas
    without_penultimate: bool = False
    """Its schedules have a step more, and their last level above 0 is left out."""

    path: str | None = None
    """Its noise is a Brownian path over the levels: "cpu", or "device" where ComfyUI draws the path on the GPU."""

    ends_at: float = 0.0
    """Noise level that the result is taken to hold."""

    fresh_noise_outside_mask: bool = False
    """When inpainting, what is kept is noised with other noise than the picture starts from."""


SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(ode.euler),
    "euler_cfg_pp": Sampler(sde.euler_cfg_pp),
    "euler_ancestral": Sampler(sde.euler_ancestral),
    "euler_ancestral_cfg_pp": Sampler(sde.euler_ancestral_cfg_pp),
    "heun": Sampler(ode.heun),
    "dpm_2": Sampler(ode.dpm_2, without_penultimate=True),
    "dpm_2_ancestral": Sampler(sde.dpm_2_ancestral, without_penultimate=True),
    "lms": Sampler(ode.lms),
    "dpmpp_2s_ancestral": Sampler(sde.dpmpp_2s_ancestral),
    "dpmpp_sde": Sampler(sde.dpmpp_sde, path="cpu"),
    "dpmpp_sde_gpu": Sampler(sde.dpmpp_sde, path="device"),
    "dpmpp_2m": Sampler(ode.dpmpp_2m),
    "dpmpp_2m_sde": Sampler(sde.dpmpp_2m_sde, path="cpu"),
    "dpmpp_2m_sde_gpu": Sampler(sde.dpmpp_2m_sde, path="device"),
    "dpmpp_2m_sde_heun": Sampler(sde.dpmpp_2m_sde_heun, path="cpu"),
    "dpmpp_2m_sde_heun_gpu": Sampler(sde.dpmpp_2m_sde_heun, path="device"),
    "dpmpp_3m_sde": Sampler(sde.dpmpp_3m_sde, path="cpu"),
    "dpmpp_3m_sde_gpu": Sampler(sde.dpmpp_3m_sde, path="device"),
    "ddim": Sampler(ode.euler, fresh_noise_outside_mask=True),
    "uni_pc": Sampler(ode.uni_pc, without_penultimate=True, ends_at=ode.UNI_PC_LAST),
    "uni_pc_bh2": Sampler(ode.uni_pc_bh2, without_penultimate=True, ends_at=ode.UNI_PC_LAST),
    "ipndm": Sampler(ode.ipndm),
    "ipndm_v": Sampler(ode.ipndm_v),
    "deis": Sampler(ode.deis),
    "res_multistep": Sampler(ode.res_multistep),
    "res_multistep_ancestral": Sampler(sde.res_multistep_ancestral),
    "gradient_estimation": Sampler(ode.gradient_estimation),
    "er_sde": Sampler(sde.er_sde),
    "seeds_2": Sampler(sde.seeds_2),
    "seeds_3": Sampler(sde.seeds_3),
    "sa_solver": Sampler(sde.sa_solver),
    "lcm": Sampler(sde.lcm),
}


class StepInputs(NamedTuple):
    """What the step function takes at each of n evaluations."""

    sigmas_n: Any
    factors_nkj: Any
    noises_nq: Any
    """Arrays of noise, shaped (n, q) and as the latents; or what `draw` makes noise of."""

    guidance_n: Any = None
    """Whatever else the network's evaluation needs to know, if anything."""


Denoise = Callable[[Array, StepInputs], tuple[Array, Array]]
"""(x, the evaluation's row) → the guided estimate of the clean latents, and that of the negative prompt alone."""


def run_scan(
    denoise: Denoise,
    carried: Sequence[Array],
    rows: StepInputs,
    *,
    both: bool,
    draw: Callable[[Any], Array] = jnp.asarray,
) -> tuple[list[Array], Array]:
    """Take the evaluations of `rows`: the arrays that are carried on, the point first, and the last estimate."""

    def step(state, row: StepInputs):
        carried, _ = state
        guided, unconditional = denoise(carried[0], row)
        at_hand = [*carried, guided, *([unconditional] if both else []), *map(draw, row.noises_nq)]
        # Not a matrix product: those are not float32 everywhere.
        carried = [
            functools.reduce(operator.add, (factor * array for factor, array in zip(factors, at_hand, strict=True)))
            for factors in row.factors_nkj
        ]
        return (carried, guided), None

    return jax.lax.scan(step, (list(carried), carried[0]), rows)[0]


def initial_carry(plan: Plan, x: Any) -> list[Any]:
    """What is carried into the first evaluation."""
    return [x, *[np.zeros(x.shape, np.float32) for _ in range(plan.factors_nkj.shape[1] - 1)]]


def sample(
    sampler: str,
    velocity: Callable[[Array, Array], Array],
    x: Array,
    sigmas: np.ndarray,
    *,
    shift: float = 3.0,
    step_noise: Sequence[np.ndarray] | np.ndarray = (),
) -> Array:
    """Follow `velocity(x, σ)` from `x` at sigmas[0] to sigmas[-1] with the sampler of this name, in float32.

    `sigmas` are concrete numbers; `step_noise` holds the sampler's noises in the order of use, each shaped as `x`.
    """
    plan = make_plan(SAMPLERS[sampler].formulas, sigmas, shift)

    def denoise(x: Array, row: StepInputs) -> tuple[Array, Array]:
        estimate = x - row.sigmas_n * velocity(x, row.sigmas_n)
        return estimate, estimate

    noises = np.zeros((*plan.noises_nq.shape, *x.shape), np.float32)
    for place, number in np.ndenumerate(plan.noises_nq):
        if number >= 0:
            noises[place] = step_noise[number]
    rows = StepInputs(plan.sigmas_n, plan.factors_nkj, noises)
    return run_scan(denoise, initial_carry(plan, x.astype(jnp.float32)), rows, both=plan.both)[0][0]


def start(noise: Any, sigma: Any, latents: Any = 0.0) -> Any:
    """Where sampling begins: the point at `sigma` on the line from `latents` to `noise`."""
    return sigma * noise + (1.0 - sigma) * latents
