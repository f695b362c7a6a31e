"""Noise levels (sigmas) to sample at, from 1 (noise) down to 0, by ComfyUI's names.

Source: ComfyUI comfy/samplers.py and `ModelSamplingDiscreteFlow` in comfy/model_sampling.py. Computed in float64 on the
host; there are only a few.
"""

from collections.abc import Callable

import numpy as np

TABLE_SIZE = 1000


def shifted(times: np.ndarray, shift: float) -> np.ndarray:
    """s·t / (1 + (s − 1)·t): more steps at high noise for s > 1."""
    return shift * times / (1.0 + (shift - 1.0) * times)


def sigma_table(shift: float) -> np.ndarray:
    """The flow model's 1,000 discrete levels, ascending."""
    return shifted(np.arange(1, TABLE_SIZE + 1) / TABLE_SIZE, shift)


def simple(steps: int, shift: float) -> np.ndarray:
    """Every (1000 / steps)-th level of the table, from the top."""
    picked = [-(1 + int(i * TABLE_SIZE / steps)) for i in range(steps)]
    return np.append(sigma_table(shift)[picked], 0.0)


SCHEDULES: dict[str, Callable[[int, float], np.ndarray]] = {"simple": simple}
"""Name → (steps, shift) → steps + 1 sigmas, descending to 0."""
