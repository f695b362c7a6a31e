"""The mesh of a run's devices, and how batches come onto it.

Axes are (data, fsdp, tensor, context), all of Auto type: `data` and `fsdp` share out a batch, `fsdp` and `tensor` the
parameters, `context` the tokens of each example. `data` runs over the slowest links: across hosts and slices.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from anima_jax.errors import UserError
from anima_jax.models.constraints import BATCH_AXES, partition_spec
from anima_jax.parallel.rules import AXES

Tree = TypeVar("Tree")


def resolve_sizes(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """The axes' sizes with -1 replaced by the devices that are left. Raises UserError unless they take all devices."""
    given = math.prod(size for size in sizes.values() if size != -1)
    rest = devices // given if devices % given == 0 else 0
    found = {name: rest if size == -1 else size for name, size in sizes.items()}
    if math.prod(found.values()) != devices:
        words = " × ".join(f"{name} {size}" for name, size in sizes.items())
        fit = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
        raise UserError(
            f"[mesh] {words}: expected a product of {devices}, the number of devices "
            f"(axes may have {fit}; -1 takes what is left)"
        )
    return found


def check_mesh(sizes: Mapping[str, int], width: int, heads: int) -> None:
    """Raise UserError for axes that would share out nothing of a transformer of this width and so many heads.

    Each device attends for heads of its own, over `tensor` and `context`; `fsdp` shares out the width of the weights.
    """
    shared = (
        ("tensor × context", sizes["tensor"] * sizes["context"], "heads", heads),
        ("fsdp", sizes["fsdp"], "width", width),
    )
    for axes, size, what, whole in shared:
        if whole % size:
            fit = ", ".join(str(n) for n in range(1, whole + 1) if whole % n == 0)
            raise UserError(
                f"[mesh] {axes} = {size}: the transformer's {what}, {whole}, cannot be shared out equally; "
                f"expected one of {fit}"
            )


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of all devices, or of these; one of `sizes` may be -1.

    On several slices of a TPU `data` runs across them. Raises UserError if the sizes do not fit the devices.
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
    """The mesh of this process's own devices, all of them along `data`."""
    return make_mesh({"data": -1, "fsdp": 1, "tensor": 1, "context": 1}, jax.local_devices())


def current_mesh() -> Mesh:
    """The mesh that is set (`jax.set_mesh`), or that of the first device alone. Not for use while tracing."""
    mesh = jax.sharding.get_mesh()
    return make_mesh(dict.fromkeys(AXES, 1), jax.local_devices()[:1]) if mesh.empty else mesh


def replicas(sizes: Mapping[str, int]) -> int:
    """Devices, or groups of devices, that take different examples."""
    return math.prod(sizes[name] for name in BATCH_AXES[0])


def batch_sharding(mesh: Mesh, size: int) -> NamedSharding:
    """Where an array lies whose first axis is a batch of this size: shared out if that divides it equally."""
    return NamedSharding(mesh, partition_spec((size,), "b", mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """Where an array lies that every device has whole."""
    return NamedSharding(mesh, P())


def rows_of_process(mesh: Mesh, size: int) -> np.ndarray:
    """The rows of a batch of `size` that this process's devices take, ascending."""
    parts = batch_sharding(mesh, size).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[part] for part in parts if part is not None]))


def shard_local_rows(tree: Tree, mesh: Mesh, rows: np.ndarray, size: int) -> Tree:
    """A batch of `size` on the devices. The arrays of `tree` are in host memory and hold its `rows` alone."""
    sharding = batch_sharding(mesh, size)

    def put(array: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            first = index[0].start or 0
            start = int(np.searchsorted(rows, first))
            return array[start : start + len(range(*index[0].indices(size)))]

        return jax.make_array_from_callback((size, *array.shape[1:]), sharding, part)

    return jax.tree.map(put, tree)


def shard_batch(tree: Tree, size: int) -> Tree:
    """A batch of `size`, whole in every process, on the mesh that is set; as it is if none is."""
    mesh = jax.sharding.get_mesh()
    return tree if mesh.empty else shard_local_rows(tree, mesh, np.arange(size), size)


def replicate(tree: Tree, mesh: Mesh | None = None) -> Tree:
    """The arrays of `tree`, equal in every process, whole on every device of the mesh, by default of the one set.

    Arrays that are on devices already stay where they are, and so do all if there is no mesh.
    """
    mesh = mesh or jax.sharding.get_mesh()

    def put(array: Any) -> Any:
        if isinstance(array, jax.Array):
            return array
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, replicated(mesh), lambda index: host[index])

    return tree if mesh.empty else jax.tree.map(put, tree)
