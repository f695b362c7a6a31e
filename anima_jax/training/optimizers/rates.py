"""Learning rates: one per parameter group, with warmup and schedule, as in diffusion-pipe's train.py."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

COSINE_FLOOR = 1e-6
"""The absolute learning rate at which `cosine` ends."""

SCHEDULES: dict[str, Callable[[float, Any, ModuleType], Any]] = {
    "constant": lambda rate, progress, xp: rate + 0.0 * progress,
    "linear": lambda rate, progress, xp: rate * (1.0 - progress),
    "cosine": lambda rate, progress, xp: (
        COSINE_FLOOR + (rate - COSINE_FLOOR) * 0.5 * (1.0 + xp.cos(math.pi * progress))
    ),
}
"""Name → the rate as a function of the base rate, the progress in [0, 1] and `xp` (numpy or jax.numpy)."""


@dataclasses.dataclass(frozen=True)
class LearningRates:
    """The learning rate of each parameter group (0: frozen) and how it changes over `total_steps`."""

    by_group: Mapping[str, float]
    schedule: str = "constant"
    warmup_steps: int = 0
    total_steps: int = 1

    def of(self, group: str) -> optax.Schedule:
        """Return the group's rate as a function of the number of finished steps."""
        return lambda step: jnp.asarray(self._rate(group, step, jnp), jnp.float32)

    def after(self, step: int) -> dict[str, float]:
        """Return each group's rate after `step` steps, computed on the host so that it does not wait for a device."""
        return {group: float(self._rate(group, step, np)) if rate else 0.0 for group, rate in self.by_group.items()}

    def _rate(self, group: str, step: Any, xp: ModuleType) -> Any:
        """Return the rate: a linear warmup from 1 / `warmup_steps` of it, then the schedule from its start."""
        rate, warmup = self.by_group[group], self.warmup_steps
        # A constant rate does not depend on `total_steps`: a run resumed with more epochs compiles to the same program.
        constant = self.schedule == "constant"
        progress = 0.0 if constant else xp.clip((step - warmup) / self.total_steps, 0.0, 1.0)
        main = SCHEDULES[self.schedule](rate, progress, xp)
        if not warmup:
            return main
        return xp.where(step < warmup, rate * (1.0 / warmup + (1.0 - 1.0 / warmup) * step / warmup), main)
