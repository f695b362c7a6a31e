"""One evaluation inside the sampling program: the network's rows, the estimates made from them, and guidance.

A row is one item of the network's batch: first all images with the negative prompt, unless that is left out, then all
images with their prompts. Regions have rows of their own (`sampling.region_rows`).
Axes: r rows, b images, p images with the negative prompt, then images with their prompts; l image tokens, n context
rows, c the 64 values of a token.
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
from anima_jax.sampling.control_networks import ControlInputs
from anima_jax.sampling.packing import every_eighth, grid_of, real_values, wrapped
from anima_jax.sampling.references import ReferenceTokens, join
from anima_jax.sampling.region_rows import EvaluatedRows, RegionRows, rows_of


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
    """Inputs that all evaluations share. `context` has the rows' prompts: the negative ones, then the others.

    Inside the program it has those of the prompts that are evaluated, as rows or as `KeysValues`. `noise_keys_b3`
    (uint32) are the keys of noise that JAX draws on the device; None if noise comes from torch's streams.
    """

    size_b3: Any
    context: Context
    variants: Variants = Variants()
    inpaint: InpaintMask | None = None
    noise_keys_b3: Any = None
    cache_limits: Limits | None = None
    controls: tuple[ControlInputs, ...] = ()
    references: ReferenceTokens | None = None
    regions: RegionRows | None = None

    @property
    def negatives(self) -> int:
        """The number of rows with the negative prompt."""
        return len(self.size_b3) if self.regions is None else len(self.regions.negative.image_r)


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """How the sampling program denoises with the network once.

    `options` are passed to `AnimaDiT.velocity`. Without the negative prompt, its estimate is taken to be the prompt's.
    The velocities of an image's rows with one kind of prompt are combined to those of the image.
    """

    model: AnimaDiT
    shared: SharedInputs
    with_negative: bool
    dtype: Any
    options: Mapping[str, Any]

    @property
    def prompts(self) -> int:
        """Kinds of prompts that are evaluated: negative ones and others."""
        return 1 + self.with_negative

    @property
    def rows(self) -> EvaluatedRows | None:
        """The rows of images with regions; None if each image has one row for each kind of prompt."""
        return self.shared.regions and self.shared.regions.evaluated(self.with_negative)

    @property
    def image_r(self) -> Array:
        """The image of each row."""
        images = len(self.shared.size_b3)
        return jnp.arange(images * self.prompts) % images if self.rows is None else self.rows.image_r

    def denoise(
        self, x_blc: Array, step: StepInputs, level: Modulations, momentum_blc: Array, cached: step_cache.State | None
    ) -> tuple[Array, Array, Array, step_cache.State | None]:
        """Return the guided estimate, that of the negative prompt, and what guidance and step cache remember."""
        inpaint = self.shared.inpaint
        if inpaint is not None:
            noisy_blc = samplers.start(inpaint.noise_blc, step.sigma, inpaint.latents_blc)
            x_blc = inpaint.mask_blc * x_blc + (1.0 - inpaint.mask_blc) * noisy_blc
        run = partial(self.velocities, x_blc, step, level)
        velocities_plc, cached = from_cache(cached, run, x_blc, step.sigma, self)
        both = self.estimates(x_blc, step, velocities_plc)
        # Without the negative prompt there is nothing to project: ComfyUI's APG would take it for zero.
        variants = self.shared.variants._replace(apg=self.shared.variants.apg & self.with_negative)
        out_blc, momentum_blc = guided(both, step.guidance, self.shared._replace(variants=variants), momentum_blc)
        if inpaint is not None:
            out_blc = inpaint.mask_blc * out_blc + (1.0 - inpaint.mask_blc) * inpaint.latents_blc
        return out_blc, both.negative, momentum_blc, cached

    def velocities(self, x_blc: Array, step: StepInputs, level: Modulations, **more: Any) -> Array:
        """Return the velocities (p, l, c) of each kind of prompt; `level` are the AdaLN values of the noise level."""
        x_rlc, size_r3 = self.seen(x_blc)
        context, lengths_r = self.shared.context
        controls = [own.term(step.sigma, self.image_r, self.rows) for own in self.shared.controls]
        options = {**self.options, "context_lengths_b": lengths_r, "remat": "none", "controls": controls, **more}
        x_rlc = wrapped(x_rlc.astype(self.dtype), size_r3)
        velocities_rlc = self.model.velocity(x_rlc, grid_of(size_r3), level, context, **options)[:, : x_blc.shape[1]]
        if self.shared.regions is None:
            return velocities_rlc
        return self.shared.regions.combined(velocities_rlc, x_blc, step.sigma)

    def seen(self, x_blc: Array) -> tuple[Array, Array]:
        """Return the tokens (r, l, c) and the sizes in latent pixels that the network sees in each row."""
        seen_blc, size_b3 = join(x_blc, self.shared.size_b3, self.shared.references)
        if self.rows is not None:
            return rows_of(seen_blc, self.rows), self.rows.size_r3
        return jnp.concatenate([seen_blc] * self.prompts), jnp.concatenate([size_b3] * self.prompts)

    def estimates(self, x_blc: Array, step: StepInputs, velocities_plc: Array) -> Estimates:
        """Return the clean images that the velocities lead to. Padding stays zero.

        So sums over tokens include only the image's own tokens.
        """
        real_blc = real_values(self.shared.size_b3, x_blc.shape[1])
        velocities = jnp.split(velocities_plc, self.prompts)
        negative_blc, positive_blc = (x_blc - step.sigma * real_blc * velocities[index] for index in (0, -1))
        return Estimates(x_blc, positive_blc, negative_blc, step.sigma)


def from_cache(
    cached: step_cache.State | None,
    run: Callable[..., Array],
    x_blc: Array,
    sigma: Array,
    denoiser: Denoiser,
) -> tuple[Array, step_cache.State | None]:
    """Return the velocities of `run()`, or of the step cache, and what that remembers; `run` takes `after_first`."""
    shared, length = denoiser.shared, x_blc.shape[1]
    limits = shared.cache_limits
    if cached is None or limits is None:
        return run(), None
    if isinstance(cached, EasyState):
        real_blc = real_values(shared.size_b3, length)
        compared_blc = real_blc & every_eighth(shared.size_b3, length)

        def replicated() -> Array:
            return constrain(run(), "nnn")

        compared = compared_blc, real_blc
        return step_cache.evaluate_easy(cached, limits, sigma, x_blc, *compared, replicated, denoiser.prompts)
    found: list[FirstBlockState] = []

    def after_first(before_rld: Array, after_rld: Array, rest: Callable[[Array], Array]) -> Array:
        # References and padding, which may follow, are not compared.
        own_r3 = denoiser.seen(x_blc)[1].at[:, 0].set(1)
        rows = real_values(own_r3, after_rld.shape[1])[..., 0], denoiser.image_r, len(shared.size_b3)
        out_rld, state = step_cache.run_after_first(cached, limits, sigma, before_rld, after_rld, *rows, rest)
        found.append(state)
        return out_rld

    return run(after_first=after_first), found[0]


def guided(
    estimates: Estimates, step: GuidanceInputs, shared: SharedInputs, momentum_blc: Array
) -> tuple[Array, Array]:
    """Return the guided estimate, and the guidance that APG remembers.

    Scale, variants and `restart` are numbers, or arrays (b, 1, 1).
    """
    # Also if no image has variants: an image's result must not depend on the others of its batch.
    plain_blc, on = guidance.guided(estimates, step.scale), jnp.asarray(shared.variants.are_on())

    def varied() -> tuple[Array, Array]:
        length = momentum_blc.shape[1]
        scale, variants, sigma = jax.tree.map(
            lambda value: jnp.reshape(value, (-1, 1, 1, 1, 1)), (step.scale, shared.variants, estimates.sigma)
        )
        past_blc = jnp.where(step.restart, 0.0, momentum_blc)
        x, positive, negative, past, real = (
            array_blc.reshape(*momentum_blc.shape[:2], PATCH, PATCH, -1)
            for array_blc in (*estimates[:3], past_blc, real_values(shared.size_b3, length))
        )
        columns_bl = token_positions(grid_of(shared.size_b3), length)[..., 2]
        out, momentum = guidance.guided_by_variants(
            Estimates(x, positive, negative, sigma), scale, variants, past, columns_bl, real
        )
        return out.reshape(momentum_blc.shape), momentum.reshape(momentum_blc.shape)

    varied_blc, varied_momentum_blc = jax.lax.cond(jnp.any(on), varied, lambda: (plain_blc, momentum_blc))
    return jnp.where(on, varied_blc, plain_blc), jnp.where(on, varied_momentum_blc, momentum_blc)
