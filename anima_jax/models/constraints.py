"""Where activations lie on a mesh of devices: the axes that their names carry → axes of the mesh.

Networks know no mesh; they say what an array's axes are, and where a mesh is set (`jax.set_mesh`, with axes of Auto
type called data, fsdp, tensor and context) that decides its place. Without one nothing happens.
Letters: b batch, l tokens, h heads, f features that tensor parallelism splits; any other axis is whole everywhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec as P

BATCH = (("data", "fsdp"), ("data",), ("fsdp",))
"""Mesh axes that share out a batch: the first of these that its size divides into."""

MESH_AXES: Mapping[str, Sequence[tuple[str, ...]]] = {
    "b": BATCH,
    "l": (("context",),),
    "h": (("tensor",),),
    "f": (("tensor",),),
    # Heads where every device of the context axis sees all tokens, and so has heads of its own.
    "H": (("tensor", "context"),),
}


def active_mesh() -> Any:
    """The mesh that is set, None if there is none or it is of one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def partition_spec(shape: Sequence[int], axes: str, mesh: Any) -> P:
    """The spec of an array of this shape; an axis that cannot be shared out equally is whole everywhere."""

    def choice(size: int, letter: str) -> tuple[str, ...] | None:
        for names in MESH_AXES.get(letter, ()):
            parts = 1
            for name in names:
                parts *= mesh.shape[name]
            if size % parts == 0:
                return names
        return None

    return P(*map(choice, shape, axes))


def constrain(x: Array, axes: str) -> Array:
    """`x`, laid out over the mesh as the letters of its axes say."""
    mesh = active_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, partition_spec(x.shape, axes, mesh))
