"""Parameter groups, learning rates and optimizers: `build` makes the one that a configuration names."""

from anima_jax.training.optimizers.build import OptimizerConfig, averaged, build, check
from anima_jax.training.optimizers.groups import (
    GROUPS,
    NEVER_DECAYED,
    decayed_paths,
    group_of,
    groups_by_path,
)
from anima_jax.training.optimizers.rates import COSINE_FLOOR, SCHEDULES, learning_rate, schedule
from anima_jax.training.optimizers.table import names

__all__ = [
    "COSINE_FLOOR",
    "GROUPS",
    "NEVER_DECAYED",
    "SCHEDULES",
    "OptimizerConfig",
    "averaged",
    "build",
    "check",
    "decayed_paths",
    "group_of",
    "groups_by_path",
    "learning_rate",
    "names",
    "schedule",
]
