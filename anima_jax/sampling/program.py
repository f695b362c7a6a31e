"""A batch of latents from noise: the transformer, guidance and a sampler in one jitted program.

The program depends on the number of tokens and pictures, on how much a sampler carries along and, where nobody watches,
on the number of evaluations. All else are its arguments: prompts, sizes, noise levels, guidance, the parameters.
Axes: b batch, l image tokens, n context rows, d features, c the 64 values of a token.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from anima_jax.diffusion import guidance, samplers
from anima_jax.diffusion.samplers import StepInputs
from anima_jax.diffusion.samplers.plan import Draw, Plan
from anima_jax.models.constraints import constrain
from anima_jax.models.dit import AnimaDiT
from anima_jax.models.parameters import Params, merge
from anima_jax.parallel.mesh import replicate


class Context(NamedTuple):
    """Prompts as the transformer takes them. `lengths_b` is None unless there are more than 512 rows."""

    rows_bnd: Any
    lengths_b: Any


class GuidanceInputs(NamedTuple):
    """Of an evaluation: the guidance scale, and whether the negative prompt takes part."""

    scale: Any
    both: Any


class InpaintMask(NamedTuple):
    """Inpainting: latents that stay where the mask is 0, and the noise that goes with them."""

    mask_blc: Any
    latents_blc: Any
    noise_blc: Any


class SharedInputs(NamedTuple):
    """What all evaluations share. The contexts are the negative prompts' and then the prompts': 2b of them.

    `noise_keys_b3` (uint32) is what JAX's noise is drawn from; None for noise that comes with the rows.
    """

    grid_b3: Any
    context: Context
    zero_star: Any
    kept: InpaintMask | None = None
    noise_keys_b3: Any = None


StepCallback = Callable[[int, int, Array], None]
"""Told how many evaluations are done, of how many, and the clean estimate (b, l, c) of the last."""


def sample(
    params: Params,
    graphdef: nnx.GraphDef,
    dtype: Any,
    plan: Plan,
    start_blc: np.ndarray,
    batch: SharedInputs,
    scale_n: np.ndarray,
    noise: Callable[[Draw], np.ndarray] | None = None,
    watch: StepCallback | None = None,
) -> np.ndarray:
    """The plan's result (b, l, c), float32. `noise` gives each of its draws, (b, l, c), in order.

    Nothing waits for the host, unless `watch` is given: then it is told of every evaluation while the next one runs.
    """
    count = len(plan.sigmas_n)
    carried = replicate(samplers.initial_carry(plan, start_blc))
    batch = replicate(batch)
    running = start_blc
    for first in range(count) if watch else [0]:
        rows = _rows(plan, slice(first, first + 1 if watch else count), start_blc.shape, scale_n, noise)
        carried, estimate = advance(
            params, carried, replicate(rows), batch, graphdef=graphdef, both=plan.both, dtype=dtype
        )
        if watch:
            watch(first, count, jax.block_until_ready(running))
            running = estimate
    if watch:
        watch(count, count, jax.block_until_ready(running))
    return np.asarray(carried[0])


def _rows(plan: Plan, part: slice, shape: tuple[int, ...], scale_n: np.ndarray, noise) -> StepInputs:
    """These evaluations' rows, with their noises, or with the numbers of those that the program draws itself."""
    noises_nq = plan.noises_nq[part]
    if noise is not None:
        numbers, noises_nq = noises_nq, np.zeros((*noises_nq.shape, *shape), np.float32)
        for place, number in np.ndenumerate(numbers):
            if number >= 0:
                noises_nq[place] = noise(plan.draws[number])
    guided = GuidanceInputs(scale_n[part], (scale_n[part] != 1.0) | plan.both)
    return StepInputs(plan.sigmas_n[part], plan.factors_nkj[part], noises_nq, guided)


@functools.partial(jax.jit, static_argnames=("graphdef", "both", "dtype"), donate_argnames=("carried",))
def advance(
    params: Params,
    carried: list[Array],
    rows: StepInputs,
    batch: SharedInputs,
    *,
    graphdef: nnx.GraphDef,
    both: bool,
    dtype: Any,
) -> tuple[list[Array], Array]:
    """The evaluations of `rows`: what is carried on, and the last clean estimate."""
    model: AnimaDiT = merge(graphdef, params)
    length = carried[0].shape[1]
    real_bl1 = (jnp.arange(length) < jnp.prod(batch.grid_b3, axis=1)[:, None])[..., None]
    grids = jnp.concatenate([batch.grid_b3, batch.grid_b3])

    def velocity(x_blc: Array, sigma: Array, prompts: slice) -> Array:
        rows_bnd, lengths_b = jax.tree.map(lambda part: part[prompts], batch.context)
        times_b = jnp.full(len(x_blc), sigma)
        return model.velocity(x_blc.astype(dtype), grids[prompts], times_b, rows_bnd, context_lengths_b=lengths_b)

    def estimates(x_blc: Array, row: StepInputs) -> tuple[Array, Array]:
        """With the prompt and with the negative one, in one evaluation; or with the prompt alone, for both."""

        def pair(x_blc):
            negative, positive = jnp.split(velocity(jnp.concatenate([x_blc, x_blc]), row.sigmas_n, slice(None)), 2)
            return positive, negative

        def alone(x_blc):
            return (velocity(x_blc, row.sigmas_n, slice(len(x_blc), None)),) * 2

        velocities = jax.lax.cond(row.guidance_n.both, pair, alone, x_blc)
        # Padding stays zero, so that sums over tokens are over a picture's own.
        positive_blc, negative_blc = (x_blc - row.sigmas_n * real_bl1 * velocity_blc for velocity_blc in velocities)
        return positive_blc, negative_blc

    def denoise(x_blc: Array, row: StepInputs) -> tuple[Array, Array]:
        kept = batch.kept
        if kept is not None:
            noisy_blc = samplers.start(kept.noise_blc, row.sigmas_n, kept.latents_blc)
            x_blc = kept.mask_blc * x_blc + (1.0 - kept.mask_blc) * noisy_blc
        positive_blc, negative_blc = estimates(x_blc, row)
        out_blc = guidance.guided(x_blc, positive_blc, negative_blc, row.guidance_n.scale, batch.zero_star)
        if kept is not None:
            out_blc = kept.mask_blc * out_blc + (1.0 - kept.mask_blc) * kept.latents_blc
        return out_blc, negative_blc

    def draw(number_or_noise: Array) -> Array:
        if batch.noise_keys_b3 is None:
            return number_or_noise
        return real_bl1 * _jax_noise(batch.noise_keys_b3, number_or_noise, carried[0].shape[1:])

    # On a mesh the network shares out pictures and tokens; what it gives every device has whole.
    return jax.tree.map(
        lambda x_blc: constrain(x_blc, "nnn"), samplers.run_scan(denoise, carried, rows, both=both, draw=draw)
    )


def _jax_noise(keys_b3: Array, number: Array, shape: tuple[int, ...]) -> Array:
    """The noise of this number, of each picture's own key: in token order, so that padding changes nothing."""

    def one(key_3):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(key_3[0]), key_3[1]), key_3[2])
        return jax.random.normal(jax.random.fold_in(key, number), shape, jnp.float32)

    return jax.vmap(one)(keys_b3)
