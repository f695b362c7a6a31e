"""diffusion-pipe's GenericOptim (optimizers/generic_optim.py): Adam with other moments, Muon, AdaMuon and NorMuon.

Muon: Jordan 2024, its update scaled to the RMS of AdamW's (arXiv 2502.16982). AdaMuon: arXiv 2507.11005. NorMuon: arXiv
2510.05491. Subset norms and subspace momentum: arXiv 2411.07120.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from anima_jax.checkpoints.names.groups import is_decayed
from anima_jax.errors import UserError
from anima_jax.training.optimizers.row import Factored, Parameter, Row, debias, ema, from_rule

SMALLEST_SIDE = 32
"""Matrices with a smaller side are updated as Adam does (`GenericOptim.step`)."""

RMS = 0.2
"""RMS of a Muon update at a rate of 1, near AdamW's."""

NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Coefficients of arXiv 2505.16932, figure 3."""


def bf16(values: Array) -> Array:
    """Return float32 `values` rounded to bfloat16, which XLA would leave out between two conversions."""
    return jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)


def _matmul(x: Array, y: Array) -> Array:
    """Return the product, in float32, of matrices whose values are bfloat16."""
    return jnp.matmul(x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


def orthogonalise(matrix: Array, polar_express: bool = False, *, fused: bool = False, eps: float = 1e-7) -> Array:
    """Return roughly U·Vᵀ of the singular value decomposition of a matrix, by x ← a·x + (b·x·xᵀ + c·(x·xᵀ)²)·x.

    It rounds to bfloat16 wherever diffusion-pipe does, or if `fused` where pytorch_optimizer does. The iteration
    enlarges these errors: float32 would differ from either by 3 %.
    """
    steps: Sequence[tuple[float, float, float]] = POLAR_EXPRESS if polar_express else NEWTON_SCHULZ
    once = fused or polar_express
    wide = matrix.shape[0] <= matrix.shape[1]
    x = bf16(matrix if wide else matrix.T)
    norm = bf16(jnp.linalg.norm(x))
    if fused:
        norm = jnp.maximum(norm, eps)
    else:
        norm = bf16(bf16(norm * 1.02) + 1e-6 if polar_express else norm + eps)
    x = bf16(x / norm)
    for a, b, c in steps:
        gram = bf16(_matmul(x, x.T))
        if fused:
            factor = bf16(b * gram + c * _matmul(gram, gram))
        else:
            factor = bf16(bf16(b * gram) + bf16(_matmul(bf16(c * gram), gram)))
        product = _matmul(factor, x)
        x = bf16(a * x + product) if once else bf16(bf16(a * x) + bf16(product))
    return x if wide else x.T


class GenericState(NamedTuple):
    """Moments of GenericOptim; those that its options do not need are None.

    `mean` is the momentum, in the subspace `basis` if there is one; `square` the second moment; `lines` the mean square
    of each row or column (NorMuon); `rates` the learning rates of automagic, with the sign of the last gradient.
    """

    mean: Array | None
    square: Any
    lines: Array | None
    rates: Array | None
    basis: Array | None


@dataclasses.dataclass(frozen=True)
class GenericOptim:
    """GenericOptim for one tensor: its options under their names in diffusion-pipe, with `betas` as `b1` and `b2`."""

    p: Parameter
    b1: float
    b2: float
    eps: float
    correct_bias: bool
    momentum_type: str
    second_moment_type: str
    correct_dim: bool
    muon: bool
    adamuon: bool
    normuon: bool
    polar_express: bool
    automagic: bool
    min_lr: float
    max_lr: float
    lr_bump: float
    lr_decrease_factor: float
    rank: int
    update_proj_gap: int

    def check(self) -> None:
        """Raise UserError for options that contradict each other."""
        if self.muon + self.adamuon + self.normuon > 1:
            raise UserError("[optimizer] muon, adamuon, normuon: only one of them can be true")
        if self.adamuon and self.second_moment_type not in ("ema", "sn"):
            raise UserError("[optimizer] adamuon = true needs second_moment_type = 'ema' or 'sn'")
        if (self.momentum_type == "sm") != (self.rank > 0):
            raise UserError("[optimizer] momentum_type = 'sm' and a rank above 0 belong together")

    @property
    def orthogonal(self) -> bool:
        """Whether the momentum is orthogonalised: not that of vectors, narrow matrices and those without decay."""
        chosen = self.muon or self.adamuon or self.normuon
        return chosen and is_decayed(self.p.tensor) and min(self.p.tensor.shape) >= SMALLEST_SIDE

    @property
    def square(self) -> str:
        """The kind of second moment."""
        if self.b2 == 0 or (self.orthogonal and not self.adamuon):
            return "none"
        vector = len(self.p.tensor.shape) < 2 and self.second_moment_type in ("factored", "sn")
        return "ema" if vector else self.second_moment_type

    @property
    def mean(self) -> str:
        """The kind of momentum."""
        if self.b1 == 0 or (self.momentum_type == "sm" and len(self.p.tensor.shape) < 2):
            return "none" if self.b1 == 0 else "ema"
        return self.momentum_type

    def rounded(self, values: Array) -> Array:
        """Return `values`, in bfloat16 if they come from an orthogonalised momentum."""
        return bf16(values) if self.orthogonal else values

    def longer(self, value: Array) -> int:
        """Return the longer axis of a matrix, -1 or -2; if both are equal, that of the file's rows."""
        rows = -1 if self.p.transposed else -2
        return rows if value.shape[rows] >= value.shape[-3 - rows] else -3 - rows

    def init(self, value: Array) -> GenericState:
        """Return the state before the first step."""
        keep = self.longer(value) if value.ndim > 1 else 0
        reduced = value.sum(-3 - keep, keepdims=True) if value.ndim > 1 else value
        whole = {"ema": value, "sn": reduced}.get(self.square)
        mean, basis = (None if self.mean == "none" else jnp.zeros_like(value)), None
        if mean is not None and self.mean == "sm":
            mean = mean[..., : self.rank] if keep == -2 else mean[..., : self.rank, :]
            basis = jnp.zeros((value.shape[-3 - keep], min(self.rank, value.shape[-3 - keep])))
        return GenericState(
            mean,
            Factored.zeros(value) if self.square == "factored" else None if whole is None else jnp.zeros_like(whole),
            jnp.zeros_like(reduced) if self.normuon and self.orthogonal else None,
            jnp.full_like(value, self.lr_bump) if self.automagic else None,
            basis,
        )

    def step(self, grad: Array, own: GenericState, value: Array, t: Array, rate: Array) -> tuple[Array, GenericState]:
        """Return the change of the value and the state after the step. The weight decay follows the group's rate."""
        size = rate
        if own.rates is not None:
            own, size = own._replace(rates=self.new_rates(grad, own, t)), jnp.ones_like(rate)
        numerator, own = self.momentum(grad, own, t)
        if self.orthogonal:
            update, factor, own = self.orthogonalised(numerator, own, t)
            size = size * factor
        else:
            denominator, own = self.denominator(grad, own)
            if self.correct_bias:
                size = size * jnp.sqrt(debias(self.b2, t)) / debias(self.b1, t)
            if own.rates is not None and self.mean == "ema":
                # diffusion-pipe multiplies the momentum in place.
                own = own._replace(mean=numerator * jnp.abs(own.rates))
            update = numerator if denominator is None else numerator / denominator
        if own.rates is not None:
            update = self.rounded(update * jnp.abs(own.rates))
        return -size * update - rate * self.p.weight_decay * value, own

    def new_rates(self, grad: Array, own: GenericState, t: Array) -> Array:
        """Return automagic's rates: higher where the gradient has the sign of the momentum or, without one, of the last
        gradient. Their own sign is that of the gradient.
        """
        assert own.rates is not None
        before = own.rates > 0 if own.mean is None else (own.mean > 0) | (t == 1)
        now = grad > 0
        bumped = jnp.abs(own.rates) + jnp.where(before == now, self.lr_bump, -self.lr_decrease_factor * self.lr_bump)
        return jnp.where(now, 1.0, -1.0) * jnp.clip(bumped, self.min_lr, self.max_lr)

    def momentum(self, grad: Array, own: GenericState, t: Array) -> tuple[Array, GenericState]:
        """Return the momentum. In a subspace, it is that of the gradient's largest singular vectors, plus the gradient
        outside of it; the subspace changes every `update_proj_gap` steps, after which the momentum begins at 0.
        """
        if own.mean is None:
            return grad, own
        if own.basis is None:
            mean = ema(own.mean, grad, self.b1)
            return mean, own._replace(mean=mean)
        upright = (lambda one: one) if self.longer(grad) == -2 else jnp.transpose
        tall, rank = upright(grad), own.basis.shape[1]
        renewed = (t % self.update_proj_gap) == 0
        basis = jax.lax.cond(
            renewed | (t == 1),
            lambda _: jnp.linalg.svd(tall, full_matrices=False)[2][:rank].T,
            lambda kept: kept,
            own.basis,
        )
        low = tall @ basis
        mean = ema(upright(own.mean), low, self.b1)
        whole = mean @ basis.T + tall - low @ basis.T
        kept = jnp.where(renewed & (t > 1), 0.0, mean)
        return upright(whole), own._replace(mean=upright(kept), basis=basis)

    def denominator(self, grad: Array, own: GenericState) -> tuple[Array | None, GenericState]:
        """Return √v + eps, if there is a second moment v. β2 = 1 sums the squares, as AdaGrad does."""
        if self.square == "none":
            return None, own
        new = self.rounded(jnp.square(grad))
        if self.square == "factored":
            square = own.square.updated(new, self.b2)
            return jnp.sqrt(square.product) + self.eps, own._replace(square=square)
        if self.square == "sn":
            reduce = jnp.mean if self.correct_dim else jnp.sum
            new = self.rounded(reduce(new, -3 - self.longer(grad), keepdims=True))
        share = 1.0 - self.b2 if self.b2 < 1 else 1.0
        square = self.rounded(self.rounded(self.b2 * own.square) + share * new)
        return self.rounded(self.rounded(jnp.sqrt(square)) + self.eps), own._replace(square=square)

    def orthogonalised(self, momentum: Array, own: GenericState, t: Array) -> tuple[Array, Any, GenericState]:
        """Return the update of a matrix, in bfloat16, its factor, and the state."""
        update = orthogonalise(momentum, self.polar_express)
        if not self.adamuon:
            if own.lines is not None:
                update, own = self.even_lines(update, own)
            return update, RMS * math.sqrt(max(update.shape)), own
        denominator, own = self.denominator(update, own)
        if denominator is not None:
            update = bf16(update / denominator)
        if self.correct_bias:
            update = bf16(update * jnp.sqrt(debias(self.b2, t)))
        mean = jnp.sqrt(bf16(jnp.mean(bf16(jnp.square(update)))))
        return update, RMS / (mean + self.eps), own

    def even_lines(self, update: Array, own: GenericState) -> tuple[Array, GenericState]:
        """Return NorMuon's update, whose rows (or columns) have equal mean squares over time, with the same norm."""
        assert own.lines is not None
        short = -3 - self.longer(update)
        square = jnp.mean(jnp.square(update), short, keepdims=True)
        lines = bf16(own.lines + (1.0 - self.b2) * (bf16(square) - own.lines))
        scale = bf16(1.0 / jnp.sqrt(jnp.maximum(lines, 1e-10)))
        norm, new = (jnp.sqrt(jnp.sum(one) * update.shape[short]) for one in (square, square * jnp.square(scale)))
        return bf16(update * bf16(scale * (norm / jnp.maximum(new, 1e-10)))), own._replace(lines=lines)


def _make(p: Parameter, *, proj_type: str, **options: Any) -> optax.GradientTransformation:
    """Return GenericOptim for one tensor. Of the projections, there is only that of the singular vectors."""
    del proj_type
    rule = GenericOptim(p, **options)
    rule.check()
    return from_rule(p, rule.init, rule.step, own_decay=True)


_OPTIONS = {
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-6,
    "correct_bias": True,
    "momentum_type": "ema",
    "second_moment_type": "ema",
    "correct_dim": False,
    "muon": False,
    "adamuon": False,
    "normuon": False,
    "polar_express": False,
    "automagic": False,
    "min_lr": 1e-7,
    "max_lr": 1e-3,
    "lr_bump": 1e-6,
    "lr_decrease_factor": 1.0,
    "rank": 0,
    "update_proj_gap": 200,
    "proj_type": "svd",
}

ROWS = tuple(
    Row(
        name,
        _make,
        _OPTIONS | ({} if name == "genericoptim" else {name: True}),
        aliases={"momentum": "b1"},
        offloads=True,
        sums=True,
        choices={
            "momentum_type": ("ema", "sm", "none"),
            "second_moment_type": ("ema", "sn", "factored", "none"),
            "proj_type": ("svd",),
        },
    )
    for name in ("genericoptim", "muon", "adamuon", "normuon")
)
