"""Meshes of devices, and the rows of a batch on each of them."""

import dataclasses

import jax
import numpy as np
import pytest

from anima_jax.errors import UserError
from anima_jax.parallel import mesh as module
from anima_jax.parallel.mesh import (
    check_mesh,
    make_mesh,
    replicas,
    replicate,
    resolve_sizes,
    rows_of_process,
    shard_local_rows,
)
from tests.parallel.meshes import MESHES


def sizes(**given):
    return {"data": 1, "fsdp": 1, "tensor": 1, "context": 1, **given}


def test_one_axis_can_have_the_remaining_devices():
    assert resolve_sizes(sizes(data=-1, fsdp=4), 32) == sizes(data=8, fsdp=4)
    assert resolve_sizes(sizes(fsdp=-1, tensor=2), 2) == sizes(fsdp=1, tensor=2)
    assert replicas(sizes(data=4, fsdp=2, tensor=8)) == 8


@pytest.mark.parametrize(
    ("given", "devices", "found"),
    [
        (sizes(data=-1, fsdp=3), 8, r"data -1 × fsdp 3 × tensor 1 × context 1: expected a product of 8"),
        (sizes(data=4), 8, r"an axis can be 1, 2, 4, 8"),
        (sizes(data=-1, tensor=16), 8, "expected a product of 8"),
    ],
)
def test_a_mesh_must_use_all_devices(given, devices, found):
    with pytest.raises(UserError, match=found):
        resolve_sizes(given, devices)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (
            sizes(tensor=4, context=8),
            r"× context = 32 must divide the transformer's heads, 16; expected one of 1, 2, 4, 8, 16$",
        ),
        (sizes(fsdp=3), r"fsdp = 3 must divide the transformer's width, 2048; expected one of 1, 2, 4, 8, "),
        (sizes(fsdp=4096), "fsdp = 4096"),
    ],
)
def test_axes_must_divide_the_heads_and_the_width(given, found):
    check_mesh(sizes(data=3, fsdp=8, tensor=4, context=4), 2048, 16)
    with pytest.raises(UserError, match=found):
        check_mesh(given, 2048, 16)


@dataclasses.dataclass(frozen=True)
class Chip:
    """The attributes of a device of a multislice TPU that a mesh uses."""

    id: int
    slice_index: int
    coords: tuple[int, ...] = ()
    platform: str = "cpu"
    device_kind: str = "TPU"
    core_on_chip: int = 0

    @property
    def process_index(self):
        return self.id // 4


def test_data_spans_slices_and_the_other_axes_stay_within_one(monkeypatch):
    monkeypatch.setattr(module, "Mesh", lambda grid, *_, **__: grid)
    chips = [Chip(id, id // 8) for id in range(16)]
    grid = make_mesh(sizes(data=-1, fsdp=4, tensor=2), chips)
    assert grid.shape == (2, 4, 2, 1)
    assert [{chip.slice_index for chip in row.flat} for row in grid] == [{0}, {1}]
    with pytest.raises(UserError, match="data 1: expected a multiple of 2, the number of slices"):
        make_mesh(sizes(fsdp=16), chips)


def test_an_axis_can_be_part_of_a_torus_axis(monkeypatch):
    """Two slices of 4 × 4 × 4 chips with fsdp = 8: no product of torus axes is 8."""
    monkeypatch.setattr(module, "Mesh", lambda grid, *_, **__: grid)
    places = [(x, y, z) for z in range(4) for y in range(4) for x in range(4)]
    chips = [Chip(id, id // 64, places[id % 64], "tpu", "TPU v5p") for id in range(128)]
    grid = make_mesh(sizes(data=-1, fsdp=8), chips)
    assert grid.shape == (16, 8, 1, 1)
    assert all(len({chip.slice_index for chip in row.flat}) == 1 for row in grid)
    assert {chip.id for chip in grid.flat} == set(range(128))


def batches_on(mesh_sizes):
    mesh = make_mesh(mesh_sizes)
    found = {}
    for size in (8, 4, 3):
        rows = rows_of_process(mesh, size)
        batch = shard_local_rows({"x": np.arange(2 * size).reshape(size, 2)[rows]}, mesh, rows, size)["x"]
        parts = {shard.index[0].indices(size)[:2] for shard in batch.addressable_shards}
        found[size] = (rows.tolist(), np.asarray(batch).tolist(), sorted(parts))
    with jax.set_mesh(mesh):
        replicated = replicate({"x": np.arange(3)})["x"]
    assert replicated.is_fully_replicated
    return found


@pytest.mark.parametrize("mesh_sizes", MESHES)
def test_a_batch_is_sharded_over_data_and_fsdp_if_they_divide_it(on_eight, mesh_sizes):
    found, groups = on_eight(batches_on, mesh_sizes), replicas(mesh_sizes)
    for size, (rows, values, parts) in found.items():
        assert rows == list(range(size))
        assert values == np.arange(2 * size).reshape(size, 2).tolist()
        own = next(n for n in (groups, mesh_sizes["data"], mesh_sizes["fsdp"], 1) if size % n == 0)
        assert parts == [(i * size // own, (i + 1) * size // own) for i in range(own)]


def test_the_default_mesh_is_that_of_the_first_device():
    assert module.current_mesh().size == 1
    with jax.set_mesh(make_mesh(sizes())) as _:
        assert module.current_mesh().axis_names == ("data", "fsdp", "tensor", "context")
