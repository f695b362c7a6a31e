"""Optimizers of pytorch_optimizer and torch that need no statistics but their own moments, each as one short rule.

Arguments, defaults and the place of the weight decay are theirs. A rule maps the gradient, the state, the value, the
step t from 1 and the rate to the change of the value and the new state.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from anima_jax.training.optimizers.generic import orthogonalise
from anima_jax.training.optimizers.row import Parameter, Row, cautious, debias, ema, from_rule
from anima_jax.training.optimizers.schedule_free import averaged_steps, rectified

Betas = tuple[float, float]
Rule = Callable[[Array, Any, Array, Array, Array], tuple[Array, Any]]


def _zeros(count: int) -> Callable[[Array], tuple[Array, ...]]:
    return lambda value: tuple(jnp.zeros_like(value) for _ in range(count))


def _corrected(square: Array, beta: float, t: Array) -> Array:
    return jnp.sqrt(square / debias(beta, t))


def _adan(p: Parameter, *, betas: tuple[float, float, float], eps: float, weight_decouple: bool) -> Any:
    """Return Adan (arXiv 2208.06677)."""
    b1, b2, b3 = betas

    def step(grad: Array, own: Any, value: Array, t: Array, rate: Array) -> tuple[Array, Any]:
        mean, slope, square, last = own
        difference = jnp.where(t == 1, 0.0, grad - last)
        mean, slope = ema(mean, grad, b1), ema(slope, difference, b2)
        square = ema(square, jnp.square(grad + b2 * difference), b3)
        update = (mean / debias(b1, t) + b2 * slope / debias(b2, t)) / (_corrected(square, b3, t) + eps)
        decay = rate * p.weight_decay
        change = -decay * value - rate * update
        return (change if weight_decouple else change / (1.0 + decay)), (mean, slope, square, grad)

    return from_rule(p, _zeros(4), step, own_decay=True)


def _mars(
    p: Parameter,
    *,
    betas: Betas,
    gamma: float,
    mars_type: str,
    optimize_1d: bool,
    lr_1d: float,
    betas_1d: Betas,
    weight_decay_1d: float,
    ams_bound: bool,
    eps: float,
    weight_decouple: bool,
    fixed_decay: bool,
    **flags: bool,
) -> optax.GradientTransformation:
    """Return MARS (arXiv 2411.10438). A vector has its own rate, betas and weight decay unless `optimize_1d`."""
    matrix = len(p.tensor.shape) > 1
    mixed = matrix or optimize_1d
    b1, b2 = betas if mixed else betas_1d
    factor = 1.0 if mixed or not p.lr else lr_1d / p.lr
    decay = p.weight_decay if mixed else weight_decay_1d

    def step(grad: Array, own: Any, value: Array, t: Array, rate: Array) -> tuple[Array, Any]:
        mean, square, last, largest = own
        size, corrected = rate * factor, grad
        if mixed:
            corrected = grad + gamma * b1 / (1.0 - b1) * (grad - last)
            corrected = corrected / jnp.maximum(1.0, jnp.linalg.norm(corrected))
        mean = ema(mean, corrected, b1)
        update = cautious(mean, grad) if flags["cautious"] else mean
        if mixed and mars_type == "lion":
            update = jnp.sign(update)
        elif matrix and mars_type == "shampoo":
            rows, columns = p.tensor.shape
            whole = orthogonalise(update / (1.0 - b1), fused=True, eps=eps)
            update = whole * math.sqrt(max(1.0, rows / columns))
        else:
            square = ema(square, jnp.square(corrected), b2)
            largest = jnp.maximum(largest, square) if largest is not None else None
            root = jnp.sqrt((square if largest is None else largest) + 1e-15) + eps
            update = update / (root / jnp.sqrt(debias(b2, t)) * debias(b1, t))
        change = -size * update
        if weight_decouple:
            change = change - decay * (1.0 if fixed_decay else size) * value
        else:
            grad = grad + decay * value  # torch adds it after the moments, so that only `last` has it
        return change, (mean, square, grad, largest)

    def init(value: Array) -> Any:
        return (*_zeros(3)(value), jnp.zeros_like(value) if ams_bound else None)

    return from_rule(p, init, step, own_decay=True)


def _rule(count: int, rule: Callable[..., tuple[Array, Any]], first: float = 0.0) -> Callable[..., Any]:
    """Return a row's `make` from a rule on `count` moments, which begin at `first`."""

    def make(p: Parameter, weight_decouple: bool, fixed_decay: bool = False, **options: Any) -> Any:
        def init(value: Array) -> tuple[Array, ...]:
            return tuple(jnp.full_like(value, first) for _ in range(count))

        step = functools.partial(rule, **options)
        return from_rule(p, init, step, weight_decouple=weight_decouple, fixed_decay=fixed_decay)

    return make


def _radam(
    p: Parameter,
    *,
    betas: Betas,
    eps: float,
    n_sma_threshold: int,
    degenerated_to_sgd: bool,
    weight_decouple: bool,
    fixed_decay: bool,
) -> optax.GradientTransformation:
    """Return RAdam (arXiv 1908.03265). Weights that do not move do not decay."""

    def step(grad: Array, own: Any, value: Array, t: Array, rate: Array) -> tuple[Array, Any]:
        mean, square = ema(own[0], grad, betas[0]), ema(own[1], jnp.square(grad), betas[1])
        used = averaged_steps(betas[1], t) >= n_sma_threshold
        adam = rectified(betas[1], t)[0] * jnp.sqrt(debias(betas[1], t)) * mean / (jnp.sqrt(square) + eps)
        update = jnp.where(used, adam, mean if degenerated_to_sgd else 0.0) / debias(betas[0], t)
        decay = p.weight_decay * (1.0 if fixed_decay else rate) if weight_decouple else 0.0
        return -rate * update - jnp.where(used | degenerated_to_sgd, decay, 0.0) * value, (mean, square)

    return from_rule(p, _zeros(2), step, own_decay=True)


def _adabelief(
    grad: Array, own: Any, value: Array, t: Array, rate: Array, *, betas: Betas, eps: float
) -> tuple[Array, Any]:
    mean = ema(own[0], grad, betas[0])
    variance = ema(own[1], jnp.square(grad - mean), betas[1]) + eps
    return -rate / debias(betas[0], t) * mean / (_corrected(variance, betas[1], t) + eps), (mean, variance)


def _adamax(grad: Array, own: Any, value: Array, t: Array, rate: Array, *, betas: Betas, eps: float) -> Any:
    mean, largest = ema(own[0], grad, betas[0]), jnp.maximum(betas[1] * own[1], jnp.abs(grad) + eps)
    return -rate / debias(betas[0], t) * mean / largest, (mean, largest)


def _yogi(grad: Array, own: Any, value: Array, t: Array, rate: Array, *, betas: Betas, eps: float) -> Any:
    mean, new = ema(own[0], grad, betas[0]), jnp.square(grad)
    square = own[1] - (1.0 - betas[1]) * jnp.sign(own[1] - new) * new
    return -rate / debias(betas[0], t) * mean / (_corrected(square, betas[1], t) + eps), (mean, square)


def _adopt(grad: Array, own: Any, value: Array, t: Array, rate: Array, *, betas: Betas, eps: float) -> Any:
    new = jnp.square(grad)
    square = jnp.where(t == 1, new, own[1])
    normed = jnp.clip(grad / jnp.maximum(jnp.sqrt(square), eps), -(t**0.25), t**0.25)
    mean = jnp.where(t == 1, own[0], ema(own[0], normed, betas[0]))  # the first step only measures
    return -rate * mean, (mean, jnp.where(t == 1, new, ema(square, new, betas[1])))


def _ademamix(
    grad: Array, own: Any, value: Array, t: Array, rate: Array, *, betas: tuple[float, ...], eps: float, alpha: float
) -> tuple[Array, Any]:
    b1, b2, b3 = betas
    mean, square, slow = ema(own[0], grad, b1), ema(own[1], jnp.square(grad), b2), ema(own[2], grad, b3)
    return -rate * (mean / debias(b1, t) + alpha * slow) / (_corrected(square, b2, t) + eps), (mean, square, slow)


def _simplified_ademamix(
    grad: Array, own: Any, value: Array, t: Array, rate: Array, *, betas: Betas, eps: float, alpha: float
) -> tuple[Array, Any]:
    mean, square, scale = ema(own[0], grad, betas[0]), ema(own[1], jnp.square(grad), betas[1]), debias(betas[1], t)
    return -rate * (mean + alpha * grad) / (jnp.sqrt(square) + jnp.sqrt(scale) * eps) / jnp.sqrt(scale), (mean, square)


def _adadelta(grad: Array, own: Any, value: Array, t: Array, rate: Array, *, rho: float, eps: float) -> Any:
    square = ema(own[0], jnp.square(grad), rho)
    delta = jnp.sqrt(own[1] + eps) / jnp.sqrt(square + eps) * grad
    return -rate * delta, (square, ema(own[1], jnp.square(delta), rho))


def _sign_sgd(grad: Array, own: Any, value: Array, t: Array, rate: Array, *, momentum: float) -> Any:
    mean = ema(own[0], grad, momentum)
    return -rate * jnp.sign(mean), (mean,)


def _tiger(grad: Array, own: Any, value: Array, t: Array, rate: Array, *, beta: float) -> Any:
    mean = ema(own[0], grad, beta)
    return -rate * jnp.sign(mean), (mean,)


def _lamb(grad: Array, own: Any, value: Array, t: Array, rate: Array, *, betas: Betas, eps: float, decay: float) -> Any:
    mean, square = ema(own[0], grad, betas[0]), ema(own[1], jnp.square(grad), betas[1])
    update, kept = mean / (jnp.sqrt(square) + eps), value * (1.0 - rate * decay)
    norm, new = jnp.minimum(jnp.linalg.norm(kept), 10.0), jnp.linalg.norm(update)
    ratio = jnp.where((norm == 0) | (new == 0), 1.0, norm / (new + eps))
    return -rate / debias(betas[0], t) * ratio * update - rate * decay * value, (mean, square)


def _make_lamb(p: Parameter, **options: Any) -> optax.GradientTransformation:
    step = functools.partial(_lamb, decay=p.weight_decay, **options)
    return from_rule(p, _zeros(2), step, own_decay=True)


def _fromage(grad: Array, own: Any, value: Array, t: Array, rate: Array) -> tuple[Array, Any]:
    size, length = jnp.linalg.norm(value), jnp.linalg.norm(grad)
    ratio = jnp.where((size > 0) & (length > 0), size / length, 1.0)
    return (value - rate * ratio * grad) / jnp.sqrt(1.0 + jnp.square(rate)) - value, own


def _novograd(
    p: Parameter, *, betas: Betas, eps: float, grad_averaging: bool, weight_decouple: bool, fixed_decay: bool
) -> optax.GradientTransformation:
    """Return NovoGrad (arXiv 1905.11286): one second moment for a tensor; decay in the gradient after it is scaled."""

    def init(value: Array) -> Any:
        return jnp.zeros_like(value), jnp.zeros(())

    def step(grad: Array, own: Any, value: Array, t: Array, rate: Array) -> tuple[Array, Any]:
        length = jnp.sum(jnp.square(grad))
        square = jnp.where(t == 1, length, ema(own[1], length, betas[1]))
        scaled, decay = grad / (jnp.sqrt(square) + eps), p.weight_decay * (1.0 if fixed_decay else rate)
        if not weight_decouple:
            scaled, decay = scaled + p.weight_decay * value, 0.0
        share = 1.0 - betas[0] if grad_averaging else 1.0
        mean = jnp.where(t == 1, scaled, betas[0] * own[0] + share * scaled)
        return -rate * mean - decay * value, (mean, square)

    return from_rule(p, init, step, own_decay=True)


def _lars(
    p: Parameter, *, momentum: float, dampening: float, trust_coefficient: float, nesterov: bool
) -> optax.GradientTransformation:
    """Return LARS (arXiv 1708.03888); vectors have neither its ratio nor weight decay."""

    def step(grad: Array, own: Any, value: Array, t: Array, rate: Array) -> tuple[Array, Any]:
        if value.ndim > 1:
            size = jnp.linalg.norm(value)
            whole = jnp.linalg.norm(grad) + p.weight_decay * size
            ratio = jnp.where((size > 0) & (whole > 0), trust_coefficient * size / whole, 1.0)
            grad = ratio * (grad + p.weight_decay * value)
        if not momentum:
            return -rate * grad, own
        mean = momentum * own[0] + (1.0 - dampening) * grad
        return -rate * (grad + momentum * mean if nesterov else mean), (mean,)

    return from_rule(p, _zeros(1), step, own_decay=True)


def _sm3(p: Parameter, *, momentum: float, beta: float, eps: float) -> optax.GradientTransformation:
    """Return SM3 (arXiv 1901.11150), with a bound of the squares per index of each axis."""

    def init(value: Array) -> Any:
        bounds = tuple(
            jnp.zeros([side if axis == other else 1 for other, side in enumerate(value.shape)])
            for axis in range(value.ndim)
        )
        return bounds, jnp.zeros_like(value) if momentum else None

    def step(grad: Array, own: Any, value: Array, t: Array, rate: Array) -> tuple[Array, Any]:
        bounds, mean = own
        square = (beta or 1.0) * functools.reduce(jnp.minimum, bounds) + (1.0 - beta) * jnp.square(grad)
        new = []
        for axis, bound in enumerate(bounds):
            others = [other for other in range(grad.ndim) if other != axis]
            most = jnp.max(square, others, keepdims=True)
            new.append(jnp.maximum(bound, most) if beta else most)
        update = grad / jnp.sqrt(square + eps)
        if mean is not None:
            update = mean = ema(mean, update, momentum)
        return -rate * update, (tuple(new), mean)

    return from_rule(p, init, step)


def _adam(p: Parameter, *, b1: float, b2: float, eps: float, nesterov: bool) -> optax.GradientTransformation:
    """Return Adam as in torch: the weight decay is part of the gradient."""
    return optax.chain(optax.add_decayed_weights(p.weight_decay), optax.adam(p.rate, b1, b2, eps, nesterov=nesterov))


def _nadam(
    p: Parameter, *, b1: float, b2: float, eps: float, momentum_decay: float, decoupled_weight_decay: bool
) -> optax.GradientTransformation:
    """Return torch's NAdam, with the product of its momenta in the state."""

    def init(value: Array) -> Any:
        return (*_zeros(2)(value), jnp.ones(()))

    def step(grad: Array, own: Any, value: Array, t: Array, rate: Array) -> tuple[Array, Any]:
        mean, square = ema(own[0], grad, b1), ema(own[1], jnp.square(grad), b2)
        now, then = (b1 * (1.0 - 0.5 * 0.96 ** (n * momentum_decay)) for n in (t, t + 1))
        product = own[2] * now
        update = (1.0 - now) / (1.0 - product) * grad + then / (1.0 - product * then) * mean
        return -rate * update / (_corrected(square, b2, t) + eps), (mean, square, product)

    return from_rule(p, init, step, weight_decouple=decoupled_weight_decay)


def _rmsprop(
    p: Parameter, *, alpha: float, eps: float, momentum: float, centered: bool
) -> optax.GradientTransformation:
    """Return torch's RMSprop, whose weight decay is part of the gradient."""

    def step(grad: Array, own: Any, value: Array, t: Array, rate: Array) -> tuple[Array, Any]:
        square, mean, buffer = ema(own[0], jnp.square(grad), alpha), ema(own[1], grad, alpha), own[2]
        update = grad / (jnp.sqrt(square - jnp.square(mean) if centered else square) + eps)
        buffer = momentum * buffer + update
        return -rate * buffer, (square, mean, buffer)

    return from_rule(p, _zeros(3), step, weight_decouple=False)


_DECOUPLED = {"weight_decouple": True, "fixed_decay": False}
_COUPLED = {"weight_decouple": False, "fixed_decay": False}
_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}
_MARS = {
    "betas": (0.95, 0.99),
    "gamma": 0.025,
    "mars_type": "adamw",
    "optimize_1d": False,
    "lr_1d": 3e-3,
    "betas_1d": (0.9, 0.95),
    "weight_decay_1d": 0.1,
    "ams_bound": False,
    "cautious": False,
    "eps": 1e-8,
}
_RADAM = _ADAM | {"n_sma_threshold": 5, "degenerated_to_sgd": False}

ROWS = (
    Row("adan", _adan, {"betas": (0.98, 0.92, 0.99), "eps": 1e-8, "weight_decouple": False}, elementwise=True),
    Row("mars", _mars, _MARS | _DECOUPLED, choices={"mars_type": ("adamw", "lion", "shampoo")}),
    Row("radam", _radam, _RADAM | _DECOUPLED, elementwise=True),
    Row("adabelief", _rule(2, _adabelief), _ADAM | {"eps": 1e-16} | _DECOUPLED, elementwise=True),
    Row("adamax", _rule(2, _adamax), _ADAM | _COUPLED, elementwise=True),
    Row("yogi", _rule(2, _yogi, 1e-6), _ADAM | {"eps": 1e-3} | _DECOUPLED, elementwise=True),
    Row("adopt", _rule(2, _adopt), {"betas": (0.9, 0.9999), "eps": 1e-6} | _COUPLED, elementwise=True),
    Row(
        "ademamix",
        _rule(3, _ademamix),
        {"betas": (0.9, 0.999, 0.9999), "eps": 1e-8, "alpha": 5.0} | _COUPLED,
        elementwise=True,
    ),
    Row(
        "simplified_ademamix",
        _rule(2, _simplified_ademamix),
        {"betas": (0.99, 0.95), "eps": 1e-8, "alpha": 0.0} | _DECOUPLED,
        elementwise=True,
    ),
    Row("adadelta", _rule(2, _adadelta), {"rho": 0.9, "eps": 1e-6} | _COUPLED, elementwise=True),
    Row("sign_sgd", _rule(1, _sign_sgd), {"momentum": 0.9, "weight_decouple": True}, elementwise=True),
    Row("tiger", _rule(1, _tiger), {"beta": 0.965} | _DECOUPLED, weight_decay=0.01, elementwise=True),
    Row("lamb", _make_lamb, {"betas": (0.9, 0.999), "eps": 1e-6}),
    Row("fromage", lambda p: from_rule(p, _zeros(0), _fromage), {}, undecayed=True),
    Row("novograd", _novograd, {"betas": (0.95, 0.98), "eps": 1e-8, "grad_averaging": False} | _COUPLED),
    Row(
        "lars",
        _lars,
        {"momentum": 0.9, "dampening": 0.0, "trust_coefficient": 1e-3, "nesterov": False},
        decay_in_gradient=True,
    ),
    Row("sm3", _sm3, {"momentum": 0.0, "beta": 0.0, "eps": 1e-30}, undecayed=True),
    Row(
        "adam",
        _adam,
        {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "nesterov": False},
        elementwise=True,
        decay_in_gradient=True,
    ),
    Row(
        "nadam",
        _nadam,
        {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "momentum_decay": 4e-3, "decoupled_weight_decay": False},
        elementwise=True,
    ),
    Row(
        "rmsprop",
        _rmsprop,
        {"alpha": 0.99, "eps": 1e-8, "momentum": 0.0, "centered": False},
        aliases={"decay": "alpha"},
        elementwise=True,
        decay_in_gradient=True,
    ),
)
