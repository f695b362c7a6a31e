"""Sharding of activations: the letters of an array's axes → axes of the device mesh.

Networks do not know the mesh. They name the axes of an array, and where a mesh is set (`jax.set_mesh`, with axes of
type Auto called data, fsdp, tensor and context), `MESH_AXES` says how the array is sharded on it. Without a mesh
nothing happens.
Letters: b batch, l tokens, h heads, f features that tensor parallelism splits; any other axis is replicated.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec as P

BATCH_AXES = (("data", "fsdp"), ("data",), ("fsdp",))
"""Mesh axes that can shard a batch: the first entry whose number of devices divides the batch is used."""

MESH_AXES: Mapping[str, Sequence[tuple[str, ...]]] = {
    "b": BATCH_AXES,
    "l": (("context",),),
    "h": (("tensor",),),
    "f": (("tensor",),),
    # Heads during attention, where each device of the context axis has all tokens of some of the heads.
    "H": (("tensor", "context"),),
}


def active_mesh() -> Any:
    """Return the mesh that is set, or None if there is none or it has a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def partition_spec(shape: Sequence[int], axes: str, mesh: Any) -> P:
    """Return the spec of an array of this shape. An axis whose size the devices do not divide is replicated."""

    def mesh_axes(size: int, letter: str) -> tuple[str, ...] | None:
        choices = MESH_AXES.get(letter, ())
        return next((names for names in choices if size % math.prod(mesh.shape[name] for name in names) == 0), None)

    return P(*map(mesh_axes, shape, axes))


def constrain(x: Array, axes: str) -> Array:
    """Return `x`, sharded over the mesh that is set as the letters of its axes say."""
    mesh = active_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, partition_spec(x.shape, axes, mesh))
