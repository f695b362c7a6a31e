"""Learning rates: one per parameter group, with warmup and schedule.

`constant`, `linear` and `cosine` are as in diffusion-pipe's train.py: the warmup begins at 1 / `warmup_steps`, and the
decay takes all steps of the run from there. The others are as in transformers' `get_scheduler`, and `rex` as in its
paper (arXiv 2107.04197): the warmup begins at 0, and the decay ends with the run.
"""

import dataclasses
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

FLOORS: Mapping[str, float] = {"cosine": 1e-6, "polynomial": 1e-7}
"""Schedule → the learning rate at which it ends by default, if that is not 0."""

FROM_DIFFUSION_PIPE = ("constant", "linear", "cosine")

CONSTANT = ("constant", "constant_with_warmup")


@dataclasses.dataclass(frozen=True)
class LearningRates:
    """The learning rate of each parameter group (0: frozen) and how it changes over `total_steps`.

    `num_cycles` is for cosine_with_restarts, `power` for polynomial; decays end at `min_lr`, by default in `FLOORS`.
    """

    by_group: Mapping[str, float]
    schedule: str = "constant"
    warmup_steps: int = 0
    total_steps: int = 1
    num_cycles: int = 1
    power: float = 1.0
    min_lr: float | None = None

    def of(self, group: str) -> optax.Schedule:
        """Return the group's rate as a function of the number of finished steps."""
        return lambda step: jnp.asarray(self._rate(group, step, jnp), jnp.float32)

    def after(self, step: int) -> dict[str, float]:
        """Return each group's rate after `step` steps, computed on the host so that it does not wait for a device."""
        return {group: float(self._rate(group, step, np)) if rate else 0.0 for group, rate in self.by_group.items()}

    def _rate(self, group: str, step: Any, xp: ModuleType) -> Any:
        """Return the rate: a linear warmup, then the schedule from its start."""
        rate, warmup = self.by_group[group], self.warmup_steps
        floor = FLOORS.get(self.schedule, 0.0) if self.min_lr is None else self.min_lr
        # A constant rate does not depend on `total_steps`: a run resumed with more epochs compiles to the same program.
        main = rate if self.schedule in CONSTANT else floor + (rate - floor) * self._shape(step, xp)
        if not warmup:
            return main + 0.0 * step
        first = 1.0 / warmup if self.schedule in FROM_DIFFUSION_PIPE else 0.0
        return xp.where(step < warmup, rate * (first + (1.0 - first) * step / warmup), main)

    def _shape(self, step: Any, xp: ModuleType) -> Any:
        """Return the decaying schedule, from 1 to 0."""
        span = self.total_steps - (0 if self.schedule in FROM_DIFFUSION_PIPE else self.warmup_steps)
        after = xp.clip(step - self.warmup_steps, 0, max(1, span))
        progress = after / max(1, span)
        match self.schedule:
            case "cosine":
                return 0.5 * (1.0 + xp.cos(math.pi * progress))
            case "cosine_with_restarts":
                # In whole numbers: a cycle's first step has the full rate, not the last one's.
                cycle = (after * self.num_cycles) % max(1, span) / max(1, span)
                return xp.where(progress < 1.0, 0.5 * (1.0 + xp.cos(math.pi * cycle)), 0.0)
            case "polynomial":
                return (1.0 - progress) ** self.power
            case "rex":
                return (1.0 - progress) / (1.0 - progress / 2.0)
            case _:
                return 1.0 - progress
