"""Parameter sharding: one table, parameter path → PartitionSpec.

Matrices are sharded over `fsdp`, whose devices gather a layer's weights when it runs, and over `tensor`, whose devices
keep their own part: columns of the layers that produce heads or hidden features, rows of those that consume them (arXiv
1909.08053). The layer axis of stacked blocks is never sharded. Gradients, moments and averages are sharded like their
parameter.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from anima_jax.adapters.kinds import FACTORS, MAGNITUDE, SCALE
from anima_jax.models import constraints, control
from anima_jax.models.parameters import Params

AXES = constraints.AXES

_LEADS_IN = r"(self|cross)_attn\.[qkv]_proj|mlp\.(layer1|gate_proj|up_proj)|adaln_modulation_\w+\.linear_1"
_LEADS_OUT = r"(self|cross)_attn\.(output|o)_proj|mlp\.(layer2|down_proj)|adaln_modulation_\w+\.linear_2"
_STACK = r"(llm_adapter\.|text_encoder\.)?(blocks|layers)\."

_CONTROLLED = "|".join(control.LAYERS)

_IN_RANK = "|".join(name for name, factor in FACTORS.items() if factor.axes == ("in", "rank"))
_RANK_OUT = "|".join(name for name, factor in FACTORS.items() if factor.axes == ("rank", "out"))
_OTHERS = "|".join(name for name, factor in FACTORS.items() if set(factor.axes).isdisjoint({"in", "out"}))
"""Adapter factors by their axes: features of the adapted layer are sharded as in its kernel, others replicated."""

BOTH = ("tensor", "fsdp")

RULES: tuple[tuple[str, P], ...] = (
    (rf"{_STACK}({_LEADS_IN})\.kernel", P(None, "fsdp", "tensor")),
    (rf"{_STACK}({_LEADS_OUT})\.kernel", P(None, "tensor", "fsdp")),
    (rf"{_STACK}({_LEADS_IN})\.({_IN_RANK})", P(None, "fsdp", None)),
    (rf"{_STACK}({_LEADS_IN})\.({_RANK_OUT})", P(None, None, BOTH)),
    (rf"{_STACK}({_LEADS_OUT})\.({_IN_RANK})", P(None, BOTH, None)),
    (rf"{_STACK}({_LEADS_OUT})\.({_RANK_OUT})", P(None, None, "fsdp")),
    (rf"{_STACK}\w+(\.\w+)*\.(scale|bias|{SCALE}|{MAGNITUDE.name}|{_OTHERS})", P()),
    # Adapters that each row of a batch chooses (adapters/rows.py): every device has all of them.
    (rf"{_STACK}\w+(\.\w+)*\.rows_\w+", P()),
    # Not over `tensor`, which would also shard the residual stream's features in the blocks.
    (r"(x_embedder|t_embedder\.linear_\d)\.kernel", P(None, "fsdp")),
    (r"final_layer\.(adaln_modulation\.linear_\d|linear)\.kernel", P("fsdp", None)),
    (r"llm_adapter\.(in_proj|out_proj)\.kernel", P(None, "fsdp")),
    (r"llm_adapter\.(in_proj|out_proj)\.bias", P()),
    (r"(llm_adapter\.embed|(text_encoder\.)?embed_tokens)\.embedding", P(None, "fsdp")),
    (r"t_embedding_norm\.scale|(llm_adapter\.|text_encoder\.)?norm\.scale", P()),
    # The control network: its trunk is small, and every device computes its modules' hidden features.
    (r"(control\.)?trunk\.\w+(\.\w+)*\.(kernel|bias|scale)|(control\.)?blocks\.\w+\.depth_bias", P()),
    (rf"(control\.)?blocks\.({_CONTROLLED})\.down\.kernel", P(None, "fsdp", None)),
    (rf"(control\.)?blocks\.({_CONTROLLED})\.up\.kernel", P(None, None, "fsdp")),
    (rf"(control\.)?blocks\.({_CONTROLLED})\.(mid|cond_to_film)\.kernel", P()),
    (r"control\.blocks\.\w+\.\w+\.bias", P()),
    # The VAE is small, and each device runs it on its own images.
    (r"(encoder|decoder)\.\w+(\.\w+)*\.(kernel|bias|scale)|(post_)?quant\.(kernel|bias)", P()),
)
"""Every parameter of the networks and their adapters matches exactly one row."""


def partition_spec(path: str, shape: Sequence[int], sizes: Mapping[str, int]) -> P:
    """Return the PartitionSpec of the parameter at `path` on a mesh with these axis sizes.

    A dimension that the mesh axes do not divide is replicated. Raises LookupError unless exactly one rule matches.
    """
    matches = [rule for pattern, rule in RULES if re.fullmatch(pattern, path)]
    if len(matches) != 1:
        raise LookupError(f"parameter {path} matches {len(matches)} sharding rules, expected one")
    return _fitted(matches[0], shape, sizes)


def _fitted(rule: P, shape: Sequence[int], sizes: Mapping[str, int]) -> P:
    return P(*(axes if size % parts(axes, sizes) == 0 else None for axes, size in zip(rule, shape, strict=False)))


def parts(axes: Any, sizes: Mapping[str, int]) -> int:
    """Return into how many parts an entry of a PartitionSpec (an axis, a tuple of axes or None) splits a dimension."""
    names = axes if isinstance(axes, tuple) else (axes,)
    return math.prod(sizes[name] for name in names if name)


def partition_specs(tree: Any, params: Params, sizes: Mapping[str, int]) -> Any:
    """Return the PartitionSpec of every leaf of `tree`: parameters, or a tree with one or more leaves under each path.

    A leaf with as many axes as its parameter is sharded like it; counters and factored moments are replicated. `params`
    may contain shapes instead of arrays.
    """

    def of_leaf(keys: Sequence[Any], leaf: Any) -> P:
        path = next((key.key for key in keys if isinstance(key, jax.tree_util.DictKey) and key.key in params), None)
        if path is None or leaf.ndim != params[path].ndim:
            return P()
        return partition_spec(path, leaf.shape, sizes)

    return jax.tree.map_with_path(of_leaf, tree)


def shardings(tree: Any, params: Params, mesh: Mesh) -> Any:
    """Return the result of `partition_specs` as shardings on `mesh`."""
    return jax.tree.map(
        lambda one: NamedSharding(mesh, one),
        partition_specs(tree, params, mesh.shape),
        is_leaf=lambda one: isinstance(one, P),
    )


def shard_bytes(tree: Any, params: Params, sizes: Mapping[str, int]) -> int:
    """Return the bytes per device of `tree`, arrays or shapes, on a mesh with these axis sizes."""

    def of_leaf(leaf: Any, one: P) -> int:
        return leaf.size * leaf.dtype.itemsize // math.prod(parts(axes, sizes) for axes in one)

    is_spec = lambda one: isinstance(one, P)  # noqa: E731
    return sum(jax.tree.leaves(jax.tree.map(of_leaf, tree, partition_specs(tree, params, sizes), is_leaf=is_spec)))


def placed(shapes: Any, shardings: Any) -> Any:
    """Return shapes with the shardings of a tree of the same structure, for programs that are compiled from shapes."""
    return jax.tree.map(lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own), shapes, shardings)


def on_devices(params: Params) -> Params:
    """Return parameters, which may be in host memory, on the devices of the current mesh, if there is one."""
    mesh = jax.sharding.get_mesh()
    return jax.device_put(params) if mesh.empty else jax.device_put(params, shardings(params, params, mesh))
