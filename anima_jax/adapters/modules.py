"""Adapters on frozen linear layers: the adapted layer, its place in a model, initial values, and dropout.

The blocks of a network are stacked, and so are their adapters: they have the largest rank of any layer, with zeros
beyond each layer's own rank. The zeros have no gradient and stay zero; a layer without an adapter has s = 0.

Axes: n layers, b batch, i input features, o output features, r rank. Kernels and factors are stored as (…, in, out),
the transpose of the layout in files.
"""

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from anima_jax.adapters.kinds import FACTORS, KINDS, MAGNITUDE, Operations, Shapes
from anima_jax.models.layers import Linear, linear
from anima_jax.models.parameters import Params, quick_jit
from anima_jax.models.quantised import Quantised

STACKS = ("blocks.", "llm_adapter.blocks.", "layers.", "text_encoder.layers.")
"""Path prefixes of layers that can take adapters: the blocks of the transformer, LLM adapter and text encoder."""


class AdapterSpec(NamedTuple):
    """An adapter on one module: kind, shapes of the factors in one layer, and rank in each layer (0: no adapter)."""

    kind: str
    shapes: Shapes
    ranks: Sequence[int]

    @property
    def ranked(self) -> bool:
        """Whether the factors have a rank; those of a LoKr with two matrices do not."""
        return any("rank" in FACTORS[factor].axes for factor in self.shapes)

    def scales(self, alpha: float | None) -> list[float]:
        """Return the scale of each layer: alpha / rank, 1 if `alpha` is None, or 0 without an adapter.

        A LoKr of two matrices has no rank and the scale 1, because an alpha has no meaning in its files.
        """
        return [(alpha / rank if alpha and self.ranked else 1.0) if rank else 0.0 for rank in self.ranks]

    def layer_shape(self, factor: str, layer: int) -> tuple[int, ...]:
        """Return the shape of a factor in this layer, at the layer's own rank."""
        axes = zip(FACTORS[factor].axes, self.shapes[factor], strict=True)
        return tuple(self.ranks[layer] if axis == "rank" else size for axis, size in axes)


def adapter_spec(kind: str, kernel: tuple[int, ...], ranks: Sequence[int], decompose_factor: int = -1) -> AdapterSpec:
    """Return the spec of a new adapter for a kernel of shape (n, i, o)."""
    return AdapterSpec(kind, KINDS[kind].shapes(max(ranks), kernel[1], kernel[2], decompose_factor), tuple(ranks))


class AdaptedLinear(nnx.Module):
    """A linear layer of stacked blocks with an adapter.

    All factors and `lora_scale` start at zero, so the adapter changes nothing yet.
    """

    def __init__(self, base: Linear, spec: AdapterSpec):
        layers = base.kernel.shape[0]
        self.kernel, self.bias, self.kernel_axes = base.kernel, base.bias, base.kernel_axes
        for name, shape in spec.shapes.items():
            dtype = jnp.float32 if len(shape) == 1 else base.kernel.dtype
            setattr(self, name, nnx.Param(jnp.zeros((layers, *shape), dtype)))
        self.lora_scale = nnx.Param(jnp.zeros(layers))
        self.kind, self.factors, self.ranks = spec.kind, tuple(spec.shapes), tuple(spec.ranks)
        self.dropout = self.rank_dropout = 0.0
        self.keys: nnx.Param[Array] | None = None

    def __call__(self, x: Array, *, out_dtype: DTypeLike | None = None) -> Array:
        kernel, bias = self.kernel[...], None if self.bias is None else self.bias[...]
        factors = {name: getattr(self, name)[...] for name in self.factors}
        product = functools.partial(linear, x, kernel, out_dtype=out_dtype, kernel_axes=self.kernel_axes)
        if MAGNITUDE.name not in factors:
            return product(bias) + self._update(x, factors)
        magnitude_o = self._relative_magnitude(factors)
        out = product() + self._update(x, factors)
        out = (out.astype(jnp.float32) * magnitude_o).astype(out.dtype)
        return out if bias is None else out + bias.astype(out.dtype)

    def _update(self, x: Array, factors: Mapping[str, Array]) -> Array:
        """Return s · ΔW x, which the adapter adds to the output."""
        forward = KINDS[self.kind].forward
        assert forward is not None
        recomputed = functools.partial(jax.checkpoint, prevent_cse=False)
        operations = Operations(linear, self._scaled, self._ranks_dropped, recomputed)
        return forward(operations, self._dropped(x), factors)

    def _relative_magnitude(self, factors: Mapping[str, Array]) -> Array:
        """Return a DoRA's magnitudes (o) divided by the norms of the weights, or 1 in a layer without an adapter."""
        kernel, scale = self.kernel[...], self.lora_scale[...]
        norm_o = jax.checkpoint(_norm, prevent_cse=False)(kernel, factors["lora_a"], factors["lora_b"], scale)
        divisor_o = jnp.where((scale == 0) | (norm_o == 0), 1.0, norm_o)
        return jnp.where(scale == 0, 1.0, factors[MAGNITUDE.name] / divisor_o)

    def _scaled(self, x: Array) -> Array:
        return (x.astype(jnp.float32) * self.lora_scale[...]).astype(x.dtype)

    def _ranks_dropped(self, x: Array, rescaled: bool) -> Array:
        """Return `x` (b, …, r), in training with some features dropped: the same ones in all rows of an example."""
        if self.keys is None or not self.rank_dropout:
            return x
        kept = self._kept((1,) * (x.ndim - 2) + x.shape[-1:], self.rank_dropout, 1)
        return x * (kept if rescaled else kept > 0).astype(x.dtype)

    def _dropped(self, x: Array) -> Array:
        """Return `x` (b, …, i), in training with dropout: some values are zero and the others are scaled up."""
        if self.keys is None or not self.dropout:
            return x
        return x * self._kept(x.shape[1:], self.dropout, 0).astype(x.dtype)

    def _kept(self, shape: tuple[int, ...], rate: float, which: int) -> Array:
        """Return 1 / (1 − rate) where the example's key keeps a value, else 0. `which` selects independent draws."""

        def one(key: Array) -> Array:
            return jax.random.uniform(jax.random.fold_in(key, which), shape) >= rate

        assert self.keys is not None
        return jax.vmap(one)(self.keys[...]) / (1.0 - rate)


def _weights(kernel: Array | Quantised) -> Array:
    return (kernel.values() if isinstance(kernel, Quantised) else kernel).astype(jnp.float32)


def _norm(kernel: Array | Quantised, a_ir: Array, b_ro: Array, scale: Array) -> Array:
    """Return ‖W + s · B A‖ of each output from ‖W‖², WᵀA and AᵀA, without forming the sum and without a gradient."""
    weights_io, a_ir, b_ro = (jax.lax.stop_gradient(x) for x in (_weights(kernel), _weights(a_ir), _weights(b_ro)))
    cross_o = jnp.sum((a_ir.T @ weights_io) * b_ro, axis=0)
    update_o = jnp.sum((a_ir.T @ a_ir @ b_ro) * b_ro, axis=0)
    squares_o = jnp.sum(weights_io * weights_io, axis=0) + 2.0 * scale * cross_o + scale * scale * update_o
    return jnp.sqrt(jnp.maximum(squares_o, 0.0))


# ---- on a model ------------------------------------------------------------------------------------------------------


def target_modules(model: nnx.Module) -> dict[str, Linear]:
    """Return path → layer for every linear layer that can take an adapter."""
    modules = ((".".join(map(str, path)), module) for path, module in nnx.iter_modules(model))
    found = {path: module for path, module in modules if isinstance(module, Linear)}
    return {path: found[path] for path in sorted(found) if path.startswith(STACKS)}


def target_shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Return path → kernel shape (n, i, o) for every linear layer that can take an adapter."""
    return {path: base.kernel.shape for path, base in target_modules(model).items()}


def adapted(model: nnx.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """Yield path and layer of every adapter on the model."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, AdaptedLinear):
            yield ".".join(map(str, path)), module


def attach(model: nnx.Module, specs: Mapping[str, AdapterSpec]) -> None:
    """Attach to each module in `specs` (by path), in place, an adapter that changes nothing yet.

    Works on an abstract model too. Raises KeyError for a path that cannot take an adapter.
    """
    targets = target_modules(model)
    for path, spec in specs.items():
        *parents, name = path.split(".")
        setattr(functools.reduce(getattr, parents, model), name, AdaptedLinear(targets[path], spec))


def drop(model: nnx.Module, keys_b: Array, dropout: float, rank_dropout: float) -> None:
    """Switch on dropout of inputs and ranks in the adapters of `model`, in place, with one random key per example."""
    fold_b = jax.vmap(jax.random.fold_in, (0, None))
    fold_nb = jax.vmap(fold_b, (None, 0))
    for path, module in adapted(model):
        keys_nb = fold_nb(fold_b(keys_b, jnp.uint32(zlib.crc32(path.encode()))), jnp.arange(len(module.ranks)))
        module.keys = nnx.data(nnx.Param(keys_nb))
        module.dropout, module.rank_dropout = dropout, rank_dropout


def is_factor(path: str) -> bool:
    """Return whether the parameter at `path` is a trained factor of an adapter."""
    return path.rpartition(".")[2] in FACTORS


# ---- initial values --------------------------------------------------------------------------------------------------


def initial(
    params: Params, specs: Mapping[str, AdapterSpec], seed: int, shardings: Mapping[str, Any] | None = None
) -> Params:
    """Return initial values in float32 for the adapters' trained parameters in `params`; they change nothing yet.

    Factors that do not start at zero are uniform within ±1/sqrt(fan in) (Kaiming with a = sqrt(5)), as in PEFT. A
    magnitude starts as the norm of the frozen weight, so `params` must contain the module's kernel. `shardings` are
    those of the result.
    """
    fresh = tuple(
        _Fresh(path, leaf.shape, tuple(specs[path.rpartition(".")[0]].ranks))
        for path, leaf in sorted(params.items())
        if is_factor(path)
    )
    normed = (module for module, _, name in (one.path.rpartition(".") for one in fresh) if name == MAGNITUDE.name)
    kernels = {f"{module}.{MAGNITUDE.name}": params[f"{module}.kernel"] for module in normed}
    return _drawing(fresh, seed, tuple((shardings or {}).items()))(kernels)


class _Fresh(NamedTuple):
    """A parameter to draw: its path and shape, and the rank of its module in each layer."""

    path: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]


@functools.lru_cache(maxsize=8)
def _drawing(
    fresh: tuple[_Fresh, ...], seed: int, shardings: tuple[tuple[str, Any], ...]
) -> Callable[[Params], Params]:
    """Return a jitted function that draws the parameters, given the kernels whose norms are initial magnitudes."""

    def draw(kernels: Params) -> Params:
        key = jax.random.key(seed)
        return {one.path: _initial(one, kernels.get(one.path), key) for one in fresh}

    return quick_jit(draw, dict(shardings) or None)


def _initial(fresh: _Fresh, kernel: Any, key: Array) -> Array:
    path, shape, ranks = fresh
    factor = FACTORS[path.rpartition(".")[2]]
    ranks_n11 = jnp.asarray(ranks)[:, None, None]
    if kernel is not None:
        return jnp.where(ranks_n11[..., 0] > 0, jnp.sqrt(jnp.sum(jnp.square(_weights(kernel)), axis=-2)), 0.0)
    if factor.zero:
        return jnp.zeros(shape)
    bound = 1.0 / jnp.sqrt(jnp.maximum(ranks_n11, 1) if factor.axes[0] == "rank" else shape[1])
    drawn = jax.random.uniform(jax.random.fold_in(key, zlib.crc32(path.encode())), shape, minval=-1.0) * bound
    for number, axis in enumerate(factor.axes, start=1):
        if axis == "rank":
            drawn = jnp.where(jax.lax.broadcasted_iota(jnp.int32, shape, number) < ranks_n11, drawn, 0.0)
    return drawn
