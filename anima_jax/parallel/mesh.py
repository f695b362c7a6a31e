"""The mesh of a run's devices, and how batches are placed on it.

All its axes (data, fsdp, tensor, context) have type Auto. `data` and `fsdp` shard a batch, `fsdp` and `tensor` the
parameters, `context` the tokens of each example. `data` spans the slowest links: across hosts and slices.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from anima_jax.errors import UserError
from anima_jax.models.constraints import AXES, BATCH_AXES, partition_spec

Tree = TypeVar("Tree")


def resolve_sizes(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """Return the axis sizes with -1 replaced by the remaining devices. Raises UserError unless all devices are used."""
    given = math.prod(size for size in sizes.values() if size != -1)
    rest = devices // given if devices % given == 0 else 0
    resolved = {name: rest if size == -1 else size for name, size in sizes.items()}
    if math.prod(resolved.values()) != devices:
        product = " × ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(
            f"[mesh] {product}: expected a product of {devices}, the number of devices "
            f"(an axis can be {_divisors(devices)}; -1: the remaining devices)"
        )
    return resolved


def check_mesh(sizes: Mapping[str, int], width: int, heads: int) -> None:
    """Raise UserError if axes of these sizes cannot shard a transformer of this width and number of heads.

    `tensor` and `context` together shard the heads in attention, `fsdp` the width of the weights.
    """
    sharded = (
        ("tensor × context", sizes["tensor"] * sizes["context"], "heads", heads),
        ("fsdp", sizes["fsdp"], "width", width),
    )
    for axes, size, what, number in sharded:
        if number % size:
            raise UserError(
                f"[mesh] {axes} = {size} must divide the transformer's {what}, {number}; "
                f"expected one of {_divisors(number)}"
            )


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh of `devices`, by default all; one of `sizes` may be -1.

    `data` spans the slices of a multislice TPU. Raises UserError if the sizes do not match the devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    full = resolve_sizes(sizes, len(devices))
    shape = tuple(full[name] for name in AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        if full["data"] % slices:
            raise UserError(f"[mesh] data {full['data']}: expected a multiple of {slices}, the number of slices")
        inside = (full["data"] // slices, *shape[1:])
        across = (slices, 1, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def local_mesh() -> Mesh:
    """Return a mesh of this process's devices, all along `data`."""
    return make_mesh({"data": -1, "fsdp": 1, "tensor": 1, "context": 1}, jax.local_devices())


def current_mesh() -> Mesh:
    """Return the mesh that is set (`jax.set_mesh`), else one of the first local device. Not usable while tracing.

    It has the form of `standard`.
    """
    mesh = jax.sharding.get_mesh()
    return make_mesh(dict.fromkeys(AXES, 1), jax.local_devices()[:1]) if mesh.empty else standard(mesh)


def standard(mesh: Mesh) -> Mesh:
    """Return a mesh of the same devices with the axes `AXES`, of type Auto; those that `mesh` lacks have size 1.

    `mesh` is any that JAX makes, with axes of any type. Raises UserError if an axis of another name is larger than 1.
    """
    if mesh.axis_names == AXES and set(mesh.axis_types) == {AxisType.Auto}:
        return mesh
    if others := [f"{name} ({size})" for name, size in mesh.shape.items() if size > 1 and name not in AXES]:
        raise UserError(f"the mesh has the axis {', '.join(others)}, expected axes with the names {', '.join(AXES)}")
    order = [mesh.axis_names.index(name) for name in AXES if name in mesh.axis_names]
    order += [number for number in range(mesh.devices.ndim) if number not in order]
    grid = np.transpose(mesh.devices, order).reshape([mesh.shape.get(name, 1) for name in AXES])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def standard_mesh() -> Iterator[None]:
    """Set the `standard` form of the mesh that is set, if one is. Also a decorator; not usable while tracing."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty or (own := standard(mesh)) == mesh:
        yield
        return
    with jax.set_mesh(own):
        yield


def replicas(sizes: Mapping[str, int]) -> int:
    """Return the number of devices, or groups of devices, that process different examples."""
    return math.prod(sizes[name] for name in BATCH_AXES[0])


def batch_sharding(mesh: Mesh, size: int) -> NamedSharding:
    """Return the sharding of an array whose first axis is a batch of this size; replicated if no axes divide it."""
    return NamedSharding(mesh, partition_spec((size,), "b", mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that is replicated on every device."""
    return NamedSharding(mesh, P())


def rows_of_process(mesh: Mesh, size: int) -> np.ndarray:
    """Return the rows of a batch of `size` that are placed on this process's devices, ascending."""
    slices = batch_sharding(mesh, size).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[one] for one in slices if one is not None]))


def shard_local_rows(tree: Tree, mesh: Mesh, rows: np.ndarray, size: int) -> Tree:
    """Return a batch of `size`, sharded on the mesh.

    The arrays of `tree` are in host memory and contain only the rows with the numbers `rows`, ascending.
    """
    sharding = batch_sharding(mesh, size)

    def put(array: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            first = index[0].start or 0
            start = int(np.searchsorted(rows, first))
            return array[start : start + len(range(*index[0].indices(size)))]

        return jax.make_array_from_callback((size, *array.shape[1:]), sharding, part)

    return jax.tree.map(put, tree)


def shard_batch(tree: Tree, size: int) -> Tree:
    """Shard a batch of `size`, which every process has in full, over the mesh that is set.

    Without a mesh it is returned unchanged.
    """
    mesh = jax.sharding.get_mesh()
    return tree if mesh.empty else shard_local_rows(tree, mesh, np.arange(size), size)


def shard(tree: Tree, axes: str) -> Tree:
    """Shard the arrays of `tree` that have these axes, equal in every process, over the mesh that is set.

    Axes are those of `models.constraints`. Arrays of another rank are returned unchanged, as are all without a mesh.
    """
    mesh = jax.sharding.get_mesh()

    def put(array: Any) -> Any:
        if np.ndim(array) != len(axes):
            return array
        spec = partition_spec(array.shape, axes, mesh)
        return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])

    return tree if mesh.empty else jax.tree.map(put, tree)


def replicate(tree: Tree, mesh: Mesh | None = None) -> Tree:
    """Replicate the arrays of `tree`, equal in every process, on `mesh`, by default the mesh that is set.

    JAX arrays are returned unchanged, as are all arrays if there is no mesh.
    """
    mesh = mesh or jax.sharding.get_mesh()

    def put(array: Any) -> Any:
        if isinstance(array, jax.Array):
            return array
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, replicated(mesh), lambda index: host[index])

    return tree if mesh.empty else jax.tree.map(put, tree)
