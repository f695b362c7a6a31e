"""The programs of a pool: one evaluation for all of its slots, and what puts an image into a slot and takes it out.

A slot is one image's place in the arrays of a pool. At every evaluation each image has its own noise level, factors,
guidance and noise, whatever its sampler and its number of steps. A row is one item of the network's batch: an image
with guidance has two, of its negative prompt and its prompt, one without has one. The network runs over `rows_at_once`
rows at a time, as often as there are rows: so the program is the same however many images there are, no row is computed
for an empty slot, and an image's arithmetic depends neither on its slot nor on the other images.
Axes: b slots, r rows, l image tokens, c the 64 values of a token, k carried arrays, j inputs of a step, q noise arrays,
p prompts (two of each slot, the negative one first), n context rows, d features, x control networks, e width of their
embeddings.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from anima_jax.adapters.rows import with_rows
from anima_jax.compiler import compiler_options
from anima_jax.diffusion import samplers
from anima_jax.diffusion.guidance import Variants
from anima_jax.diffusion.samplers import StepInputs
from anima_jax.models.constraints import constrain
from anima_jax.models.control import ControlNetwork
from anima_jax.models.dit_inputs import Modulations
from anima_jax.models.parameters import Params, merge
from anima_jax.sampling.context import Context
from anima_jax.sampling.evaluation import Denoiser, GuidanceInputs, InpaintMask, SharedInputs
from anima_jax.sampling.packing import grid_of, real_values, wrapped
from anima_jax.sampling.program import Carry, jax_noise, with_shardings

LEVELS = 16
"""Noise levels of an image whose AdaLN values are computed together and are on the device at a time."""

PROMPTS = 2
"""Prompts of a slot."""


class Stored(NamedTuple):
    """What stays on the device while an image is in its slot."""

    inpaint: InpaintMask
    context: Context
    """Keys and values, or context rows, of the prompts; their lengths come with each evaluation."""
    modulations: Modulations
    """AdaLN values of `LEVELS` levels of each slot, one slot after the other."""
    embeddings: tuple[Array, ...]
    """What the control networks made of each slot's picture, (b, l, e)."""


class SlotInputs(NamedTuple):
    """The numbers of one evaluation, made on the host. Those of empty slots are zeros.

    `number_b` counts the evaluations of an image. `draw_qb` are the numbers of noise arrays that JAX draws from
    `keys_b3`, for the slots where `on_device_b`. `lengths_p` are None unless prompts have more than 512 rows.
    """

    size_b3: Any
    sigma_b: Any
    scale_b: Any
    restart_b: Any
    number_b: Any
    factors_kjb: Any
    variants: Variants
    draw_qb: Any
    keys_b3: Any
    on_device_b: Any
    lengths_p: Any
    strength_xb: Any
    """Strengths of the control networks x, 0 where one does not act."""
    slot_r: Any
    prompt_r: Any
    negative_b: Any
    """The row with the negative prompt; without guidance that of the prompt."""
    positive_b: Any
    chunks: Any
    """How often the network runs, each time over `rows_at_once` rows."""


class NewImage(NamedTuple):
    """What an image brings into its slot: the point from which it starts, its mask, prompts and control pictures."""

    start_lc: Any
    inpaint: InpaintMask
    context: Context
    embeddings: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class SlotDenoiser(Denoiser):
    """The denoiser of a pool: each image has its own level, and its rows are where the inputs say."""

    inputs: SlotInputs
    stored: Stored
    networks: Sequence[ControlNetwork]
    rows_at_once: int

    def velocities(self, x_blc: Array, step: StepInputs, level: Modulations, **more: Any) -> Array:
        """Return the velocities with the negative prompts, then those with the prompts; `level` is of all slots."""
        inputs, size_b3 = self.inputs, self.shared.size_b3
        x_blc, grid_b3 = wrapped(x_blc.astype(self.dtype), size_b3), grid_of(size_b3)
        context, lengths_p = self.stored.context[0], inputs.lengths_p

        def run(chunk: Any, velocities_rlc: Array) -> Array:
            first = chunk * self.rows_at_once
            slot_r, prompt_r = (
                jax.lax.dynamic_slice_in_dim(row, first, self.rows_at_once) for row in (inputs.slot_r, inputs.prompt_r)
            )
            level_r = slot_r * LEVELS + inputs.number_b[slot_r] % LEVELS
            steering = zip(self.networks, self.stored.embeddings, inputs.strength_xb, strict=True)
            own_rlc = with_rows(self.model, slot_r).velocity(
                x_blc[slot_r],
                grid_b3[slot_r],
                level.of_examples(level_r),
                context,
                prompt_b=prompt_r,
                context_lengths_b=None if lengths_p is None else lengths_p[prompt_r],
                remat="none",
                controls=[(network, own[slot_r], strength_b[slot_r]) for network, own, strength_b in steering],
                **self.options,
                **more,
            )
            return jax.lax.dynamic_update_slice_in_dim(velocities_rlc, constrain(own_rlc, "nnn"), first, 0)

        zeros_rlc = jnp.zeros((len(inputs.slot_r), *x_blc.shape[1:]), jnp.float32)
        velocities_rlc = jax.lax.fori_loop(0, inputs.chunks, run, zeros_rlc)
        return velocities_rlc[jnp.concatenate([inputs.negative_b, inputs.positive_b])]


def evaluate(
    params: Params,
    carry: Carry,
    stored: Stored,
    inputs: SlotInputs,
    noises_qblc: Array,
    networks: tuple[Params, ...],
    *,
    graphdef: nnx.GraphDef[Any],
    network_graphdefs: tuple[nnx.GraphDef[Any], ...],
    dtype: Any,
    rows_at_once: int,
    zero_context: int,
) -> tuple[Carry, Array, Array]:
    """Run one evaluation of each slot. Return what it passes on, the clean estimates, and which slots are finite.

    `noises_qblc` are those that the host has drawn, `networks` the parameters of the control networks. `zero_context`
    is the number of zero rows after the context's.
    """

    def of_images(value_b: Any) -> Array:
        return value_b[..., None, None]

    shared = SharedInputs(
        inputs.size_b3, stored.context, jax.tree.map(of_images, inputs.variants), stored.inpaint, inputs.keys_b3
    )
    options = {"padded": True, "zero_context": zero_context}
    controls = [merge(one, own) for one, own in zip(network_graphdefs, networks, strict=True)]
    own = inputs, stored, controls, rows_at_once
    denoiser = SlotDenoiser(merge(graphdef, params), shared, True, dtype, options, *own)
    guided = GuidanceInputs(of_images(inputs.scale_b), of_images(inputs.restart_b), inputs.number_b)
    noises = list(zip(noises_qblc, inputs.draw_qb, strict=True))
    step = StepInputs(of_images(inputs.sigma_b), of_images(inputs.factors_kjb), noises, guided)
    length = carry.momentum_blc.shape[1]

    def draw(given: tuple[Array, Array]) -> Array:
        noise_blc, number_b = given

        def on_device() -> Array:
            drawn_blc = real_values(inputs.size_b3, length) * jax_noise(inputs.keys_b3, number_b, noise_blc.shape[1:])
            return jnp.where(of_images(inputs.on_device_b & (number_b >= 0)), drawn_blc, noise_blc)

        return jax.lax.cond(jnp.any(inputs.on_device_b), on_device, lambda: noise_blc)

    def denoise(x_blc: Array, step: StepInputs, momentum_blc: Array) -> tuple[Array, ...]:
        return denoiser.denoise(x_blc, step, stored.modulations, momentum_blc, None)[:3]

    arrays, estimate_blc, (momentum_blc,) = samplers.run_step(
        denoise, carry.arrays, step, both=True, draw=draw, memory=[carry.momentum_blc]
    )
    finite_b = jnp.isfinite(estimate_blc).all((1, 2)) & jnp.isfinite(arrays[0]).all((1, 2))
    return with_shardings(Carry(arrays, momentum_blc)), constrain(estimate_blc, "nnn"), constrain(finite_b, "n")


def empty(new: NewImage, levels: Modulations, slots: int, carried: int) -> tuple[Carry, Stored]:
    """Return the arrays of empty slots, given the shapes of what one image brings and of `LEVELS` levels."""

    def zeros(own: Any, axis: int = 0) -> Array:
        return jnp.zeros((*own.shape[:axis], slots * own.shape[axis], *own.shape[axis + 1 :]), own.dtype)

    image_blc = jnp.zeros((slots, *new.start_lc.shape), jnp.float32)
    context = jax.tree.map(lambda own: zeros(own, int(len(own.shape) == 5)), new.context)
    blocks = tuple(zeros(own, 1) for own in levels.blocks)
    embeddings = tuple(jnp.zeros((slots, *own.shape), own.dtype) for own in new.embeddings)
    stored = Stored(InpaintMask(*[image_blc] * 3), context, Modulations(blocks, zeros(levels.final)), embeddings)
    return with_shardings(Carry([image_blc] * carried, image_blc)), placed(stored)


def enter(carry: Carry, stored: Stored, new: NewImage, slot: Array) -> tuple[Carry, Stored]:
    """Return the arrays with a new image in a slot. What an earlier image has left there is overwritten."""

    def put(array: Array, own: Any, axis: int = 0) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(array, own, slot * own.shape[axis], axis)

    zeros_1lc = jnp.zeros_like(new.start_lc)[None]
    arrays = [put(carry.arrays[0], new.start_lc[None]), *(put(array, zeros_1lc) for array in carry.arrays[1:])]
    inpaint = InpaintMask(*(put(array, own[None]) for array, own in zip(stored.inpaint, new.inpaint, strict=True)))
    # Keys and values have an axis of layers before that of prompts.
    context = jax.tree.map(lambda array, own: put(array, own, int(array.ndim == 5)), stored.context, new.context)
    embeddings = tuple(put(array, own[None]) for array, own in zip(stored.embeddings, new.embeddings, strict=True))
    stored = stored._replace(inpaint=inpaint, context=context, embeddings=embeddings)
    return with_shardings(Carry(arrays, put(carry.momentum_blc, zeros_1lc))), placed(stored)


def placed(stored: Stored) -> Stored:
    """Return the arrays replicated on every device, but for keys and values, whose heads are shared by `tensor`."""
    return jax.tree.map(lambda array: constrain(array, "nnhnn" if array.ndim == 5 else "n" * array.ndim), stored)


def put_levels(stored: Modulations, new: Modulations, slot: Array) -> Modulations:
    """Return the AdaLN values with those of the next levels of a slot."""
    blocks = (
        jax.lax.dynamic_update_slice_in_dim(array, own, slot * LEVELS, 1)
        for array, own in zip(stored.blocks, new.blocks, strict=True)
    )
    final = jax.lax.dynamic_update_slice_in_dim(stored.final, new.final, slot * LEVELS, 0)
    return jax.tree.map(lambda array: constrain(array, "n" * array.ndim), Modulations(tuple(blocks), final))


def taken(array_blc: Array, slot: Array) -> Array:
    """Return a copy of one slot of an array."""
    return constrain(jax.lax.dynamic_index_in_dim(array_blc, slot, keepdims=False), "nn")


_PROGRAMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "evaluate": (
        evaluate,
        {
            "static_argnames": ("graphdef", "network_graphdefs", "dtype", "rows_at_once", "zero_context"),
            "donate_argnames": ("carry",),
        },
    ),
    "enter": (enter, {"donate_argnames": ("carry", "stored")}),
    "put_levels": (put_levels, {"donate_argnames": ("stored",)}),
    "taken": (taken, {}),
}


@functools.cache
def program(name: str) -> Any:
    """Return one of this module's functions, jitted: evaluate, enter, put_levels or taken."""
    function, options = _PROGRAMS[name]
    return jax.jit(function, compiler_options=compiler_options(program="network"), **options)
