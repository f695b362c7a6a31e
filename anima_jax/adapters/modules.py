"""Adapters: a few trained numbers beside the frozen weights of linear layers.

lora   y = W x + s · B A x (arXiv 2106.09685)
dora   y = m ⊙ (W + s · B A) x / ‖W + s · B A‖, a norm for each output, through which no gradient flows (2402.09353)
lokr   y = W x + s · (w1 ⊗ w2) x, either factor a matrix or a product of two (2212.10650, LyCORIS)
loha   y = W x + s · ((w1_a w1_b) ⊙ (w2_a w2_b)) x (2108.06098)

s is alpha / rank. The blocks of a network are stacked, so their adapters are too: at the largest rank of any layer,
with zeros beyond a layer's own. Such rows have no gradient and stay zero; a layer without adapter has s = 0.

Of the products only LoHa's is ever formed, one layer's at a time, and again in the backward instead of being kept.
LoKr multiplies by one factor after the other; DoRA's norm follows from ‖W‖², WᵀA and AᵀA.

Axes: n layers, b batch, i and o features in and out, r rank; of LoKr i = m · p and o = k · q, w1 is (m, k), w2 (p, q).
Kernels and factors are stored as (…, in, out), the transpose of what files have.
"""

import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from anima_jax.models.layers import Linear, linear
from anima_jax.models.parameters import Params, quick_jit
from anima_jax.models.quantised import Quantised

STACKS = ("blocks.", "llm_adapter.blocks.", "layers.", "text_encoder.layers.")
"""Where adapters go: linear layers of stacked blocks, the transformer's, its LLM adapter's, the text encoder's."""


class Factor(NamedTuple):
    """A trained parameter of an adapter: which of its two axes is the rank, if any, and whether it starts at zero."""

    rank_axis: int | None
    zero: bool


FACTORS = {
    "lora_a": Factor(1, False),
    "lora_b": Factor(0, True),
    "lora_magnitude": Factor(None, False),
    "lokr_w1": Factor(None, True),
    "lokr_w1_a": Factor(0, True),
    "lokr_w1_b": Factor(1, False),
    "lokr_w2": Factor(None, False),
    "lokr_w2_a": Factor(0, False),
    "lokr_w2_b": Factor(1, False),
    "hada_w1_a": Factor(0, False),
    "hada_w1_b": Factor(1, False),
    "hada_w2_a": Factor(0, False),
    "hada_w2_b": Factor(1, True),
}
"""Every trained parameter by the last word of its path. Where each starts is PEFT's choice."""

SCALE = "lora_scale"
"""Last word of the path of s, (n,), which is not trained."""

Shapes = Mapping[str, tuple[int, ...]]
"""Factor → shape in one layer."""


class AdaptedLinear(nnx.Module):
    """A linear layer of stacked blocks with an adapter of rank `ranks[n]` in layer n (0: none) beside it.

    All factors and `lora_scale` start at zero, which changes nothing.
    """

    kind: ClassVar[str]
    _prefixes: ClassVar[tuple[str, ...]]
    """What the names of the kind's factors begin with."""

    def __init__(self, base: Linear, shapes: Shapes, ranks: Sequence[int]):
        layers = base.kernel.shape[0]
        self.kernel, self.bias, self.kernel_axes = base.kernel, base.bias, base.kernel_axes
        for name, factor in FACTORS.items():
            if name.startswith(self._prefixes):
                shape = shapes.get(name)
                dtype = jnp.float32 if factor.rank_axis is None and len(shape or ()) == 1 else base.kernel.dtype
                setattr(self, name, None if shape is None else nnx.Param(jnp.zeros((layers, *shape), dtype)))
        self.lora_scale = nnx.Param(jnp.zeros(layers))
        self.ranks = tuple(ranks)
        self.dropout = self.rank_dropout = 0.0
        self.keys: nnx.Param | None = None

    @staticmethod
    def shapes(rank: int, features_in: int, features_out: int, decompose_factor: int) -> Shapes:
        """Shapes of a layer's factors, as PEFT chooses them."""
        raise NotImplementedError

    def __call__(self, x: Array) -> Array:
        return linear(x, self.kernel[...], _value(self.bias), kernel_axes=self.kernel_axes) + self._update(
            self._dropped(x)
        )

    def _update(self, x: Array) -> Array:
        """What the adapter adds."""
        raise NotImplementedError

    def _scaled(self, x: Array) -> Array:
        return (x.astype(jnp.float32) * self.lora_scale[...]).astype(x.dtype)

    def _dropped(self, x: Array) -> Array:
        """`x` (b, …, i), or in training some of its values zero and the others larger."""
        if self.keys is None or not self.dropout:
            return x
        return x * self._kept(x.shape[1:], self.dropout, 0).astype(x.dtype)

    def _ranks_dropped(self, x: Array, *, rescaled: bool = True) -> Array:
        """The last axis of `x` (b, …, r) likewise: an example loses a rank (or an output) in all of its rows."""
        if self.keys is None or not self.rank_dropout:
            return x
        kept = self._kept((1,) * (x.ndim - 2) + x.shape[-1:], self.rank_dropout, 1)
        return x * (kept if rescaled else kept > 0).astype(x.dtype)

    def _kept(self, shape: tuple[int, ...], rate: float, which: int) -> Array:
        """For each example 1 / (1 − rate) where its key keeps a value, else 0."""

        def one(key):
            return jax.random.uniform(jax.random.fold_in(key, which), shape) >= rate

        assert self.keys is not None
        return jax.vmap(one)(self.keys[...]) / (1.0 - rate)


def _value(parameter: nnx.Param | None):
    return None if parameter is None else parameter[...]


class LoRALinear(AdaptedLinear):
    """W x + s · B A x."""

    kind = "lora"
    _prefixes = ("lora_a", "lora_b")
    lora_a: nnx.Param
    lora_b: nnx.Param

    @staticmethod
    def shapes(rank, features_in, features_out, decompose_factor):
        return {"lora_a": (features_in, rank), "lora_b": (rank, features_out)}

    def _update(self, x: Array) -> Array:
        hidden = self._ranks_dropped(linear(x, self.lora_a[...]))
        return linear(self._scaled(hidden), self.lora_b[...])


class DoRALinear(LoRALinear):
    """m ⊙ (W + s · B A) x / ‖W + s · B A‖. Dropout is that of the low-rank path."""

    kind = "dora"
    _prefixes = ("lora_",)
    lora_magnitude: nnx.Param

    @staticmethod
    def shapes(rank, features_in, features_out, decompose_factor):
        return {
            **LoRALinear.shapes(rank, features_in, features_out, decompose_factor),
            "lora_magnitude": (features_out,),
        }

    def __call__(self, x: Array) -> Array:
        kernel, scale = self.kernel[...], self.lora_scale[...]
        norm_o = jax.checkpoint(_norm, prevent_cse=False)(kernel, self.lora_a[...], self.lora_b[...], scale)
        turned = linear(x, kernel, kernel_axes=self.kernel_axes) + self._update(self._dropped(x))
        divisor_o = jnp.where((scale == 0) | (norm_o == 0), 1.0, norm_o)
        magnitude_o = jnp.where(scale == 0, 1.0, self.lora_magnitude[...] / divisor_o)
        out = (turned.astype(jnp.float32) * magnitude_o).astype(x.dtype)
        return out if self.bias is None else out + self.bias[...].astype(x.dtype)


def column_norms(kernel: Array | Quantised) -> Array:
    """‖W‖ of each output (…, o), float32: where a fresh DoRA's magnitudes start."""
    weights = kernel.values() if isinstance(kernel, Quantised) else kernel
    return jnp.sqrt(jnp.sum(jnp.square(weights.astype(jnp.float32)), axis=-2))


def _norm(kernel: Array | Quantised, a_ir: Array, b_ro: Array, scale: Array) -> Array:
    """‖W + s · B A‖ of each output, without the sum and without a gradient."""
    weights = kernel.values() if isinstance(kernel, Quantised) else kernel
    weights_io, a_ir, b_ro = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (weights, a_ir, b_ro))
    cross_o = jnp.sum((a_ir.T @ weights_io) * b_ro, axis=0)
    update_o = jnp.sum((a_ir.T @ a_ir @ b_ro) * b_ro, axis=0)
    squares_o = jnp.sum(weights_io * weights_io, axis=0) + 2.0 * scale * cross_o + scale * scale * update_o
    return jnp.sqrt(jnp.maximum(squares_o, 0.0))


class LoKrLinear(AdaptedLinear):
    """W x + s · (w1 ⊗ w2) x. Rank dropout is PEFT's: it leaves outputs out and enlarges none."""

    kind = "lokr"
    _prefixes = ("lokr_",)
    lokr_w1: nnx.Param | None
    lokr_w1_a: nnx.Param
    lokr_w1_b: nnx.Param
    lokr_w2: nnx.Param | None
    lokr_w2_a: nnx.Param
    lokr_w2_b: nnx.Param

    @staticmethod
    def shapes(rank, features_in, features_out, decompose_factor):
        (m, p), (k, q) = (factorised(features, decompose_factor) for features in (features_in, features_out))
        if rank >= max(p, q) / 2:
            return {"lokr_w1": (m, k), "lokr_w2": (p, q)}
        return {"lokr_w1": (m, k), "lokr_w2_a": (rank, q), "lokr_w2_b": (p, rank)}

    def _update(self, x: Array) -> Array:
        w1_mk = self.lokr_w1[...] if self.lokr_w1 is not None else linear(self.lokr_w1_b[...], self.lokr_w1_a[...])
        x_mp = x.reshape(*x.shape[:-1], w1_mk.shape[0], -1)
        w2 = (self.lokr_w2,) if self.lokr_w2 is not None else (self.lokr_w2_b, self.lokr_w2_a)
        for factor in w2:
            x_mp = linear(x_mp, factor[...])
        out_qk = linear(x_mp.swapaxes(-1, -2), w1_mk)
        out = out_qk.swapaxes(-1, -2).reshape(*x.shape[:-1], -1)
        return self._ranks_dropped(self._scaled(out), rescaled=False)


def factorised(features: int, limit: int) -> tuple[int, int]:
    """`features` as a product of two, the first not the larger: LyCORIS' choice.

    A `limit` that divides it is the first factor. Else that is the largest divisor up to the limit, if there is one
    (not −1), for which the factors' sum falls with each divisor before it.
    """
    if limit > 0 and features % limit == 0:
        return limit, features // limit
    largest = features if limit == -1 else limit
    divisors = [n for n in range(1, math.isqrt(features) + 1) if features % n == 0 and n <= max(largest, 1)]
    return divisors[-1], features // divisors[-1]


class LoHaLinear(AdaptedLinear):
    """W x + s · ((w1_a w1_b) ⊙ (w2_a w2_b)) x. Rank dropout leaves outputs out, as PEFT's."""

    kind = "loha"
    _prefixes = ("hada_",)
    hada_w1_a: nnx.Param
    hada_w1_b: nnx.Param
    hada_w2_a: nnx.Param
    hada_w2_b: nnx.Param

    @staticmethod
    def shapes(rank, features_in, features_out, decompose_factor):
        a, b = (rank, features_out), (features_in, rank)
        return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}

    def _update(self, x: Array) -> Array:
        factors = [self.hada_w1_b[...], self.hada_w1_a[...], self.hada_w2_b[...], self.hada_w2_a[...]]
        return self._ranks_dropped(self._scaled(jax.checkpoint(_hadamard_product, prevent_cse=False)(x, *factors)))


def _hadamard_product(x: Array, w1_b: Array, w1_a: Array, w2_b: Array, w2_a: Array) -> Array:
    return linear(x, linear(w1_b, w1_a) * linear(w2_b, w2_a))


KINDS: dict[str, type[AdaptedLinear]] = {one.kind: one for one in (LoRALinear, DoRALinear, LoKrLinear, LoHaLinear)}
"""Every kind of adapter by its name in `[adapter] type`."""


class AdapterSpec(NamedTuple):
    """What an adapter on one module is: its kind, its factors' shapes, and its rank in each layer."""

    kind: str
    shapes: Shapes
    ranks: Sequence[int]

    @property
    def ranked(self) -> bool:
        """Whether there is a rank: not in a LoKr of two whole factors."""
        return any(FACTORS[factor].rank_axis is not None for factor in self.shapes)


def adapter_spec(kind: str, kernel: tuple[int, ...], ranks: Sequence[int], decompose_factor: int = -1) -> AdapterSpec:
    """A fresh adapter for a kernel of this shape (n, i, o)."""
    return AdapterSpec(kind, KINDS[kind].shapes(max(ranks), kernel[1], kernel[2], decompose_factor), tuple(ranks))


def target_modules(model: nnx.Module) -> dict[str, Linear]:
    """Path → layer of every linear layer that can take an adapter."""
    modules = ((".".join(map(str, path)), module) for path, module in nnx.iter_modules(model))
    found = {path: module for path, module in modules if isinstance(module, Linear)}
    return {path: found[path] for path in sorted(found) if path.startswith(STACKS)}


def target_shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Path → shape (n, i, o) of the kernel of every linear layer that can take an adapter."""
    return {path: base.kernel.shape for path, base in target_modules(model).items()}


def adapted(model: nnx.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """Path and layer of every adapter on the model."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, AdaptedLinear):
            yield ".".join(map(str, path)), module


def attach(model: nnx.Module, slots: Mapping[str, AdapterSpec]) -> None:
    """Put an adapter that changes nothing yet on each module of `slots`, by path, in place.

    Works on an abstract model too. Raises KeyError for a path that takes no adapter.
    """
    targets = target_modules(model)
    for path, (kind, shapes, ranks) in slots.items():
        *parents, name = path.split(".")
        parent = model
        for attribute in parents:
            parent = getattr(parent, attribute)
        setattr(parent, name, KINDS[kind](targets[path], shapes, ranks))


def drop(model: nnx.Module, keys_b: Array, dropout: float, rank_dropout: float) -> None:
    """From now on the adapters of `model` drop inputs and ranks, in place; each example's own by its key."""
    fold_b = jax.vmap(jax.random.fold_in, (0, None))
    fold_nb = jax.vmap(fold_b, (None, 0))
    for path, module in adapted(model):
        keys_nb = fold_nb(fold_b(keys_b, jnp.uint32(zlib.crc32(path.encode()))), jnp.arange(len(module.ranks)))
        module.keys = nnx.data(nnx.Param(keys_nb))
        module.dropout, module.rank_dropout = dropout, rank_dropout


def is_factor(path: str) -> bool:
    """Whether the parameter at `path` is an adapter's to train."""
    return path.rpartition(".")[2] in FACTORS


def initial(
    params: Params, slots: Mapping[str, AdapterSpec], seed: int, shardings: Mapping[str, Any] | None = None
) -> Params:
    """Fresh values, float32, of the adapters' trained parameters among `params`; together they change nothing.

    What does not start at zero is uniform within ±1/sqrt(fan in) (Kaiming with a = sqrt(5)), as PEFT draws it. A fresh
    magnitude is the norm of the frozen weight: `params` has to hold the module's kernel. `shardings` say where it lies.
    """
    fresh = tuple(
        _Fresh(path, leaf.shape, tuple(slots[path.rpartition(".")[0]].ranks))
        for path, leaf in sorted(params.items())
        if is_factor(path)
    )
    dora = (one.path for one in fresh if one.path.endswith(".lora_magnitude"))
    kernels = {path: params[f"{path.rpartition('.')[0]}.kernel"] for path in dora}
    return _drawing(fresh, seed, tuple((shardings or {}).items()))(kernels)


class _Fresh(NamedTuple):
    """A parameter to draw: its path and shape, and its module's rank in each layer."""

    path: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]


@functools.lru_cache(maxsize=8)
def _drawing(fresh: tuple[_Fresh, ...], seed: int, shardings: tuple) -> Callable[[Params], Params]:
    """A program that draws the parameters; it takes the kernels whose norms are magnitudes."""

    def draw(kernels: Params) -> Params:
        key = jax.random.key(seed)
        return {one.path: _initial(one, kernels.get(one.path), key) for one in fresh}

    return quick_jit(draw, dict(shardings) or None)


def _initial(fresh: _Fresh, kernel: Any, key: Array) -> Array:
    path, shape, ranks = fresh
    rank_axis, zero = FACTORS[path.rpartition(".")[2]]
    ranks_n11 = jnp.asarray(ranks)[:, None, None]
    if kernel is not None:
        return jnp.where(ranks_n11[..., 0] > 0, column_norms(kernel), 0.0)
    if zero:
        return jnp.zeros(shape)
    bound = 1.0 / jnp.sqrt(jnp.maximum(ranks_n11, 1) if rank_axis == 0 else shape[1])
    drawn = jax.random.uniform(jax.random.fold_in(key, zlib.crc32(path.encode())), shape, minval=-1.0) * bound
    if rank_axis is None:
        return drawn
    rank_nir = jax.lax.broadcasted_iota(jnp.int32, shape, 1 + rank_axis)
    return jnp.where(rank_nir < ranks_n11, drawn, 0.0)
