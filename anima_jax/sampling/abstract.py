"""The sampling program lowered from shapes alone, to compile it for devices that need not be here."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from anima_jax.diffusion import guidance, samplers
from anima_jax.diffusion.step_cache import FirstBlockState
from anima_jax.models.constraints import partition_spec
from anima_jax.models.control import ControlConfig
from anima_jax.models.dit import CONTEXT_ROWS, OUT_CHANNELS, AnimaDiT
from anima_jax.models.parameters import Params, merge
from anima_jax.parallel.mesh import current_mesh, replicated
from anima_jax.platform import lower
from anima_jax.sampling import evaluation, program
from anima_jax.sampling.context import Context
from anima_jax.sampling.control_networks import abstract_inputs
from anima_jax.sampling.images import PIXELS_PER_LATENT
from anima_jax.sampling.packing import TokenPacking, is_padded
from anima_jax.sampling.references import layout, packed_references
from anima_jax.sampling.request import SamplingParams


def lowered_sampling(
    params: Params,
    graphdef: nnx.GraphDef[Any],
    dtype: Any,
    settings: SamplingParams,
    size_wh: tuple[int, int],
    images: int,
    *,
    short: bool,
    references: int = 0,
    control: ControlConfig | None = None,
) -> Any:
    """Return the program of at most `program.LEVELS` steps for so many images of this size in pixels, lowered.

    It is that of `program.sample`, for the current mesh and the hardware of `compiling_for`. `params` are shapes with
    shardings. `short` says that no prompt has more than `program.SHORT_CONTEXT` tokens; others have up to 512. Each
    image has as many `references`, and a control network of the sizes `control`, if there are any. Noise of steps comes
    from torch's streams, as arrays.
    """
    plan = samplers.sampler_plan(settings.sampler, settings.levels(), settings.shift, settings.sampler_options)
    width, height = size_wh
    packing = TokenPacking([(1, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)] * images)
    scale_n = guidance.scale_schedule(
        plan.sigmas_n, settings.guidance_scale, settings.guidance_interval, settings.shift
    )
    with_negative = bool(np.any(scale_n != 1.0)) or plan.both
    tokens = jax.ShapeDtypeStruct(packing.shape, jnp.float32)
    steps = program.step_inputs(plan, slice(0, len(plan.sigmas_n)), scale_n, packing, None)
    noises = jax.ShapeDtypeStruct((*plan.draw_numbers_nq.shape, *packing.shape), jnp.float32)
    rows = program.SHORT_CONTEXT if short else CONTEXT_ROWS

    def keys_and_levels(params: Params) -> tuple[Any, Any]:
        model: AnimaDiT = merge(graphdef, params)
        prompts = images * (1 + with_negative)
        return (
            model.keys_values(jnp.zeros((prompts, rows, model.config.context_width), dtype)),
            model.modulations(jnp.zeros(program.LEVELS)),
        )

    keys_values, modulations = jax.eval_shape(keys_and_levels, params)
    reference = np.zeros((1, *packing.size_b3[0, 1:], OUT_CHANNELS), np.float32)
    others = packed_references(packing, [[reference] * references] * images)
    seen_b3, seen = layout(packing.size_b3, others)
    shared = evaluation.SharedInputs(packing.size_b3, Context(keys_values, None), settings.variants, references=others)
    run = functools.partial(
        program.advance,
        graphdef=graphdef,
        with_negative=with_negative,
        both=plan.both,
        padded=is_padded(seen_b3, seen),
        zero_context=CONTEXT_ROWS - rows,
        dtype=dtype,
    )
    cache = settings.step_cache
    shared = shared._replace(cache_limits=cache and cache.limits(settings.shift))
    cached = program.initial_cache(params, packing.shape, (2 * images, seen), dtype, cache)
    cached = on_devices(cached, program.STREAM_AXES if isinstance(cached, FirstBlockState) else None)
    carry = on_devices(program.Carry([tokens] * plan.factors_nkj.shape[1], tokens))._replace(cached=cached)
    steps, shared, *others = on_devices((steps._replace(noises_q=noises), shared, modulations, np.zeros(2, np.int32)))
    if control is not None:
        shared = shared._replace(controls=(abstract_inputs(control, dtype, images, seen),))
    return lower(jax.jit(run, donate_argnums=1), params, carry, steps, shared, *others)


def on_devices(tree: Any, axes: str | None = None) -> Any:
    """Return shapes in the dtypes that arrays have on devices, replicated but for arrays with these `axes`."""
    mesh = current_mesh()

    def one(leaf: Any) -> Any:
        dtype = jax.dtypes.canonicalize_dtype(np.result_type(leaf) if not hasattr(leaf, "dtype") else leaf.dtype)
        sharding, shape = replicated(mesh), np.shape(leaf)
        if axes is not None and len(shape) == len(axes):
            sharding = NamedSharding(mesh, partition_spec(shape, axes, mesh))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return jax.tree.map(one, tree)
