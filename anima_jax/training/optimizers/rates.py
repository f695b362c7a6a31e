"""Learning rates: one for each group, shaped over the run by a warmup and a schedule, as diffusion-pipe's train.py."""

import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
import optax

COSINE_FLOOR = 1e-6
"""The learning rate, absolute, at which `cosine` ends."""

SCHEDULES: dict[str, Callable[[float, Any, ModuleType], Any]] = {
    "constant": lambda rate, progress, xp: rate + 0.0 * progress,
    "linear": lambda rate, progress, xp: rate * (1.0 - progress),
    "cosine": lambda rate, progress, xp: (
        COSINE_FLOOR + (rate - COSINE_FLOOR) * 0.5 * (1.0 + xp.cos(math.pi * progress))
    ),
}
"""Name → the rate at a progress in [0, 1]; `xp` is numpy or jax.numpy."""


class Shape(Protocol):
    """What shapes the learning rates; `OptimizerConfig` is one."""

    @property
    def learning_rates(self) -> Mapping[str, float]: ...
    @property
    def schedule(self) -> str: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def total_steps(self) -> int: ...


def _rate(config: Shape, group: str, step: Any, xp: ModuleType) -> Any:
    """A linear warmup from 1 / `warmup_steps`, then the schedule from its beginning."""
    rate, warmup = config.learning_rates[group], config.warmup_steps
    main = SCHEDULES[config.schedule](rate, xp.clip((step - warmup) / config.total_steps, 0.0, 1.0), xp)
    if not warmup:
        return main
    return xp.where(step < warmup, rate * (1.0 / warmup + (1.0 - 1.0 / warmup) * step / warmup), main)


def schedule(config: Shape, group: str) -> optax.Schedule:
    """The group's rate as a function of the number of steps done."""
    return lambda step: jnp.asarray(_rate(config, group, step, jnp), jnp.float32)


def learning_rate(config: Shape, step: int) -> dict[str, float]:
    """Each group's rate in the step after `step` others (0: frozen), without the device, which may be busy."""
    return {
        group: float(_rate(config, group, step, np)) if rate else 0.0 for group, rate in config.learning_rates.items()
    }
