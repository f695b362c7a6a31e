"""A check at the start of every run: trained groups have gradients, and frozen groups do not move.

Without it, a group without gradients could go unnoticed for days, for example if a text adapter's output never reaches
the network. The train step measures the norms; `self_check` decides.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import optax
from jax import Array

from anima_jax.errors import UserError
from anima_jax.models.parameters import Params

ATTEMPTS = 2
"""Steps within which a group must have a gradient.

In a new network, only the output layer has a gradient in the first step: its weights start at zero, so none reaches
the other layers before its first update.
"""


class GroupNorms(NamedTuple):
    """Norms of the gradient and of the update of each parameter group."""

    gradient: Mapping[str, Array | float]
    update: Mapping[str, Array | float]


def group_norms(values: Params, groups: Mapping[str, str]) -> dict[str, Array]:
    """Return the norm of the `values` of each group; `groups` maps the path of a parameter to its group."""
    return {
        group: optax.global_norm([value for path, value in values.items() if groups[path] == group])
        for group in sorted({groups[path] for path in values})
    }


def self_check(
    norms: GroupNorms, rates: Mapping[str, float], *, step: int, attempt: int, loss: float, adapter: bool
) -> bool:
    """Return whether the run has passed; if not, the next step must be measured too.

    `rates` are the learning rates of the groups, 0 if frozen. `step` is the step of the run, the `attempt`-th (from 1)
    with a finite loss and gradient since it started or resumed; its loss is `loss`. A loss of 0 (all masked), or a loss
    or gradient that is not finite, proves nothing. An `adapter` has no parameters in the group `base`. Raises UserError
    that names the groups that are frozen but moved, or that should learn but have no gradient in attempt `ATTEMPTS`.
    """
    moved = [group for group, norm in norms.update.items() if not rates[group] and float(norm) > 0]
    if moved:
        raise UserError(f"self-check: {_named(moved)} should be frozen (learning rate 0), but moved in step {step}")
    total = math.hypot(*map(float, norms.gradient.values()))
    if not math.isfinite(total) or not loss or not math.isfinite(loss):
        return False
    stuck = _without_gradient(norms, rates, adapter)
    if stuck and attempt >= ATTEMPTS:
        found = "no parameters" if all(group not in norms.gradient for group in stuck) else "no gradient"
        raise UserError(
            f"self-check: {_named(stuck)} should learn, but had {found} in step {step}; "
            "set the learning rate to 0 to freeze on purpose"
        )
    return not stuck


def _without_gradient(norms: GroupNorms, rates: Mapping[str, float], adapter: bool) -> list[str]:
    """Return the groups that should learn but have no gradient."""
    learning = [group for group, rate in rates.items() if rate > 0 and not (adapter and group == "base")]
    return [group for group in learning if not float(norms.gradient.get(group, 0.0))]


def norms_table(norms: GroupNorms) -> str:
    """Return a table of the gradient and update norms of each group."""
    lines = [f"{'group':<12} {'gradient':>12} {'update':>12}"]
    for group, norm in norms.gradient.items():
        lines.append(f"{group:<12} {float(norm):>12.3e} {float(norms.update[group]):>12.3e}")
    return "\n".join(lines)


def _named(groups: list[str]) -> str:
    noun = "parameter group" if len(groups) == 1 else "parameter groups"
    return f"{noun} {', '.join(sorted(groups))}"
