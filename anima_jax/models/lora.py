"""Low-rank adapters: y = W x + (alpha / rank) · B A x on chosen linear layers (arXiv 2106.09685).

The blocks of a network are stacked, so their adapters are too: at the largest rank of any layer. Rows beyond a layer's
own rank are zero in A and in B; their gradients are then zero as well, and they stay so.
Axes: n layers, i and o features in and out, r rank.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from anima_jax.models.layers import Linear, linear
from anima_jax.models.parameters import Params

BLOCKS = ("blocks", "llm_adapter.blocks")
"""Where adapters go: every linear layer inside the transformer's blocks and the LLM adapter's."""


class LoRALinear(nnx.Module):
    """A linear layer of stacked blocks with an adapter of rank `ranks[n]` in layer n (0: none) beside it."""

    def __init__(self, base: Linear, ranks: Sequence[int], scale: float):
        layers, features_in, features_out = base.kernel.shape
        dtype = base.kernel.dtype
        self.kernel, self.bias = base.kernel, base.bias
        self.lora_a = nnx.Param(jnp.zeros((layers, features_in, max(ranks)), dtype))
        self.lora_b = nnx.Param(jnp.zeros((layers, max(ranks), features_out), dtype))
        self.ranks = tuple(ranks)
        self.scale = scale

    def __call__(self, x: Array) -> Array:
        update = linear(linear(x, self.lora_a[...]), self.lora_b[...])
        return linear(x, self.kernel[...], None if self.bias is None else self.bias[...]) + self.scale * update


def target_modules(model: nnx.Module) -> dict[str, Linear]:
    """Path → layer of every linear layer that can take an adapter."""
    modules = ((".".join(map(str, path)), module) for path, module in nnx.iter_modules(model))
    found = {path: module for path, module in modules if isinstance(module, Linear)}
    return {path: found[path] for path in sorted(found) if path.startswith(tuple(f"{blocks}." for blocks in BLOCKS))}


def attach(model: nnx.Module, ranks: Mapping[str, Sequence[int]], *, scale: float = 1.0) -> None:
    """Put a zero adapter on each module of `ranks` (module path → rank of each layer), in place.

    `scale` is alpha / rank. Works on an abstract model too. Raises KeyError for a path that takes no adapter.
    """
    targets = target_modules(model)
    for path, module_ranks in ranks.items():
        *parents, name = path.split(".")
        parent = model
        for attribute in parents:
            parent = getattr(parent, attribute)
        setattr(parent, name, LoRALinear(targets[path], module_ranks, scale))


def is_lora(path: str) -> bool:
    """Whether the parameter at `path` belongs to an adapter."""
    return path.endswith((".lora_a", ".lora_b"))


def initial(params: Params, key: Array) -> Params:
    """Fresh values of the adapter's parameters among `params` (arrays or shapes): A as PEFT draws it, B zero.

    A is uniform within ±1/sqrt(i) (Kaiming with a = sqrt(5)), float32.
    """
    fresh: Params = {}
    for index, (path, leaf) in enumerate(sorted(params.items())):
        if path.endswith(".lora_b"):
            fresh[path] = jnp.zeros(leaf.shape)
        elif path.endswith(".lora_a"):
            bound = 1.0 / math.sqrt(leaf.shape[-2])
            fresh[path] = jax.random.uniform(jax.random.fold_in(key, index), leaf.shape, minval=-bound, maxval=bound)
    return fresh
