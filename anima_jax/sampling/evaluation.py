"""One evaluation inside the sampling program: the network's rows, the estimates made from them, and guidance.

A row is one item of the network's batch: first all images with the negative prompt, unless that is left out, then all
images with their prompts.
Axes: r rows, b images, l image tokens, n context rows, c the 64 values of a token.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from anima_jax.diffusion import guidance, samplers, step_cache
from anima_jax.diffusion.guidance import Estimates, Variants
from anima_jax.diffusion.samplers import StepInputs
from anima_jax.diffusion.step_cache import EasyState, FirstBlockState, Limits
from anima_jax.models.constraints import constrain
from anima_jax.models.dit import PATCH, AnimaDiT, token_positions
from anima_jax.models.dit_inputs import Modulations
from anima_jax.sampling.context import Context
from anima_jax.sampling.packing import every_eighth, grid_of, real_values, wrapped
from anima_jax.sampling.references import ReferenceTokens, join


class GuidanceInputs(NamedTuple):
    """Guidance at one evaluation: its scale, whether APG forgets the past, and the evaluation's number in the plan."""

    scale: Any
    restart: Any
    number: Any


class InpaintMask(NamedTuple):
    """Inpainting: the mask, the latents that are kept where it is 0, and the noise added to them at each level."""

    mask_blc: Any
    latents_blc: Any
    noise_blc: Any


class SharedInputs(NamedTuple):
    """Inputs that all evaluations share. `context` has 2b items: the negative prompts, then the prompts.

    Inside the program it has those of the prompts that are evaluated, as rows or as `KeysValues`. `noise_keys_b3`
    (uint32) are the keys of noise that JAX draws on the device; None if noise comes from torch's streams.
    """

    size_b3: Any
    context: Context
    variants: Variants = Variants()
    inpaint: InpaintMask | None = None
    noise_keys_b3: Any = None
    cache_limits: Limits | None = None
    references: ReferenceTokens | None = None


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """How the sampling program denoises with the network once.

    `options` are passed to `AnimaDiT.velocity`. Without the negative prompt, its estimate is taken to be the prompt's.
    """

    model: AnimaDiT
    shared: SharedInputs
    with_negative: bool
    dtype: Any
    options: Mapping[str, Any]

    @property
    def prompts(self) -> int:
        """Rows of each image."""
        return 1 + self.with_negative

    def denoise(
        self, x_blc: Array, step: StepInputs, level: Modulations, momentum_blc: Array, cached: step_cache.State | None
    ) -> tuple[Array, Array, Array, step_cache.State | None]:
        """Return the guided estimate, that of the negative prompt, and what guidance and step cache remember."""
        inpaint = self.shared.inpaint
        if inpaint is not None:
            noisy_blc = samplers.start(inpaint.noise_blc, step.sigma, inpaint.latents_blc)
            x_blc = inpaint.mask_blc * x_blc + (1.0 - inpaint.mask_blc) * noisy_blc
        run = partial(self.velocities, x_blc, step, level)
        velocities_rlc, cached = from_cache(cached, run, x_blc, step.sigma, self.shared, self.prompts)
        both = self.estimates(x_blc, step, velocities_rlc)
        # Without the negative prompt there is nothing to project: ComfyUI's APG would take it for zero.
        variants = self.shared.variants._replace(apg=self.shared.variants.apg & self.with_negative)
        out_blc, momentum_blc = guided(both, step.guidance, self.shared._replace(variants=variants), momentum_blc)
        if inpaint is not None:
            out_blc = inpaint.mask_blc * out_blc + (1.0 - inpaint.mask_blc) * inpaint.latents_blc
        return out_blc, both.negative, momentum_blc, cached

    def velocities(self, x_blc: Array, step: StepInputs, level: Modulations, **more: Any) -> Array:
        """Return the network's velocities (r, l, c) of all rows; `level` are the AdaLN values of the noise level."""
        seen_blc, size_b3 = join(x_blc, self.shared.size_b3, self.shared.references)
        size_r3 = jnp.concatenate([size_b3] * self.prompts)
        x_rlc = wrapped(jnp.concatenate([seen_blc] * self.prompts).astype(self.dtype), size_r3)
        context, lengths_r = self.shared.context
        options = {**self.options, "context_lengths_b": lengths_r, "remat": "none", **more}
        return self.model.velocity(x_rlc, grid_of(size_r3), level, context, **options)[:, : x_blc.shape[1]]

    def estimates(self, x_blc: Array, step: StepInputs, velocities_rlc: Array) -> Estimates:
        """Return the clean images that the rows' velocities lead to. Padding stays zero.

        So sums over tokens include only the image's own tokens.
        """
        real_blc = real_values(self.shared.size_b3, x_blc.shape[1])
        velocities = jnp.split(velocities_rlc, self.prompts)
        negative_blc, positive_blc = (x_blc - step.sigma * real_blc * velocities[index] for index in (0, -1))
        return Estimates(x_blc, positive_blc, negative_blc, step.sigma)


def from_cache(
    cached: step_cache.State | None,
    run: Callable[..., Array],
    x_blc: Array,
    sigma: Array,
    shared: SharedInputs,
    prompts: int,
) -> tuple[Array, step_cache.State | None]:
    """Return the velocities of `run()`, or of the step cache, and what that remembers; `run` takes `after_first`."""
    limits, length = shared.cache_limits, x_blc.shape[1]
    if cached is None or limits is None:
        return run(), None
    real_blc = real_values(shared.size_b3, length)
    if isinstance(cached, EasyState):
        compared_blc = real_blc & every_eighth(shared.size_b3, length)

        def replicated() -> Array:
            return constrain(run(), "nnn")

        return step_cache.evaluate_easy(cached, limits, sigma, x_blc, compared_blc, real_blc, replicated, prompts)
    found: list[FirstBlockState] = []

    def after_first(before_bld: Array, after_bld: Array, rest: Callable[[Array], Array]) -> Array:
        # References and padding, which may follow, are not compared.
        real_bl = jnp.pad(real_blc[..., 0], ((0, 0), (0, before_bld.shape[1] - length)))
        out_bld, state = step_cache.run_after_first(cached, limits, sigma, before_bld, after_bld, real_bl, rest)
        found.append(state)
        return out_bld

    return run(after_first=after_first), found[0]


def guided(
    estimates: Estimates, step: GuidanceInputs, shared: SharedInputs, momentum_blc: Array
) -> tuple[Array, Array]:
    """Return the guided estimate, and the guidance that APG remembers."""

    def varied() -> tuple[Array, Array]:
        length = momentum_blc.shape[1]
        past_blc = jnp.where(step.restart, 0.0, momentum_blc)
        x, positive, negative, past, real = (
            array_blc.reshape(*momentum_blc.shape[:2], PATCH, PATCH, -1)
            for array_blc in (*estimates[:3], past_blc, real_values(shared.size_b3, length))
        )
        columns_bl = token_positions(grid_of(shared.size_b3), length)[..., 2]
        out, momentum = guidance.guided_by_variants(
            Estimates(x, positive, negative, estimates.sigma), step.scale, shared.variants, past, columns_bl, real
        )
        return out.reshape(momentum_blc.shape), momentum.reshape(momentum_blc.shape)

    def plain() -> tuple[Array, Array]:
        return guidance.guided(estimates, step.scale), momentum_blc

    return jax.lax.cond(shared.variants.are_on(), varied, plain)
