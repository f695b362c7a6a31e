"""Prodigy with schedule-free averaging, as in the package prodigy-plus-schedule-free 2.0.

Each group of parameters with one rate and weight decay has its own estimate d of the step size (arXiv 2306.06101). The
weights are those of `schedule_free`; the moments are scaled by d; the update's RMS is clipped (arXiv 2304.13013).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from anima_jax.errors import UserError
from anima_jax.models.parameters import Params
from anima_jax.training.optimizers.generic import bf16
from anima_jax.training.optimizers.layers import transformation
from anima_jax.training.optimizers.row import Factored, Parameter, Row, debias, rms
from anima_jax.training.optimizers.schedule_free import rectified

SLICE = 11
"""One value in so many of a tensor takes part in the estimate."""

FACTORED_FROM = 32
"""Matrices whose longer side has at least so many values have a factored second moment."""

FASTEST = 2.0**0.25
"""Growth of d in a step, at most, with `d_limiter`."""


class StepEstimate(NamedTuple):
    """The estimate d of a group, its numerator, and the sum of the weights of all steps."""

    d: Array
    numerator: Array
    weights: Array


class TensorState(NamedTuple):
    """β1, z, second moment, and in bfloat16 every 11th initial weight and the sum of as many gradients."""

    b1: Array
    z: Array
    square: Any
    first: Array
    slope: Array

    def average(self, y: Array) -> Array:
        """Return x in float32."""
        return (y.astype(jnp.float32) - (1.0 - self.b1) * self.z) / self.b1


class PlusState(NamedTuple):
    """Finished steps, the estimates by group, and the state of each tensor by path."""

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride] - optax's name
    estimates: dict[str, StepEstimate]
    own: dict[str, TensorState]


@dataclasses.dataclass(frozen=True)
class ProdigyPlus:
    """The optimizer's arguments, under their names in the package."""

    betas: tuple[float, float]
    beta3: float | None
    weight_decay_by_lr: bool
    d0: float
    d_coef: float
    d_limiter: bool
    prodigy_steps: int
    schedulefree_c: float
    eps: float
    split_groups: bool
    split_groups_mean: bool
    factored: bool
    use_bias_correction: bool
    use_stableadamw: bool
    use_cautious: bool
    use_grams: bool
    use_orthograd: bool

    @property
    def slow(self) -> float:
        """The decay of the estimate's sums."""
        return self.betas[1] ** 0.5 if self.beta3 is None else self.beta3

    def init(self, p: Parameter, value: Array) -> TensorState:
        """Return the state of one tensor."""
        factored = self.factored and value.ndim > 1 and max(value.shape) >= FACTORED_FROM
        first = _slice(p, value).astype(jnp.bfloat16)
        square = Factored.zeros(value) if factored else jnp.zeros_like(value)
        return TensorState(jnp.full((), self.betas[0]), value, square, first, jnp.zeros_like(first))

    def step(
        self,
        p: Parameter,
        grad: Array,
        own: TensorState,
        y: Array,
        t: Array,
        rate: Array,
        estimate: StepEstimate,
        d: Array,
    ) -> tuple[Array, TensorState, Array, Array]:
        """Return the change of one tensor, its state, and its part of the estimate's numerator and denominator.

        `d` is the step size that is used, `estimate.d` that of the tensor's own group.
        """
        beta2, size, reliable = self.betas[1], d * rate, jnp.array(True)
        if self.use_bias_correction:
            factor, reliable = rectified(beta2, t)
            size = size * jnp.where(reliable, factor, 0.0)
            beta2 = 1.0 - (1.0 - beta2) / debias(beta2, t)
        new = (1.0 - beta2) * jnp.square(estimate.d) * jnp.square(grad)
        if isinstance(own.square, Factored):
            square = Factored(beta2 * own.square.row + new.mean(-1), beta2 * own.square.col + new.mean(-2))
            root = jnp.sqrt(_product(p, square))
        else:
            square = beta2 * own.square + new
            root = jnp.sqrt(square)
        update = jnp.where(reliable, estimate.d * grad / (root + estimate.d * self.eps), grad)
        if self.use_orthograd:
            update = _orthogonal(own.z, update)
        if self.use_stableadamw:
            update = update / jnp.sqrt(jnp.maximum(rms(update), 1.0))
        numerator, denominator, slope = self._measured(p, grad, own, estimate.d)
        change, z = self._moved(update, own.z, y, size, estimate, p.weight_decay)
        return change, own._replace(z=z, square=square, slope=slope), numerator, denominator

    def _measured(self, p: Parameter, grad: Array, own: TensorState, d: Array) -> tuple[Array, Array, Array]:
        weight, part = jnp.square(d) / self.d0**0.5, _slice(p, grad)
        numerator = weight * jnp.sum(part * (own.first.astype(jnp.float32) - _slice(p, own.z)))
        slope = bf16(bf16(self.slow * own.slope.astype(jnp.float32)) + weight * part)
        return numerator, bf16(jnp.sum(jnp.abs(slope))), slope.astype(jnp.bfloat16)

    def _moved(
        self, update: Array, z: Array, y: Array, size: Array, estimate: StepEstimate, decay: float
    ) -> tuple[Array, Array]:
        """Return the change of y, and z after the step."""
        weight = jnp.square(size)
        total = estimate.weights + weight
        share = jnp.where(total > 0, weight / jnp.where(total > 0, total, 1.0), 0.0)
        if self.schedulefree_c:
            share = jnp.minimum(1.0, share * (1.0 - self.betas[0]) * self.schedulefree_c)
        step = 1.0 - self.betas[0] * (1.0 - share)
        if self.weight_decay_by_lr:
            update = update + decay * y
        if self.use_cautious or self.use_grams:
            down = share * (y - z) + size * step * update
            agree = (down * update > 0).astype(jnp.float32)
            down = jnp.where(agree > 0, down / jnp.maximum(agree.mean(), 1e-3), 0.0)
            change = -down if self.use_cautious else -jnp.abs(share * (y - z) + size * step * update) * jnp.sign(update)
        else:
            change = share * (z - y) - size * step * update
        z = z - size * update
        if not self.weight_decay_by_lr:
            change, z = change - decay * step * y, z - decay * y
        return change, z

    def estimated(
        self, old: StepEstimate, numerator: Array, denominator: Array, weights: Array, t: Array
    ) -> StepEstimate:
        """Return the estimate after a step with these sums over the group's tensors."""
        total = self.slow * old.numerator + jnp.where((old.d > self.d0) | (numerator > 0), numerator, 0.0)
        better = total / jnp.where(denominator > 0, denominator, 1.0)
        if self.d_limiter:
            better = jnp.minimum(old.d * FASTEST, better)
        d = jnp.where(denominator > 0, jnp.maximum(old.d, better * self.d_coef), old.d)
        if self.prodigy_steps:
            fixed = t >= self.prodigy_steps
            d, total = jnp.where(fixed, old.d, d), jnp.where(fixed, old.numerator, total)
        return StepEstimate(d, total, weights)


def _product(p: Parameter, square: Factored) -> Array:
    """Return the second moment of a matrix. If it is taller than wide in the file, only its rows differ: the package
    then divides the means of the columns by themselves.
    """
    row, col = square.row[..., :, None], square.col[..., None, :]
    rows, columns = (col, row) if p.transposed else (row, col)  # means over the file's columns, and over its rows
    if p.tensor.shape[0] > p.tensor.shape[1]:
        return columns / (columns + 1e-30) * rows
    return row / (row.mean(-2, keepdims=True) + 1e-30) * col


def _slice(p: Parameter, value: Array) -> Array:
    """Return every 11th value in the order of the file."""
    ordered: Any = p.tensor.layout.to_file(value)  # pyright: ignore[reportArgumentType] - has NumPy's methods
    return ordered.reshape(-1)[::SLICE]


def _orthogonal(weights: Array, update: Array) -> Array:
    """Return the update without its part along the weights, with the same norm."""
    flat = update - weights * (jnp.sum(weights * update) / (jnp.sum(jnp.square(weights)) + 1e-30))
    scaled = flat * (jnp.linalg.norm(update) / (jnp.linalg.norm(flat) + 1e-30))
    return jnp.where(jnp.linalg.norm(weights) <= 1e-30, update, scaled)


def _make(ps: Mapping[str, Parameter], rate: Any, **options: Any) -> optax.GradientTransformation:
    """Return the transformation of all parameters; each follows the rate of its own group."""
    del rate
    rule = ProdigyPlus(**options)
    if rule.use_cautious and rule.use_grams:
        raise UserError("[optimizer] use_cautious, use_grams: only one of them can be true")
    group_of = {path: f"{p.group} {p.weight_decay}" for path, p in ps.items()}
    names = sorted(set(group_of.values()))
    split = rule.split_groups and len(names) > 1

    def init(params: Params) -> PlusState:
        zero = jnp.zeros(())
        estimates = {name: StepEstimate(jnp.full((), rule.d0), zero, zero) for name in names}
        own = {
            path: _over(ps[path], lambda one, p=ps[path]: rule.init(p, one))(value) for path, value in params.items()
        }
        own = {path: state._replace(b1=jnp.full((), rule.betas[0])) for path, state in own.items()}
        return PlusState(jnp.zeros((), jnp.int32), estimates, own)

    def update(grads: Params, state: PlusState, params: Params) -> tuple[Params, PlusState]:
        t, old = (state.count + 1).astype(jnp.float32), state.estimates
        mean = jnp.asarray(len(names) / sum(1.0 / one.d for one in old.values()))
        changes, own, sums = {}, {}, {name: [jnp.zeros(()), jnp.zeros(())] for name in names}
        rates: dict[str, Array] = {}
        for path, grad in grads.items():
            p, name = ps[path], group_of[path]
            rates[name] = p.rate_at(state.count)
            d = mean if split and rule.split_groups_mean else old[name].d

            def one(grad: Array, own: TensorState, y: Array, p: Parameter = p, name: str = name, d: Array = d) -> Any:
                own = own._replace(b1=jnp.full((), rule.betas[0]))
                change, own, *parts = rule.step(p, grad, own, y, t, rates[name], old[name], d)
                return change, own, jnp.stack(parts)

            stacked = state.own[path]._replace(b1=None)
            change, new, parts = _over(p, one)(grad, stacked, params[path])
            changes[path], own[path] = change, new._replace(b1=state.own[path].b1)
            parts = parts.sum(0) if p.tensor.layer is not None else parts
            sums[name] = [sums[name][0] + parts[0], sums[name][1] + parts[1]]
        if not split:
            whole = [jnp.sum(jnp.stack([one[index] for one in sums.values()])) for index in (0, 1)]
            sums = dict.fromkeys(names, whole)
        new = {}
        for name in names:
            d = mean if split and rule.split_groups_mean else old[name].d
            size = d * rates[name]
            if rule.use_bias_correction:
                factor, reliable = rectified(rule.betas[1], t)
                size = size * jnp.where(reliable, factor, 0.0)
            numerator, denominator = sums[name]
            new[name] = rule.estimated(old[name], numerator, denominator, old[name].weights + jnp.square(size), t)
        return changes, PlusState(state.count + 1, new, own)

    return transformation(init, update)


def _over(p: Parameter, function: Any) -> Any:
    """Return `function`, mapped over the layers of a stacked parameter."""
    return jax.vmap(function) if p.tensor.layer is not None else function


ROWS = (
    Row(
        "prodigy_plus_schedule_free",
        _make,
        {
            "betas": (0.9, 0.99),
            "beta3": None,
            "weight_decay_by_lr": True,
            "d0": 1e-6,
            "d_coef": 1.0,
            "d_limiter": True,
            "prodigy_steps": 0,
            "schedulefree_c": 0.0,
            "eps": 1e-8,
            "split_groups": True,
            "split_groups_mean": False,
            "factored": True,
            "use_bias_correction": False,
            "use_stableadamw": True,
            "use_cautious": False,
            "use_grams": False,
            "use_orthograd": False,
        },
        shared=True,
        own_rates=True,
        averages_weights=True,
    ),
)
