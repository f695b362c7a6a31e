"""Sampling in steps whose sizes depend on the images: the host measures each step's error and accepts or repeats it.

The error is taken over the whole batch, as in ComfyUI, so a batch must be one that ComfyUI would draw. Every attempt
runs the same compiled program. All processes come to the same decisions, because the arrays are replicated.
Axes: b batch, l image tokens, c the 64 values of a token, q new noise arrays, n evaluations of the network.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from anima_jax.diffusion.samplers.dpm_solver import StepController
from anima_jax.diffusion.samplers.plan import Draw, SamplerPlan
from anima_jax.diffusion.step_cache import Savings, StepCache
from anima_jax.models.parameters import Params
from anima_jax.parallel.mesh import replicate
from anima_jax.sampling.callbacks import ProgressCallback
from anima_jax.sampling.evaluation import SharedInputs
from anima_jax.sampling.finite import all_finite
from anima_jax.sampling.packing import TokenPacking, real_values
from anima_jax.sampling.program import Carry, Evaluations, report, step_inputs


def sample(
    params: Params,
    graphdef: nnx.GraphDef[Any],
    dtype: Any,
    controller: StepController,
    plan_of: Callable[[np.ndarray], SamplerPlan],
    packing: TokenPacking,
    start: Sequence[np.ndarray],
    shared: SharedInputs,
    scale_of: Callable[[np.ndarray], np.ndarray],
    step_noise: Callable[[Draw], Sequence[np.ndarray]],
    callback: ProgressCallback | None = None,
    cache: StepCache | None = None,
    savings: Savings | None = None,
) -> list[np.ndarray]:
    """Run steps from `start` until `controller` has finished. Return each image's latents (t, y, x, c), float32.

    `plan_of` returns the plan of a step for its levels, with the results of `dpm_adaptive`; `scale_of` returns the
    guidance scale at the levels of its evaluations. Noise that a rejected step would have added is kept for the next
    attempt. A step whose error is NaN is the last one: the network or its input is. For `cache` and `savings` see
    `program.sample`; a rejected step changes what the cache remembers. Raises UserError if sampling would never end.
    """
    evaluations = Evaluations(params, graphdef, dtype, shared)
    start_blc = packing.pack(start)
    (x_blc,), momentum_blc, cached = replicate(evaluations.initial([start_blc], cache))
    previous_blc, size_b3 = replicate((start_blc, shared.size_b3))
    finished: Any = start_blc, True
    done = accepted = 0
    level = -np.inf
    unused: list[Sequence[np.ndarray]] = []

    def noise(draw: Draw) -> Sequence[np.ndarray]:
        if not unused:
            unused.append(step_noise(draw))
        return unused[0]

    while not controller.finished:
        plan = plan_of(controller.levels)
        on_device = shared.noise_keys_b3 is not None
        if on_device:
            plan = plan._replace(draw_numbers_nq=np.where(plan.draw_numbers_nq < 0, -1, accepted))
        steps = step_inputs(plan, slice(None), scale_of(plan.sigmas_n), packing, None if on_device else noise, level)
        level = plan.sigmas_n[-1]
        arrays = [x_blc, *(jnp.zeros_like(x_blc) for _ in range(plan.factors_nkj.shape[1] - 1))]
        carry = Carry(arrays, momentum_blc, cached)
        (results, momentum_blc, cached), estimate_blc = evaluations.run(carry, plan, steps)
        after_blc, low_blc, difference_blc, before_blc = results[:4]
        error = step_error(low_blc, difference_blc, previous_blc, size_b3, controller.rtol, controller.atol)
        count = len(plan.sigmas_n)
        if callback:
            whole = round(done / controller.progress) if controller.progress else 0
            report(callback, done, max(whole, done + count), finished, packing)
        finished = estimate_blc, all_finite(estimate_blc)
        done += count
        if math.isnan(error):
            x_blc = after_blc
            break
        if controller.accept(float(error)):
            x_blc, previous_blc, accepted = after_blc, low_blc, accepted + 1
            unused.clear()
        else:
            x_blc = before_blc
    if callback:
        report(callback, done, done, finished, packing)
    if savings is not None:
        savings.add(cached, done)
    return packing.unpack(x_blc)


@jax.jit
def step_error(
    low_blc: Array, difference_blc: Array, previous_blc: Array, size_b3: Array, rtol: float, atol: float
) -> Array:
    """Return the root mean square of a step's error relative to the tolerances, over all values that are not padding.

    The relative tolerance is of the solution of low order and of that of the previous step.
    """
    real_blc = real_values(size_b3, low_blc.shape[1])
    tolerance_blc = jnp.maximum(atol, rtol * jnp.maximum(jnp.abs(low_blc), jnp.abs(previous_blc)))
    relative_blc = jnp.where(real_blc, difference_blc / tolerance_blc, 0.0)
    return jnp.sqrt(jnp.sum(relative_blc**2) / jnp.sum(real_blc))
