"""Sharding of activations: axis letters → axes of the device mesh.

Networks do not know the mesh. They label the axes of an array with letters, and if a mesh is set (`jax.set_mesh`, with
axes data, fsdp, tensor and context of type Auto), `MESH_AXES` says how the array is sharded on it. Without a mesh
`constrain` does nothing.
Letters: b batch, l tokens, h heads, f features that tensor parallelism splits; axes with other letters are replicated.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor", "context")
"""Axes of the mesh, slowest links first."""

BATCH_AXES = (("data", "fsdp"), ("data",), ("fsdp",))
"""Mesh axes that can shard a batch: the first entry whose number of devices divides the batch is used."""

MESH_AXES: Mapping[str, Sequence[tuple[str, ...]]] = {
    "b": BATCH_AXES,
    "l": (("context",),),
    "h": (("tensor",),),
    "f": (("tensor",),),
    # Heads during attention: each device along the context axis has all tokens of some of the heads.
    "H": (("tensor", "context"),),
}


def active_mesh() -> Any:
    """Return the mesh that is set, or None if no mesh is set or it has a single device.

    Raises ValueError for a mesh with axes of other names or types; `parallel.mesh.standard` converts those of others.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    if set(mesh.axis_names) != set(AXES) or set(mesh.axis_types) != {AxisType.Auto}:
        raise ValueError(f"the networks run on a mesh with the axes {', '.join(AXES)}, all of type Auto; found {mesh}")
    return mesh


def gathers_weights() -> bool:
    """Return whether the active mesh shards weights over `fsdp`, so that its devices gather them."""
    mesh = active_mesh()
    return mesh is not None and mesh.shape["fsdp"] > 1


def partition_spec(shape: Sequence[int], axes: str, mesh: Any) -> P:
    """Return the spec of an array with these axis letters. Axes that the devices do not divide are replicated."""

    def mesh_axes(size: int, letter: str) -> tuple[str, ...] | None:
        choices = MESH_AXES.get(letter, ())
        return next((names for names in choices if size % math.prod(mesh.shape[name] for name in names) == 0), None)

    return P(*map(mesh_axes, shape, axes))


def constrain(x: Array, axes: str) -> Array:
    """Return `x` sharded over the active mesh as its axis letters say, or unchanged without an active mesh."""
    mesh = active_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, partition_spec(x.shape, axes, mesh))
