"""Sampling of a batch of latents from noise: transformer, guidance and sampler in one jitted program.

The program depends on the number of tokens and images, on the number of arrays that the sampler carries between
evaluations, on whether the negative prompt is evaluated, on the method of the step cache and, without a progress
callback, on the number of evaluations. Everything else is an argument: prompts, sizes, noise levels, guidance, the
network's parameters. Small programs before it compute once what does not depend on the latents: the prompts' keys and
values and the AdaLN values of the levels.
Axes: b batch, l image tokens, n context rows, d features, c the 64 values of a token. In the arrays of a sampler's
plan, n is evaluations of the network instead, and q new noise arrays.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from anima_jax.diffusion import samplers, step_cache
from anima_jax.diffusion.samplers import StepInputs
from anima_jax.diffusion.samplers.plan import Draw, SamplerPlan
from anima_jax.diffusion.step_cache import FirstBlockState, Savings, StepCache
from anima_jax.models.constraints import constrain
from anima_jax.models.dit import stream_dtype
from anima_jax.models.dit_inputs import Modulations
from anima_jax.models.parameters import Params, jit_network, merge
from anima_jax.parallel import hosts
from anima_jax.parallel.devices import device_bytes
from anima_jax.parallel.mesh import current_mesh, replicas, replicate, shard
from anima_jax.sampling.callbacks import ProgressCallback
from anima_jax.sampling.context import Context
from anima_jax.sampling.evaluation import Denoiser, GuidanceInputs, SharedInputs
from anima_jax.sampling.finite import all_finite
from anima_jax.sampling.packing import TokenPacking, is_padded, real_values
from anima_jax.sampling.references import layout

LEVELS = 32
"""Noise levels whose AdaLN values are computed together and are on the device at a time: 66 MB for the released model.

It is the same for plans of all lengths, so that they share programs.
"""


SHORT_CONTEXT = 256
"""Context rows that the program is compiled for if no prompt has more tokens.

All other rows are zero. They take part in the softmax as a number, not as stored keys and values.
"""

DEVICE_BYTES = 16 * 2**30
"""Memory of a device that does not say how much it has."""


STREAM_AXES = "bld"
"""Axes of the residual stream, parts of which the step cache `first_block` stores."""


class Carry(NamedTuple):
    """What one evaluation passes on to the next.

    That is the sampler's arrays, the point first, the guidance of APG, and what a step cache remembers.
    """

    arrays: list[Any]
    momentum_blc: Any
    cached: step_cache.State | None = None


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
    cache: StepCache | None = None,
    savings: Savings | None = None,
) -> list[np.ndarray]:
    """Run the plan from `start` and return each image's latents (t, y, x, c), float32.

    `step_noise` is called for each of the plan's draws in order and returns one array per image; it is not used if
    there are `noise_keys_b3`. Without `callback` the evaluations run in a few calls that never wait for the host. With
    it each evaluation is a separate call, and the callback for one runs while the device computes the next. `cache` is
    the method of `shared.cache_limits`; what it saves is added to `savings`.
    """
    total = len(plan.sigmas_n)
    start_blc = packing.pack(start)
    noise = None if step_noise is None or shared.noise_keys_b3 is not None else step_noise
    evaluations = Evaluations(params, graphdef, dtype, shared)

    def run(carry: Carry, part: slice) -> tuple[Carry, Array]:
        return evaluations.run(carry, plan, step_inputs(plan, part, scale_n, packing, noise))

    carry = replicate(evaluations.initial(samplers.initial_carry(plan, start_blc), cache))
    if callback is None:
        carry, _ = run(carry, slice(0, total))
    else:
        finished: Any = start_blc, True
        for index in range(total):
            carry, estimate_blc = run(carry, slice(index, index + 1))
            report(callback, index, total, finished, packing)
            finished = estimate_blc, all_finite(estimate_blc)
        report(callback, total, total, finished, packing)
    if savings is not None:
        savings.add(carry.cached, total)
    return packing.unpack(carry.arrays[0])


class Evaluations:
    """Runs evaluations of one network with one set of prompts, and computes once what they have in common."""

    def __init__(self, params: Params, graphdef: nnx.GraphDef[Any], dtype: Any, shared: SharedInputs):
        self.params, self.graphdef, self.dtype = params, graphdef, dtype
        # Control networks are sharded already.
        self.shared = replicate(shared._replace(controls=()))._replace(controls=shared.controls)
        self._seen_b3, self._tokens = layout(shared.size_b3, shared.references)
        if shared.regions is not None:
            self._seen_b3 = shared.regions.positive.size_r3
        rows_bnd, lengths_b = self.shared.context
        self._all_rows = rows_bnd.shape[1]
        is_short = lengths_b is None and self._all_rows > SHORT_CONTEXT and int(used_rows(rows_bnd)) <= SHORT_CONTEXT
        self._rows = SHORT_CONTEXT if is_short else self._all_rows
        self._context: tuple[bool, Context] | None = None
        self._modulations: tuple[tuple[float, ...], Modulations] | None = None

    def initial(self, arrays: list[Any], cache: StepCache | None) -> Carry:
        """Return what is passed on to the first evaluation, with the sampler's arrays."""
        rows = len(self.shared.context.rows_bnd)
        cached = initial_cache(self.params, arrays[0].shape, (rows, self._tokens), self.dtype, cache)
        if isinstance(cached, FirstBlockState):
            cached = shard(cached, STREAM_AXES)
        return Carry(arrays, np.zeros_like(arrays[0]), cached)

    def run(self, carry: Carry, plan: SamplerPlan, steps: StepInputs) -> tuple[Carry, Array]:
        """Run these evaluations of the plan. Return what they pass on and the last clean estimate.

        Consecutive ones that are alike, with or without the negative prompt, run in one call that never waits.
        """
        numbers_n, estimate_blc = steps.guidance.number, carry.arrays[0]
        with_negative_n = (steps.guidance.scale != 1.0) | plan.both
        steps, first = replicate(steps), 0
        for (chunk, with_negative), part in itertools.groupby(zip(numbers_n // LEVELS, with_negative_n, strict=True)):
            last = first + len(list(part))
            carry, estimate_blc = advance(
                self.params,
                carry,
                steps,
                self.shared._replace(context=self._context_of(bool(with_negative))),
                self._modulations_of(plan.sigmas_n[chunk * LEVELS :][:LEVELS]),
                replicate(np.array([first, last], np.int32)),
                graphdef=self.graphdef,
                with_negative=bool(with_negative),
                both=plan.both,
                padded=is_padded(self._seen_b3, self._tokens),
                zero_context=self._all_rows - self._rows,
                dtype=self.dtype,
            )
            first = last
        return carry, estimate_blc

    def _context_of(self, with_negative: bool) -> Context:
        """Return the keys and values of the prompts that are evaluated, or their rows if those take too much memory."""
        if self._context is None or self._context[0] != with_negative:
            left_out = 0 if with_negative else self.shared.negatives
            self._context = (
                with_negative,
                evaluated_context(
                    self.params,
                    self.shared.context,
                    graphdef=self.graphdef,
                    dtype=self.dtype,
                    left_out=left_out,
                    rows=self._rows,
                    as_keys=keys_fit(self.params, len(self.shared.context.rows_bnd) - left_out, self._rows, self.dtype),
                ),
            )
        return self._context[1]

    def _modulations_of(self, levels_s: np.ndarray) -> Modulations:
        """Return the AdaLN values of at most `LEVELS` noise levels."""
        if self._modulations is None or self._modulations[0] != tuple(levels_s):
            padded_s = replicate(np.pad(levels_s, (0, LEVELS - len(levels_s)), mode="edge"))
            self._modulations = tuple(levels_s), modulations(self.params, padded_s, graphdef=self.graphdef)
        return self._modulations[1]


def keys_fit(params: Params, prompts: int, rows: int, dtype: Any) -> bool:
    """Return whether the devices have the memory for keys and values of prompts, which may take a sixteenth of it."""
    layers, _, width = params["blocks.cross_attn.k_proj.kernel"].shape
    needed = 2 * layers * prompts * rows * width * jnp.dtype(dtype).itemsize
    mesh = current_mesh()
    own = min(filter(None, map(device_bytes, mesh.local_devices)), default=None)
    return needed / replicas(mesh.shape) <= (hosts.smallest(own) or DEVICE_BYTES) / 16


def initial_cache(
    params: Params, shape_blc: tuple[int, int, int], seen_rl: tuple[int, int], dtype: Any, cache: StepCache | None
) -> step_cache.State | None:
    """Return what the step cache remembers before the first evaluation, on the host.

    The network sees rows and tokens `seen_rl`, with both kinds of prompts.
    """
    stream = *seen_rl, params["blocks.cross_attn.k_proj.kernel"].shape[-1]
    return cache and cache.initial(shape_blc, stream, stream_dtype(dtype))


@jax.jit
def used_rows(rows_bnd: Array) -> Array:
    """Return the number of rows before those at the end that are zero for all prompts."""
    used_n = jnp.any(rows_bnd != 0, axis=(0, 2))
    return jnp.max(jnp.where(used_n, 1 + jnp.arange(len(used_n)), 0))


@partial(jit_network, static_argnames=("graphdef", "dtype", "left_out", "rows", "as_keys"))
def evaluated_context(
    params: Params,
    context: Context,
    *,
    graphdef: nnx.GraphDef[Any],
    dtype: Any,
    left_out: int,
    rows: int,
    as_keys: bool,
) -> Context:
    """Return the first `rows` rows of the prompts after those `left_out`, or their keys and values in all blocks."""
    rows_bnd, lengths_b = jax.tree.map(lambda leaf: leaf[left_out:], context)
    rows_bnd = rows_bnd[:, :rows].astype(dtype)
    return Context(merge(graphdef, params).keys_values(rows_bnd) if as_keys else rows_bnd, lengths_b)


@partial(jit_network, static_argnames="graphdef")
def modulations(params: Params, sigmas_s: Array, *, graphdef: nnx.GraphDef[Any]) -> Modulations:
    """Return the AdaLN values of the network at these noise levels."""
    return merge(graphdef, params).modulations(sigmas_s)


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
    guided = GuidanceInputs(scale_n[part], rising_n[part], np.arange(len(rising_n), dtype=np.int32)[part])
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


@partial(
    jit_network,
    static_argnames=("graphdef", "with_negative", "both", "padded", "zero_context", "dtype"),
    donate_argnames=("carry",),
)
def advance(
    params: Params,
    carry: Carry,
    steps: StepInputs,
    shared: SharedInputs,
    modulations: Modulations,
    part_2: Array,
    *,
    graphdef: nnx.GraphDef[Any],
    with_negative: bool,
    both: bool,
    padded: bool,
    zero_context: int,
    dtype: Any,
) -> tuple[Carry, Array]:
    """Run a part of the evaluations in `steps`. Return what they pass on and the last clean estimate.

    `padded` says whether any image has fewer tokens than the budget, `zero_context` is the number of zero rows after
    the context's. `modulations` are those of `LEVELS` evaluations of the plan, `part_2` are the part's first evaluation
    in `steps` and the one after its last. Without the negative prompt, its estimate is taken to be the prompt's.
    """
    real_blc = real_values(shared.size_b3, carry.momentum_blc.shape[1])
    options = {"padded": padded, "zero_context": zero_context}
    denoiser = Denoiser(merge(graphdef, params), shared, with_negative, dtype, options)

    def denoise(x_blc: Array, step: StepInputs, momentum_blc: Array, cached: Any) -> tuple[Any, ...]:
        level = modulations.at(step.guidance.number % LEVELS)
        return denoiser.denoise(x_blc, step, level, momentum_blc, cached)

    def draw(number_or_noise: Array) -> Array:
        if shared.noise_keys_b3 is None:
            return number_or_noise
        return real_blc * jax_noise(shared.noise_keys_b3, number_or_noise, carry.momentum_blc.shape[1:])

    arrays, estimate_blc, memory = samplers.run_scan(
        denoise, carry.arrays, steps, both=both, draw=draw, memory=carry[1:], part=part_2
    )
    return with_shardings(Carry(arrays, *memory)), constrain(estimate_blc, "nnn")


def with_shardings(carry: Carry) -> Carry:
    """Return the carry replicated on every device, but for parts of the residual stream.

    On a mesh the network shards images and tokens.
    """
    axes = STREAM_AXES if isinstance(carry.cached, FirstBlockState) else "nnn"
    cached = jax.tree.map(lambda x: constrain(x, axes if x.ndim == len(axes) else "n" * x.ndim), carry.cached)
    return jax.tree.map(lambda x_blc: constrain(x_blc, "nnn"), carry._replace(cached=None))._replace(cached=cached)


def jax_noise(keys_b3: Array, number: Array, shape: tuple[int, ...]) -> Array:
    """Return noise (b, *shape) from each image's own key, in token order so that padding does not change it.

    `number` is that of the draw, for all images or for each.
    """

    def one(key_3: Array, number: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(key_3[0]), key_3[1]), key_3[2])
        return jax.random.normal(jax.random.fold_in(key, number), shape, jnp.float32)

    return jax.vmap(one)(keys_b3, jnp.broadcast_to(number, len(keys_b3)))
