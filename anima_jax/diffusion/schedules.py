"""Noise schedules: the noise levels (sigmas) to sample at, from about 1 (noise) down to 0, under ComfyUI's names.

Source: ComfyUI comfy/samplers.py, comfy/k_diffusion/sampling.py and `ModelSamplingDiscreteFlow` in
comfy/model_sampling.py; beta57 is RES4LYF's. Levels are computed in float64 on the host, because there are only a few.
A schedule is a function of the number of steps and the shift that returns the levels without the final 0.
"""

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


def shifted(times: Any, shift: float) -> Any:
    """Return s·t / (1 + (s − 1)·t) of a number or an array: with s > 1, more steps are at high noise."""
    return shift * times / (1.0 + (shift - 1.0) * times)


def sigma_table(shift: float) -> np.ndarray:
    """Return the flow model's 1,000 discrete levels, ascending."""
    return shifted(np.arange(1, TABLE_SIZE + 1) / TABLE_SIZE, shift)


def simple(steps: int, shift: float) -> np.ndarray:
    """Return every (1000 / steps)-th level of the table, from the top."""
    # Floating-point rounding as in ComfyUI: with 38 steps, int(19 · stride) is 499, not 500.
    stride = TABLE_SIZE / steps
    return sigma_table(shift)[[-(1 + int(i * stride)) for i in range(steps)]]


def sgm_uniform(steps: int, shift: float) -> np.ndarray:
    """Return levels spaced evenly from the largest to one step before the smallest, then shifted.

    The ends come from the shifted table, so they are shifted twice.
    """
    return shifted(np.linspace(1.0, sigma_table(shift)[0], steps + 1)[:-1], shift)


def normal(steps: int, shift: float) -> np.ndarray:
    """Return levels like those of `sgm_uniform`, but with the smallest level as the last one."""
    return shifted(np.linspace(1.0, sigma_table(shift)[0], steps), shift)


def karras(steps: int, shift: float) -> np.ndarray:
    """Return levels evenly spaced in their seventh root (Karras et al., arXiv 2206.00364)."""
    last = sigma_table(shift)[0]
    return np.linspace(1.0, last ** (1.0 / KARRAS_RHO), steps) ** KARRAS_RHO


def exponential(steps: int, shift: float) -> np.ndarray:
    """Return levels evenly spaced in their logarithm."""
    return np.exp(np.linspace(0.0, np.log(sigma_table(shift)[0]), steps))


def ddim_uniform(steps: int, shift: float) -> np.ndarray:
    """Return every ⌊1000 / steps⌋-th level of the table from the second-lowest up: often one more than `steps`."""
    return sigma_table(shift)[1 :: max(TABLE_SIZE // steps, 1)][::-1]


def beta(steps: int, shift: float, a: float = 0.6, b: float = 0.6) -> np.ndarray:
    """Return levels at quantiles of the beta distribution (arXiv 2407.12173), without duplicates."""
    quantiles = betaincinv(a, b, 1.0 - np.linspace(0.0, 1.0, steps, endpoint=False))
    picked = np.rint(quantiles * (TABLE_SIZE - 1)).astype(int)
    return sigma_table(shift)[picked[np.diff(picked, prepend=-1) != 0]]


def beta57(steps: int, shift: float) -> np.ndarray:
    """Return the levels of `beta` with parameters 0.5 and 0.7."""
    return beta(steps, shift, 0.5, 0.7)


def linear_quadratic(steps: int, shift: float) -> np.ndarray:
    """Return levels that fall slowly along a line for half the steps, then along a parabola to 0.

    The parabola continues the line smoothly. The shift is not used.
    """
    line = steps // 2
    if line == 0:
        return np.ones(1)
    slope, rest = LINEAR_END / line, steps - line
    bend = (1.0 - LINEAR_END - slope * rest) / rest**2
    beyond = np.arange(rest)
    return 1.0 - np.concatenate([slope * np.arange(line), LINEAR_END + slope * beyond + bend * beyond**2])


def kl_optimal(steps: int, shift: float) -> np.ndarray:
    """Return levels evenly spaced in their arc tangent (Align Your Steps, arXiv 2404.14507)."""
    return np.tan(np.linspace(np.arctan(1.0), np.arctan(sigma_table(shift)[0]), steps))


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
"""Name → function of (steps, shift) that returns the sigmas, descending, without the final 0."""


def sigmas(
    schedule: str, steps: int, shift: float = 3.0, *, denoise: float = 1.0, without_penultimate: bool = False
) -> np.ndarray:
    """Return the levels to sample at, float32, strictly descending to 0; for most schedules `steps` + 1 of them.

    With `denoise` in (0, 1] they are the last `steps` steps of a schedule with steps / denoise steps.
    `without_penultimate` adds one step to the schedule and drops its last level above 0.
    """
    partial = denoise <= FULL_DENOISE
    levels = SCHEDULES[schedule]((int(steps / denoise) if partial else steps) + without_penultimate, shift)
    levels = np.append(levels[:-1] if without_penultimate else levels, 0.0).astype(np.float32)
    if partial:
        levels = levels[-(steps + 1) :]
    return levels[np.diff(levels, prepend=np.inf) != 0]
