"""Does every parameter group learn that should, and does none move that should not? Asked whenever a run starts.

A group without any gradient trains for days without a word: a text adapter whose output never reaches the network, a
layer that the adapter's file has under another name. The step measures, `self_check` judges.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import optax
from jax import Array

from anima_jax.errors import UserError
from anima_jax.models.parameters import Params

ATTEMPTS = 2
"""Steps in which a group must have shown a gradient.

In a fresh network's first step only the output layer has one: it starts at zero, and lets nothing through before it has
been updated once.
"""


class GroupNorms(NamedTuple):
    """By parameter group: the norm of the gradient, and the norm of what the step changed."""

    gradient: Mapping[str, Array | float]
    update: Mapping[str, Array | float]


def group_norms(values: Params, groups: Mapping[str, str]) -> dict[str, Array]:
    """Norm over each group of `values`; `groups` by parameter path."""
    return {
        group: optax.global_norm([value for path, value in values.items() if groups[path] == group])
        for group in sorted({groups[path] for path in values})
    }


def self_check(
    norms: GroupNorms, rates: Mapping[str, float], *, step: int, attempt: int, loss: float, adapter: bool
) -> bool:
    """Whether the run has shown that all is well; if not, the next step is to be measured too.

    `rates` are the groups' learning rates, 0 for frozen; `step` is the run's, the `attempt`-th since it started (from
    1), and `loss` its loss. An `adapter` has no parameters in the group `base`. Raises UserError with the groups' names
    if one is frozen and moved, or should learn and had no gradient in attempt `ATTEMPTS`. A step whose loss is 0 (all
    of it masked) or not finite shows nothing.
    """
    moved = [group for group, norm in norms.update.items() if not rates[group] and float(norm) > 0]
    if moved:
        raise UserError(f"self-check: {_keys(moved)} should be frozen (learning rate 0), but moved in step {step}")
    total = math.hypot(*(float(norm) for norm in norms.gradient.values()))
    if not math.isfinite(total) or not loss or not math.isfinite(loss):
        return False
    learning = [group for group, rate in rates.items() if rate > 0 and not (adapter and group == "base")]
    still = [group for group in learning if not float(norms.gradient.get(group, 0.0))]
    if still and attempt >= ATTEMPTS:
        found = "no parameters" if all(group not in norms.gradient for group in still) else "no gradient"
        raise UserError(
            f"self-check: {_keys(still)} should learn, but had {found} in step {step}; "
            "set the learning rate to 0 to freeze on purpose"
        )
    return not still


def describe(norms: GroupNorms) -> str:
    """A line for each group: the norms of its gradient and of its update."""
    lines = [f"{'group':<12} {'gradient':>12} {'update':>12}"]
    for group, norm in norms.gradient.items():
        lines.append(f"{group:<12} {float(norm):>12.3e} {float(norms.update[group]):>12.3e}")
    return "\n".join(lines)


def _keys(groups: list[str]) -> str:
    noun = "parameter group" if len(groups) == 1 else "parameter groups"
    return f"{noun} {', '.join(sorted(groups))}"
