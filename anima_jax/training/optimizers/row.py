"""What a row of the table of optimizers consists of, and transformations made from one tensor's update rule."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from anima_jax.checkpoints.names import FileTensor
from anima_jax.training.optimizers.layers import transformation


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter as an optimizer sees it: rate (number or schedule), weight decay, first tensor in the file.

    `lr` is the rate of `[optimizer]`, which some optimizers use instead of the group's; `group` is the parameter's
    group; random numbers follow from `seed`, which differs between parameters.
    """

    rate: Any
    weight_decay: float
    tensor: FileTensor
    lr: float = 0.0
    group: str = ""
    seed: int = 0

    def rate_at(self, count: Array) -> Array:
        """Return the rate after `count` steps, float32."""
        return jnp.asarray(self.rate(count) if callable(self.rate) else self.rate, jnp.float32)

    @property
    def transposed(self) -> bool:
        """Whether the file has the transpose of the model's matrix, as for linear layers."""
        if len(self.tensor.shape) != 2:
            return False
        row = self.tensor.layout.to_model(np.broadcast_to(np.arange(self.tensor.shape[0])[:, None], self.tensor.shape))
        return bool(row[0, 0] != row[0, -1])


@dataclasses.dataclass(frozen=True)
class Row:
    """An optimizer and its arguments.

    `make(parameter, **options)` returns the transformation of one parameter. If `shared`, all parameters have a common
    estimate or source of noise, and `make({path: parameter}, rate, **options)` returns one transformation for all.
    """

    name: str
    make: Callable[..., optax.GradientTransformation]
    options: Mapping[str, Any]
    """Argument → default."""
    weight_decay: float = 0.0
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Name of an argument in another library → its name here."""
    elementwise: bool = False
    """Whether the update does not depend on the shape or norm of a tensor."""
    shared: bool = False
    fixed_rate: bool = False
    """Whether the learning rate is a number, which cannot follow a schedule."""
    on_host: bool = False
    """Whether the moments are kept in host memory."""
    offloads: bool = False
    """Whether an argument `cpu_offload` decides that."""
    averages_weights: bool = False
    """Whether the optimizer averages the weights of all steps, which rules out learning rates per layer."""
    decay_in_gradient: bool = False
    """Whether the weight decay is part of the gradient, as in torch's SGD; otherwise it is decoupled."""
    decay_factor: Callable[[Any, Any, Mapping[str, Any]], Any] | None = None
    """Maps the state before the update, the schedule and the options to the factor of the weight decay. None: `make`
    applies the decay."""
    choices: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Argument that is a word → its valid values."""
    undecayed: bool = False
    """Whether there is no weight decay."""
    sums: bool = False
    """Whether a second beta of 1 is valid, and means a sum instead of a running mean."""
    own_rates: bool = False
    """Whether a `shared` optimizer applies each parameter's own rate."""

    @property
    def betas(self) -> tuple[float, ...]:
        """Default values of the arguments that torch calls `betas`."""
        return self.options.get("betas") or tuple(self.options[key] for key in self.beta_names)

    @property
    def beta_names(self) -> tuple[str, ...]:
        """Names of the arguments that torch combines in `betas`."""
        return tuple(key for key in ("b1", "b2", "b3") if key in self.options)


class RuleState(NamedTuple):
    """Number of finished steps, and the rule's own state."""

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride] - optax's name
    own: Any


def from_rule(
    p: Parameter,
    init: Callable[[Array], Any],
    step: Callable[[Array, Any, Array, Array, Array], tuple[Array, Any]],
    *,
    weight_decouple: bool = True,
    fixed_decay: bool = False,
    own_decay: bool = False,
) -> optax.GradientTransformation:
    """Return the transformation of one tensor from its rule.

    init(value) → own state; step(gradient, own state, value, t, rate) → (change of the value, own state), where t is
    the number of this step, from 1. Weight decay is a part of the gradient unless `weight_decouple`; then the value
    shrinks by rate · decay, or by the decay itself if `fixed_decay`. With `own_decay` the step does all of that itself.
    """

    decay = 0.0 if own_decay else p.weight_decay

    def start(value: Array) -> RuleState:
        return RuleState(jnp.zeros((), jnp.int32), init(value))

    def update(grad: Array, state: RuleState, value: Array) -> tuple[Array, RuleState]:
        rate = p.rate_at(state.count)
        if decay and not weight_decouple:
            grad = grad + decay * value
        change, own = step(grad, state.own, value, (state.count + 1).astype(jnp.float32), rate)
        if decay and weight_decouple:
            change = change - decay * (1.0 if fixed_decay else rate) * value
        return change, RuleState(state.count + 1, own)

    return transformation(start, update)


def debias(beta: float, t: Array) -> Array:
    """Return 1 − βᵗ, which float32 would cancel to few digits for β near 1."""
    return -jnp.expm1(t * math.log(beta)) if beta > 0 else jnp.ones_like(t)


def ema(average: Array, value: Array, beta: float | Array) -> Array:
    """Return β · average + (1 − β) · value."""
    return beta * average + (1.0 - beta) * value


def rms(values: Array) -> Array:
    """Return the root of the mean square."""
    return jnp.sqrt(jnp.mean(jnp.square(values)))


def clip_rms(update: Array, threshold: float) -> Array:
    """Return `update`, divided by its RMS / `threshold` where that exceeds 1."""
    return update / jnp.maximum(rms(update) / threshold, 1.0)


def cautious(update: Array, grad: Array) -> Array:
    """Return `update` without the values whose sign is not the gradient's, the others enlarged (arXiv 2411.16085)."""
    mask = (update * grad > 0).astype(jnp.float32)
    return update * mask * (mask.size / (jnp.sum(mask) + 1.0))


class Factored(NamedTuple):
    """Means over the last and the last but one axis of a running mean of squares (arXiv 1804.04235)."""

    row: Array
    col: Array

    @classmethod
    def zeros(cls, value: Array) -> "Factored":
        """Return zeros for an array of at least two axes."""
        return cls(jnp.zeros(value.shape[:-1]), jnp.zeros((*value.shape[:-2], value.shape[-1])))

    def updated(self, square: Array, beta: float | Array) -> "Factored":
        """Return the means after one more square."""
        return Factored(ema(self.row, square.mean(-1), beta), ema(self.col, square.mean(-2), beta))

    @property
    def product(self) -> Array:
        """The approximation of the running mean."""
        return (self.row / self.row.mean(-1, keepdims=True))[..., :, None] * self.col[..., None, :]

    @property
    def inverse_root(self) -> Array:
        """The approximation of its −1/2 power, whose factors stay in float32's range."""
        rows = 1.0 / jnp.sqrt(self.row / self.row.mean(-1, keepdims=True))
        return rows[..., :, None] / jnp.sqrt(self.col)[..., None, :]


def second_moment(value: Array) -> Factored | Array:
    """Return zeros for the factored second moment of a matrix, or for the whole one of a vector."""
    return Factored.zeros(value) if value.ndim > 1 else jnp.zeros_like(value)


def inverse_root(moment: Any, square: Array, beta: float | Array) -> tuple[Array, Any]:
    """Return 1 / √v and v after the step: the running mean of `square`, factored for matrices."""
    if isinstance(moment, Factored):
        moment = moment.updated(square, beta)
        return moment.inverse_root, moment
    moment = ema(moment, square, beta)
    return 1.0 / jnp.sqrt(moment), moment
