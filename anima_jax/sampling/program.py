"""Sampling of a batch of latents from noise: transformer, guidance and sampler in one jitted program.

The program depends on the number of tokens and images, on the number of arrays that the sampler carries between
evaluations and, without a progress callback, on the number of evaluations. Everything else is an argument: prompts,
sizes, noise levels, guidance, the network's parameters.
Axes: b batch, l image tokens, n context rows, d features, c the 64 values of a token. In the arrays of a sampler's
plan, n is evaluations of the network instead, and q new noise arrays.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from anima_jax.diffusion import guidance, samplers
from anima_jax.diffusion.guidance import Estimates, Variants
from anima_jax.diffusion.samplers import StepInputs
from anima_jax.diffusion.samplers.plan import Draw, SamplerPlan
from anima_jax.models.constraints import constrain
from anima_jax.models.dit import PATCH, AnimaDiT, token_positions
from anima_jax.models.parameters import Params, merge
from anima_jax.parallel.mesh import replicate
from anima_jax.sampling.callbacks import ProgressCallback
from anima_jax.sampling.context import Context
from anima_jax.sampling.finite import all_finite
from anima_jax.sampling.packing import TokenPacking, grid_of, real_values, wrapped


class GuidanceInputs(NamedTuple):
    """Guidance at one evaluation: its scale, whether the negative prompt is evaluated, whether APG forgets the past."""

    scale: Any
    both: Any
    restart: Any


class Carry(NamedTuple):
    """What one evaluation passes on to the next: the sampler's arrays, the point first, and the guidance of APG."""

    arrays: list[Any]
    momentum_blc: Any


class InpaintMask(NamedTuple):
    """Inpainting: the mask, the latents that are kept where it is 0, and the noise added to them at each level."""

    mask_blc: Any
    latents_blc: Any
    noise_blc: Any


class SharedInputs(NamedTuple):
    """Inputs that all evaluations share. `context` has 2b items: the negative prompts, then the prompts.

    `noise_keys_b3` (uint32) are the keys of noise that JAX draws on the device; None if noise comes from torch's
    streams.
    """

    size_b3: Any
    context: Context
    variants: Variants = Variants()
    inpaint: InpaintMask | None = None
    noise_keys_b3: Any = None


def sample(
    params: Params,
    graphdef: nnx.GraphDef[Any],
    dtype: Any,
    plan: SamplerPlan,
    packing: TokenPacking,
    start: Sequence[np.ndarray],
    shared: SharedInputs,
    scale_n: np.ndarray,
    step_noise: Callable[[Draw], Sequence[np.ndarray]] | None = None,
    callback: ProgressCallback | None = None,
) -> list[np.ndarray]:
    """Run the plan from `start` and return each image's latents (t, y, x, c), float32.

    `step_noise` is called for each of the plan's draws in order and returns one array per image; it is not used if
    there are `noise_keys_b3`. Without `callback` all evaluations run in one call that never waits for the host. With it
    each evaluation is a separate call, and the callback for one runs while the device computes the next.
    """
    total = len(plan.sigmas_n)
    start_blc = packing.pack(start)
    noise = None if step_noise is None or shared.noise_keys_b3 is not None else step_noise

    def run(carry: Carry, part: slice) -> tuple[Carry, Array]:
        steps = replicate(step_inputs(plan, part, scale_n, packing, noise))
        return advance(params, carry, steps, replicated, graphdef=graphdef, both=plan.both, dtype=dtype)

    carry = replicate(Carry(samplers.initial_carry(plan, start_blc), np.zeros_like(start_blc)))
    replicated = replicate(shared)
    if callback is None:
        carry, _ = run(carry, slice(0, total))
        return packing.unpack(carry.arrays[0])
    finished: Any = start_blc, True
    for index in range(total):
        carry, estimate_blc = run(carry, slice(index, index + 1))
        report(callback, index, total, finished, packing)
        finished = estimate_blc, all_finite(estimate_blc)
    report(callback, total, total, finished, packing)
    return packing.unpack(carry.arrays[0])


def step_inputs(
    plan: SamplerPlan,
    part: slice,
    scale_n: np.ndarray,
    packing: TokenPacking,
    noise: Callable[[Draw], Sequence[np.ndarray]] | None,
    before: float = -np.inf,
) -> StepInputs:
    """Return the inputs of these evaluations; noise as arrays, or as numbers of draws if `noise` is None.

    `before` is the level of the evaluation before the plan, if there was one.
    """
    draws_nq = plan.draw_numbers_nq[part]
    noises_nqblc = draws_nq
    if noise is not None:
        noises_nqblc = np.zeros((*draws_nq.shape, *packing.shape), np.float32)
        for index, number in np.ndenumerate(draws_nq):
            if number >= 0:
                noises_nqblc[index] = packing.pack(noise(plan.draws[number]))
    rising_n = np.diff(plan.sigmas_n, prepend=before) > 0
    guided = GuidanceInputs(scale_n[part], (scale_n[part] != 1.0) | plan.both, rising_n[part])
    return StepInputs(plan.sigmas_n[part], plan.factors_nkj[part], noises_nqblc, guided)


def report(callback: ProgressCallback, done: int, total: int, finished: tuple[Any, Any], packing: TokenPacking) -> None:
    """Call `callback` once the estimate is computed. Raises FloatingPointError if it has values that are not finite.

    `finished` is the estimate, and `all_finite` of it: computed before the next evaluation, for which it never waits.
    """
    estimate_blc, is_finite = finished
    if not is_finite:
        raise FloatingPointError(f"evaluation {done} of {total}")
    jax.block_until_ready(estimate_blc)
    callback(done, total, lambda: packing.unpack(estimate_blc))


@partial(jax.jit, static_argnames=("graphdef", "both", "dtype"), donate_argnames=("carry",))
def advance(
    params: Params,
    carry: Carry,
    steps: StepInputs,
    shared: SharedInputs,
    *,
    graphdef: nnx.GraphDef[Any],
    both: bool,
    dtype: Any,
) -> tuple[Carry, Array]:
    """Run the evaluations in `steps`. Return what they pass on and the last clean estimate."""
    model: AnimaDiT = merge(graphdef, params)
    length = carry.momentum_blc.shape[1]
    real_blc = real_values(shared.size_b3, length)
    sizes = jnp.concatenate([shared.size_b3, shared.size_b3])

    def velocity(x_blc: Array, sigma: Array, prompts: slice) -> Array:
        context_bnd, lengths_b = jax.tree.map(lambda leaf: leaf[prompts], shared.context)
        times_b = jnp.full(len(x_blc), sigma)
        x_blc = wrapped(x_blc.astype(dtype), sizes[prompts])
        grid_b3 = grid_of(sizes[prompts])
        return model.velocity(x_blc, grid_b3, times_b, context_bnd, context_lengths_b=lengths_b)

    def estimates(x_blc: Array, step: StepInputs) -> tuple[Array, Array]:
        """Return the estimates with the prompt and the negative prompt: the former twice unless both are needed."""

        def pair(x_blc: Array) -> tuple[Array, Array]:
            negative, positive = jnp.split(velocity(jnp.concatenate([x_blc, x_blc]), step.sigma, slice(None)), 2)
            return positive, negative

        def prompt_only(x_blc: Array) -> tuple[Array, Array]:
            positive = velocity(x_blc, step.sigma, slice(len(x_blc), None))
            return positive, positive

        velocities = jax.lax.cond(step.guidance.both, pair, prompt_only, x_blc)
        # Padding stays zero, so sums over tokens include only the image's own tokens.
        positive_blc, negative_blc = (x_blc - step.sigma * real_blc * velocity_blc for velocity_blc in velocities)
        return positive_blc, negative_blc

    def denoise(x_blc: Array, step: StepInputs, momentum_blc: Array) -> tuple[Array, Array, Array]:
        inpaint = shared.inpaint
        if inpaint is not None:
            noisy_blc = samplers.start(inpaint.noise_blc, step.sigma, inpaint.latents_blc)
            x_blc = inpaint.mask_blc * x_blc + (1.0 - inpaint.mask_blc) * noisy_blc
        positive_blc, negative_blc = estimates(x_blc, step)
        both = Estimates(x_blc, positive_blc, negative_blc, step.sigma)
        out_blc, momentum_blc = guided(both, step.guidance, shared, momentum_blc)
        if inpaint is not None:
            out_blc = inpaint.mask_blc * out_blc + (1.0 - inpaint.mask_blc) * inpaint.latents_blc
        return out_blc, negative_blc, momentum_blc

    def draw(number_or_noise: Array) -> Array:
        if shared.noise_keys_b3 is None:
            return number_or_noise
        return real_blc * _jax_noise(shared.noise_keys_b3, number_or_noise, carry.momentum_blc.shape[1:])

    arrays, estimate_blc, (momentum_blc,) = samplers.run_scan(
        denoise, carry.arrays, steps, both=both, draw=draw, memory=[carry.momentum_blc]
    )
    # On a mesh the network shards images and tokens; the results are replicated on every device.
    return jax.tree.map(lambda x_blc: constrain(x_blc, "nnn"), (Carry(arrays, momentum_blc), estimate_blc))


def guided(
    estimates: Estimates, step: GuidanceInputs, shared: SharedInputs, momentum_blc: Array
) -> tuple[Array, Array]:
    """Return the guided estimate, and the guidance that APG remembers."""
    # Without the negative prompt there is nothing to project: ComfyUI's APG would take it for zero.
    variants = shared.variants._replace(apg=shared.variants.apg & step.both)

    def varied() -> tuple[Array, Array]:
        length = momentum_blc.shape[1]
        past_blc = jnp.where(step.restart, 0.0, momentum_blc)
        x, positive, negative, past, real = (
            array_blc.reshape(*momentum_blc.shape[:2], PATCH, PATCH, -1)
            for array_blc in (*estimates[:3], past_blc, real_values(shared.size_b3, length))
        )
        columns_bl = token_positions(grid_of(shared.size_b3), length)[..., 2]
        out, momentum = guidance.guided_by_variants(
            Estimates(x, positive, negative, estimates.sigma), step.scale, variants, past, columns_bl, real
        )
        return out.reshape(momentum_blc.shape), momentum.reshape(momentum_blc.shape)

    def plain() -> tuple[Array, Array]:
        return guidance.guided(estimates, step.scale), momentum_blc

    return jax.lax.cond(variants.are_on(), varied, plain)


def _jax_noise(keys_b3: Array, number: Array, shape: tuple[int, ...]) -> Array:
    """Return noise (b, *shape) from each image's own key, in token order so that padding does not change it."""

    def one(key_3: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(key_3[0]), key_3[1]), key_3[2])
        return jax.random.normal(jax.random.fold_in(key, number), shape, jnp.float32)

    return jax.vmap(one)(keys_b3)
