"""Noise schedules: the noise levels (sigmas) to sample at, from about 1 (noise) down to 0, under ComfyUI's names.

Source: ComfyUI comfy/samplers.py, comfy/k_diffusion/sampling.py and `ModelSamplingDiscreteFlow` in
comfy/model_sampling.py; beta57 is RES4LYF's. All arithmetic is float32 in torch's order of operations, so that the
levels are ComfyUI's to the last bit: a level on the other side of a limit draws another image. Where torch calls a
library for a power, an exponential or a tangent (`karras`, `exponential`, `kl_optimal`), the result here is the
correctly rounded one; torch's depends on the processor and is sometimes the number next to it.
A schedule is a function of the number of steps and the shift that returns the levels with the last one, usually 0.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import betaincinv

TABLE_SIZE = 1000

LINEAR_END = 0.025
"""Noise that the first half of the steps removes in `linear_quadratic`."""

KARRAS_RHO = 7.0

FULL_DENOISE = 0.9999
"""Values of `denoise` above this count as 1."""

NEARLY_ZERO = 1e-5
"""Levels up to this count as 0 where ComfyUI asks whether a schedule already ends there (shifts below 0.1)."""


def shifted(times: Any, shift: float) -> Any:
    """Return s·t / (1 + (s − 1)·t) of a number or an array: with s > 1, more steps are at high noise.

    Arrays keep their dtype; a Python number is computed in float64.
    """
    return times if shift == 1 else shift * times / (1.0 + (shift - 1.0) * times)


def percent_to_sigma(percent: float, shift: float) -> float:
    """Return the level after this fraction of the sampling, counted before the shift; float64, as in ComfyUI."""
    return 1.0 if percent <= 0 else 0.0 if percent >= 1 else shifted(1.0 - percent, shift)


def sigma_table(shift: float) -> np.ndarray:
    """Return the flow model's 1,000 discrete levels, ascending, float32."""
    return shifted(np.arange(1, TABLE_SIZE + 1, dtype=np.float32) / np.float32(TABLE_SIZE), shift)


def simple(steps: int, shift: float) -> np.ndarray:
    """Return every (1000 / steps)-th level of the table, from the top."""
    # Floating-point rounding as in ComfyUI: with 38 steps, int(19 · stride) is 499, not 500.
    stride = TABLE_SIZE / steps
    return _with_zero(sigma_table(shift)[[-(1 + int(i * stride)) for i in range(steps)]])


def sgm_uniform(steps: int, shift: float) -> np.ndarray:
    """Return levels spaced evenly from the largest to one step before the smallest, then shifted.

    The ends come from the shifted table, so they are shifted twice.
    """
    table = sigma_table(shift)
    return _with_zero(shifted(linspace(table[-1], table[0], steps + 1)[:-1], shift))


def normal(steps: int, shift: float) -> np.ndarray:
    """Return levels like those of `sgm_uniform`, but with the smallest level as the last one."""
    table = sigma_table(shift)
    if shifted(table[0], shift) <= NEARLY_ZERO:
        return shifted(linspace(table[-1], table[0], steps + 1), shift)
    return _with_zero(shifted(linspace(table[-1], table[0], steps), shift))


def karras(steps: int, shift: float) -> np.ndarray:
    """Return levels evenly spaced in their seventh root (Karras et al., arXiv 2206.00364)."""
    first, last = (float(level) ** (1.0 / KARRAS_RHO) for level in sigma_table(shift)[[-1, 0]])
    roots = np.float32(first) + linspace(0.0, 1.0, steps) * np.float32(last - first)
    return _with_zero(roots.astype(np.float64) ** KARRAS_RHO)


def exponential(steps: int, shift: float) -> np.ndarray:
    """Return levels evenly spaced in their logarithm."""
    first, last = (math.log(level) for level in sigma_table(shift)[[-1, 0]])
    return _with_zero(np.exp(linspace(first, last, steps).astype(np.float64)))


def ddim_uniform(steps: int, shift: float) -> np.ndarray:
    """Return every ⌊1000 / steps⌋-th level of the table from the second-lowest up: often one more than `steps`."""
    table = sigma_table(shift)
    if table[1] <= NEARLY_ZERO:
        return table[1 :: max(TABLE_SIZE // (steps + 1), 1)][::-1]
    return _with_zero(table[1 :: max(TABLE_SIZE // steps, 1)][::-1])


def beta(steps: int, shift: float, a: float = 0.6, b: float = 0.6) -> np.ndarray:
    """Return levels at quantiles of the beta distribution (arXiv 2407.12173), without duplicates."""
    quantiles = betaincinv(a, b, 1.0 - np.linspace(0.0, 1.0, steps, endpoint=False))
    picked = np.rint(quantiles * (TABLE_SIZE - 1)).astype(int)
    return _with_zero(sigma_table(shift)[picked[np.diff(picked, prepend=-1) != 0]])


def beta57(steps: int, shift: float) -> np.ndarray:
    """Return the levels of `beta` with parameters 0.5 and 0.7."""
    return beta(steps, shift, 0.5, 0.7)


def linear_quadratic(steps: int, shift: float) -> np.ndarray:
    """Return levels that fall slowly along a line for half the steps, then along a parabola to 0.

    The parabola continues the line smoothly. The shift is not used, except that it may round the largest level.
    """
    line = steps // 2
    if line == 0:
        return np.array([sigma_table(shift)[-1], 0.0], np.float32)
    rest, above = steps - line, line - LINEAR_END * steps
    bend = above / (line * rest**2)
    slope, start = LINEAR_END / line - 2 * above / rest**2, bend * line**2
    removed = [index * LINEAR_END / line for index in range(line)]
    removed += [bend * index**2 + slope * index + start for index in range(line, steps)]
    return np.array([1.0 - x for x in [*removed, 1.0]], np.float32) * sigma_table(shift)[-1]


def kl_optimal(steps: int, shift: float) -> np.ndarray:
    """Return levels evenly spaced in their arc tangent (Align Your Steps, arXiv 2404.14507).

    ComfyUI divides 0 by 0 for a single step, which starts at the largest level here.
    """
    first, last = (np.float32(math.atan(level)) for level in sigma_table(shift)[[-1, 0]])
    share = np.arange(steps, dtype=np.float32) / np.float32(max(steps - 1, 1))
    return _with_zero(np.tan((share * last + (np.float32(1.0) - share) * first).astype(np.float64)))


SCHEDULES: dict[str, Callable[[int, float], np.ndarray]] = {
    schedule.__name__: schedule
    for schedule in (
        simple,
        sgm_uniform,
        normal,
        karras,
        exponential,
        ddim_uniform,
        beta,
        beta57,
        linear_quadratic,
        kl_optimal,
    )
}
"""Name → function of (steps, shift) that returns the sigmas, float32, descending."""


def linspace(start: float, end: float, count: int) -> np.ndarray:
    """Return `count` evenly spaced numbers, float32, as torch.linspace computes them.

    It counts from the nearer end, with one rounding of the sum of the end and the exact product (fused multiply-add).
    """
    first, last, index = np.float32(start), np.float32(end), np.arange(count)
    step = float((last - first) / np.float32(max(count - 1, 1)))
    near_start = index < max(count // 2, 1)
    return np.where(near_start, first + step * index, last - step * (count - 1 - index)).astype(np.float32)


def _with_zero(levels: np.ndarray) -> np.ndarray:
    return np.append(levels.astype(np.float32), np.float32(0.0))


def sigmas(
    schedule: str, steps: int, shift: float = 3.0, *, denoise: float = 1.0, without_penultimate: bool = False
) -> np.ndarray:
    """Return the levels to sample at, float32, strictly descending to 0; for most schedules `steps` + 1 of them.

    With `denoise` in (0, 1] they are the last `steps` steps of a schedule with steps / denoise steps.
    `without_penultimate` adds one step to the schedule and drops its last level above 0.
    """
    partial = denoise <= FULL_DENOISE
    levels = SCHEDULES[schedule]((int(steps / denoise) if partial else steps) + without_penultimate, shift)
    if without_penultimate:
        levels = np.delete(levels, -2)
    if partial:
        levels = levels[-(steps + 1) :]
    return levels[np.diff(levels, prepend=np.inf) != 0]


def part(levels: np.ndarray, start: int, end: int | None, *, leftover_noise: bool) -> np.ndarray:
    """Return the levels of the steps from `start` up to `end` (None: the last), as ComfyUI's KSamplerAdvanced does.

    A part that ends early ends at 0, unless noise may be left over. If no step is left there are no levels.
    """
    if end is not None and end < len(levels) - 1:
        levels = levels[: end + 1]
        if not leftover_noise:
            levels = np.append(levels[:-1], np.float32(0.0))
    return levels[start:] if start < len(levels) - 1 else levels[:0]
