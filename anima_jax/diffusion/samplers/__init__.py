"""Samplers under ComfyUI's names: each is a few formulas, and one step function in a `lax.scan` runs all of them.

Source: ComfyUI comfy/k_diffusion/sampling.py, for its flow model (`CONST` in comfy/model_sampling.py): the network's
velocity v gives the clean estimate D = x − σ·v.
Axes: n evaluations of the network, k arrays carried between them, j inputs of a step, q new noise arrays.
"""

import dataclasses
import functools
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from anima_jax.diffusion.samplers import ancestral, cfg_pp, dpm_solver, ode, sde
from anima_jax.diffusion.samplers.dpm_solver import StepController
from anima_jax.diffusion.samplers.options import Option, options_of, read_options
from anima_jax.diffusion.samplers.plan import Formulas, SamplerPlan, make_plan
from anima_jax.errors import UserError, shorten


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A row of `SAMPLERS`: a sampler's formulas and what else is specific to it."""

    formulas: Formulas
    without_penultimate: bool = False
    """Whether its schedules have one more step and no last level above 0."""

    brownian_path_on: Literal["cpu", "device"] | None = None
    """Where its noise, a Brownian path over the levels, is drawn: on the "cpu", or on the "device" that ComfyUI uses.

    None if its noise is not such a path.
    """

    ends_at: float = 0.0
    """Noise level that the result is assumed to have."""

    fresh_noise_outside_mask: bool = False
    """Whether inpainting adds different noise to the kept part than the noise from which sampling starts."""

    controller: type[StepController] | None = None
    """What chooses the sizes of its steps while it runs, if they depend on the image. `formulas` are one step then."""

    @functools.cached_property
    def options(self) -> Mapping[str, Option]:
        """The sampler's options by name."""
        return options_of(self.formulas) | (options_of(self.controller) if self.controller else {})


SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(ode.euler),
    "euler_cfg_pp": Sampler(cfg_pp.euler_cfg_pp),
    "euler_ancestral": Sampler(ancestral.euler_ancestral),
    "euler_ancestral_cfg_pp": Sampler(cfg_pp.euler_ancestral_cfg_pp),
    "heun": Sampler(ode.heun),
    "heunpp2": Sampler(ode.heunpp2),
    "exp_heun_2_x0": Sampler(functools.partial(sde.seeds_2, solver_type="phi_2", eta=0.0, r=1.0)),
    "exp_heun_2_x0_sde": Sampler(functools.partial(sde.seeds_2, solver_type="phi_2", r=1.0)),
    "dpm_2": Sampler(ode.dpm_2, without_penultimate=True),
    "dpm_2_ancestral": Sampler(ancestral.dpm_2_ancestral, without_penultimate=True),
    "lms": Sampler(ode.lms),
    "dpm_fast": Sampler(dpm_solver.dpm_fast),
    "dpm_adaptive": Sampler(dpm_solver.dpm_adaptive, controller=StepController),
    "dpmpp_2s_ancestral": Sampler(ancestral.dpmpp_2s_ancestral),
    "dpmpp_2s_ancestral_cfg_pp": Sampler(cfg_pp.dpmpp_2s_ancestral_cfg_pp),
    "dpmpp_sde": Sampler(sde.dpmpp_sde, brownian_path_on="cpu"),
    "dpmpp_sde_gpu": Sampler(sde.dpmpp_sde, brownian_path_on="device"),
    "dpmpp_2m": Sampler(ode.dpmpp_2m),
    "dpmpp_2m_cfg_pp": Sampler(cfg_pp.dpmpp_2m_cfg_pp),
    "dpmpp_2m_sde": Sampler(sde.dpmpp_2m_sde, brownian_path_on="cpu"),
    "dpmpp_2m_sde_gpu": Sampler(sde.dpmpp_2m_sde, brownian_path_on="device"),
    "dpmpp_2m_sde_heun": Sampler(functools.partial(sde.dpmpp_2m_sde, solver_type="heun"), brownian_path_on="cpu"),
    "dpmpp_2m_sde_heun_gpu": Sampler(
        functools.partial(sde.dpmpp_2m_sde, solver_type="heun"), brownian_path_on="device"
    ),
    "dpmpp_3m_sde": Sampler(sde.dpmpp_3m_sde, brownian_path_on="cpu"),
    "dpmpp_3m_sde_gpu": Sampler(sde.dpmpp_3m_sde, brownian_path_on="device"),
    "ddpm": Sampler(ancestral.ddpm),
    "lcm": Sampler(ancestral.lcm),
    "ipndm": Sampler(ode.ipndm),
    "ipndm_v": Sampler(ode.ipndm_v),
    "deis": Sampler(ode.deis),
    "cfgpp_ud10_ab": Sampler(cfg_pp.cfgpp_ud10_ab),
    "res_multistep": Sampler(ode.res_multistep),
    "res_multistep_cfg_pp": Sampler(cfg_pp.res_multistep_cfg_pp),
    "res_multistep_ancestral": Sampler(ancestral.res_multistep_ancestral),
    "res_multistep_ancestral_cfg_pp": Sampler(cfg_pp.res_multistep_ancestral_cfg_pp),
    "gradient_estimation": Sampler(ode.gradient_estimation),
    "gradient_estimation_cfg_pp": Sampler(cfg_pp.gradient_estimation_cfg_pp),
    "er_sde": Sampler(sde.er_sde),
    "seeds_2": Sampler(sde.seeds_2),
    "seeds_3": Sampler(sde.seeds_3),
    "sa_solver": Sampler(sde.sa_solver),
    "sa_solver_pece": Sampler(functools.partial(sde.sa_solver, use_pece=True)),
    "ddim": Sampler(ode.euler, fresh_noise_outside_mask=True),
    "uni_pc": Sampler(ode.uni_pc, without_penultimate=True, ends_at=ode.UNI_PC_LAST),
    "uni_pc_bh2": Sampler(ode.uni_pc_bh2, without_penultimate=True, ends_at=ode.UNI_PC_LAST),
}
"""ComfyUI's KSampler names, in its order."""

OPTIONS: tuple[str, ...] = tuple(dict.fromkeys(name for row in SAMPLERS.values() for name in row.options))
"""The names of all options."""


def check_options(sampler: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sampler's options as their types. Raises UserError for an unknown name and for an invalid value."""
    return read_options(sampler, SAMPLERS[sampler].options, options)


def sampler_plan(
    sampler: str, sigmas: np.ndarray, shift: float, options: Mapping[str, Any] = types.MappingProxyType({})
) -> SamplerPlan:
    """Return the plan of a sampler with these options along `sigmas`; for a sampler with a controller, of one step.

    Raises UserError if an option is not valid, or if there are no finite factors for these options and levels.
    """
    formulas, read = SAMPLERS[sampler].formulas, check_options(sampler, options)
    try:
        plan = make_plan(functools.partial(formulas, **_own(formulas, read)), sigmas, shift)
    except (ArithmeticError, ValueError):
        plan = None
    if plan is None or not np.isfinite(plan.factors_nkj).all():
        given = "".join(f", {name}={value}" for name, value in read.items())
        levels = shorten([f"{level:.4g}" for level in sigmas])
        raise UserError(f"sampler '{sampler}'{given}: no finite numbers at the noise levels {levels}")
    return plan


def controller(sampler: str, sigmas: np.ndarray, options: Mapping[str, Any]) -> StepController | None:
    """Return what chooses the sampler's steps while it runs, or None. Raises UserError if an option is not valid."""
    kind = SAMPLERS[sampler].controller
    return kind and kind(sigmas, **_own(kind, check_options(sampler, options)))


def _own(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those options that the function has."""
    return {name: value for name, value in options.items() if name in options_of(function)}


class StepInputs(NamedTuple):
    """Inputs of the step function at one evaluation; `run_scan` expects them with a leading axis of n evaluations."""

    sigma: Any
    factors_kj: Any
    noises_q: Any
    """Noise arrays, (q, …) with the shape of the latents, or the input from which `draw` makes them."""

    guidance: Any = None
    """Further inputs for evaluating the network, if any."""


Denoise = Callable[..., tuple[Any, ...]]
"""(x, inputs of the step, *memory) → the guided estimate of the clean latents, the negative prompt's own, *memory.

The memory is trees of arrays that an evaluation passes on to the next one; most have none.
"""


def run_scan(
    denoise: Denoise,
    carry: Sequence[Array],
    steps: StepInputs,
    *,
    both: bool,
    draw: Callable[[Any], Array] = jnp.asarray,
    memory: Sequence[Any] = (),
    part: Any = None,
) -> tuple[list[Array], Array, list[Any]]:
    """Run the evaluations in `steps`. Return the carried arrays, the point first, the last estimate, and the memory.

    `part` is the first of the evaluations that run and the one after the last, int (2,); None for all. One program
    serves all parts.
    """

    def step(index: Any, state: tuple[list[Array], Array, list[Any]]) -> Any:
        carry, _, memory = state
        inputs = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), steps)
        return run_step(denoise, carry, inputs, both=both, draw=draw, memory=memory)

    first, last = (0, len(steps.sigma)) if part is None else part
    return jax.lax.fori_loop(first, last, step, (list(carry), carry[0], list(memory)))


def run_step(
    denoise: Denoise,
    carry: Sequence[Array],
    inputs: StepInputs,
    *,
    both: bool,
    draw: Callable[[Any], Array] = jnp.asarray,
    memory: Sequence[Any] = (),
) -> tuple[list[Array], Array, list[Any]]:
    """Run one evaluation. Return what `run_scan` returns."""
    guided, unconditional, *memory = denoise(carry[0], inputs, *memory)
    arrays = [*carry, guided, *([unconditional] if both else []), *map(draw, inputs.noises_q)]
    # A matrix product would not be computed in float32 on every device.
    carry = [
        functools.reduce(operator.add, (factor * array for factor, array in zip(factors, arrays, strict=True)))
        for factors in inputs.factors_kj
    ]
    return carry, guided, list(memory)


def initial_carry(plan: SamplerPlan, x: Any) -> list[Any]:
    """Return the arrays carried into the first evaluation: `x`, then zeros."""
    return [x, *[np.zeros(x.shape, np.float32) for _ in range(plan.factors_nkj.shape[1] - 1)]]


def start(noise: Any, sigma: Any, latents: Any = 0.0) -> Any:
    """Return the point from which sampling starts: at `sigma` on the line from `latents` to `noise`."""
    return sigma * noise + (1.0 - sigma) * latents
