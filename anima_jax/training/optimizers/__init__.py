"""Parameter groups, learning rates and optimizers. `build` returns the optimizer of a configuration."""

from anima_jax.checkpoints.names.groups import GROUPS, group_of, groups_by_path, is_decayed
from anima_jax.training.optimizers.apply import apply, norms_of
from anima_jax.training.optimizers.build import averaged, build, check, on_host
from anima_jax.training.optimizers.rates import LearningRates
from anima_jax.training.optimizers.table import find, rows

__all__ = [
    "GROUPS",
    "LearningRates",
    "apply",
    "averaged",
    "build",
    "check",
    "find",
    "group_of",
    "groups_by_path",
    "is_decayed",
    "norms_of",
    "on_host",
    "rows",
]
