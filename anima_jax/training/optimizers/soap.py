"""SOAP (arXiv 2409.11321) as in pytorch_optimizer: Adam in the eigenbasis of Shampoo's preconditioner.

The first basis is that of the first gradient. On the longer side of a matrix part of it is arbitrary: there, rounding
decides how the first updates look, in pytorch_optimizer too. From the same first basis both take the same steps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from anima_jax.training.optimizers.row import Parameter, Row, debias, ema, from_rule, rms


class SoapState(NamedTuple):
    """Momentum, second moment in the eigenbasis, and per axis the mean of the outer products and its eigenvectors.

    An axis without preconditioner has None.
    """

    mean: Array
    square: Array
    outer: tuple[Array | None, ...]
    basis: tuple[Array | None, ...]


def _rotated(values: Array, basis: tuple[Array | None, ...], back: bool = False) -> Array:
    """Return an array in the eigenbasis, or an array of the eigenbasis `back` in that of the weights."""
    for axis, vectors in enumerate(basis):
        if vectors is not None:
            values = jnp.moveaxis(jnp.tensordot(values, vectors, ((axis,), (1 if back else 0,))), -1, axis)
    return values


def _outer(grad: Array, axis: int) -> Array:
    """Return the product of a gradient with itself over all axes but one."""
    others = [other for other in range(grad.ndim) if other != axis]
    return jnp.tensordot(grad, grad, (others, others))


def _refined(own: SoapState) -> SoapState:
    """Return the state with the basis after one step of power iteration, its vectors in order of their eigenvalues."""
    square, bases = own.square, []
    for axis, (outer, basis) in enumerate(zip(own.outer, own.basis, strict=True)):
        if outer is None or basis is None:
            bases.append(None)
            continue
        product = outer @ basis
        order = jnp.argsort(-jnp.sum(basis * product, axis=0))
        square = jnp.take(square, order, axis=axis)
        bases.append(jnp.linalg.qr(product[:, order])[0])
    return own._replace(square=square, basis=tuple(bases))


def _soap(
    p: Parameter,
    *,
    betas: tuple[float, float],
    shampoo_beta: float | None,
    precondition_frequency: int,
    max_precondition_dim: int,
    precondition_1d: bool,
    correct_bias: bool,
    normalize_gradient: bool,
    eps: float,
) -> optax.GradientTransformation:
    """Return SOAP for one tensor. The first step only measures; the basis changes every `precondition_frequency`."""
    decay_of_outer = betas[1] if shampoo_beta is None else shampoo_beta

    def init(value: Array) -> SoapState:
        whole = value.ndim > 1 or precondition_1d
        sides = [side if whole and side <= max_precondition_dim else 0 for side in value.shape]
        zeros = tuple(jnp.zeros((side, side)) if side else None for side in sides)
        return SoapState(jnp.zeros_like(value), jnp.zeros_like(value), zeros, zeros)

    def measured(grad: Array, own: SoapState) -> SoapState:
        outer = tuple(
            None if one is None else ema(one, _outer(grad, axis), decay_of_outer) for axis, one in enumerate(own.outer)
        )
        return own._replace(outer=outer)

    def first(grad: Array, own: SoapState, value: Array) -> tuple[Array, SoapState]:
        own = measured(grad, own)
        basis = tuple(None if one is None else jnp.linalg.eigh(one)[1][:, ::-1] for one in own.outer)
        return jnp.zeros_like(value), own._replace(basis=basis)

    def step(grad: Array, own: SoapState, value: Array, t: Array, rate: Array) -> tuple[Array, SoapState]:
        def later(grad: Array, own: SoapState, value: Array) -> tuple[Array, SoapState]:
            size = rate * (jnp.sqrt(debias(betas[1], t - 1)) / debias(betas[0], t - 1) if correct_bias else 1.0)
            mean = ema(own.mean, grad, betas[0])
            square = ema(own.square, jnp.square(_rotated(grad, own.basis)), betas[1])
            update = _rotated(_rotated(mean, own.basis) / (jnp.sqrt(square) + eps), own.basis, back=True)
            if normalize_gradient:
                update = update / (rms(update) + eps)
            own = measured(grad, own._replace(mean=mean, square=square))
            own = jax.lax.cond((t - 1) % precondition_frequency == 0, _refined, lambda kept: kept, own)
            return -size * update - rate * p.weight_decay * (value - size * update), own

        return jax.lax.cond(t == 1, first, later, grad, own, value)

    return from_rule(p, init, step, own_decay=True)


ROWS = (
    Row(
        "soap",
        _soap,
        {
            "betas": (0.95, 0.95),
            "shampoo_beta": None,
            "precondition_frequency": 10,
            "max_precondition_dim": 10000,
            "precondition_1d": False,
            "correct_bias": True,
            "normalize_gradient": False,
            "eps": 1e-8,
        },
        weight_decay=0.01,
    ),
)
