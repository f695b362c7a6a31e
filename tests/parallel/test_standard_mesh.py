"""Any mesh that JAX makes is converted to ours, with every device where it was, or refused in one sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh

import anima_jax
from anima_jax.errors import UserError
from anima_jax.models.constraints import AXES, constrain
from anima_jax.models.parameters import split
from anima_jax.parallel.mesh import current_mesh, standard, standard_mesh
from anima_jax.text.states import EncodedText
from anima_jax.training.own_loop import ArrayDataset, make_train_step
from tests.compilation import quick_compilation
from tests.models.networks import normal
from tests.small_run import write_transformer

SHAPES = ({"data": 8}, {"fsdp": 2, "data": 4}, {"tensor": 2, "x": 1, "data": 2, "fsdp": 2}, {"context": 2, "fsdp": 4})


def converted():
    """Meshes of other forms, each with its standard form; and what is said of those that are refused."""
    found, refused = [], []
    for shape in SHAPES:
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(kind,) * len(shape))
            own = standard(mesh)
            names = [name for name in AXES if name in shape]
            ids = np.vectorize(lambda device: device.id)
            before = np.moveaxis(ids(mesh.devices), [list(shape).index(name) for name in names], range(len(names)))
            found.append((dict(own.shape), np.array_equal(ids(own.devices).ravel(), before.ravel()), own.axis_types))
    for mesh in (jax.make_mesh((8,), ("x",)), Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))):
        with pytest.raises(UserError) as error:
            standard(mesh)
        refused.append(str(error.value))
    with (
        jax.set_mesh(Mesh(np.array(jax.devices()), ("data",))),
        pytest.raises(ValueError, match="run on a mesh") as error,
    ):
        constrain(jnp.zeros((8, 2)), "bd")
    return found, [*refused, str(error.value).partition("; found")[0]]


def test_every_mesh_has_a_standard_form_or_is_refused(on_eight):
    found, refused = on_eight(converted)
    for (shape, same_order, types), expected in zip(found, [shape for shape in SHAPES for _ in range(2)], strict=True):
        assert shape == {name: expected.get(name, 1) for name in AXES}
        assert same_order
        assert set(types) == {AxisType.Auto}
    assert refused == [
        "the mesh has the axis x (8), expected axes with the names data, fsdp, tensor, context",
        "the mesh has the axis model (4), expected axes with the names data, fsdp, tensor, context",
        "the networks run on a mesh with the axes data, fsdp, tensor, context, all of type Auto",
    ]


def test_without_a_mesh_nothing_is_set():
    with standard_mesh():
        assert jax.sharding.get_mesh().empty
    assert dict(current_mesh().shape) == dict.fromkeys(AXES, 1)


def losses(path):
    """The loss and gradient norm of the first step on one device, and on a mesh of JAX's default type."""
    data = ArrayDataset([normal(4, 64, seed=n) for n in range(8)], [(1, 2, 2)] * 8, [TEXT] * 8)
    (batch,) = data.batches(8, steps=1)
    found = []
    for mesh in (Mesh(np.array(jax.devices()[:1]), ("data",)), jax.make_mesh((2, 4), ("fsdp", "data"))):
        with quick_compilation(), jax.set_mesh(mesh):
            dit = anima_jax.add_adapter(anima_jax.load_dit(path), rank=2)
            kernel = split(dit)[1]["blocks.mlp.layer1.kernel"]
            share = kernel.addressable_shards[0].data.size / kernel.size
            state, step = make_train_step(dit, optax.sgd(0.1), dtype=jnp.float32)
            _, metrics = step(state, batch)
        found.append((float(metrics.loss), float(metrics.grad_norm), share))
    return found


TEXT = EncodedText(normal(3, 64), np.array([5, 6, 1], np.int32))


@pytest.mark.slow
def test_a_step_in_python_is_the_same_on_a_mesh_of_explicit_axes(on_eight, tmp_path):
    write_transformer(tmp_path / "x.safetensors")
    (*alone, _), (*found, share) = on_eight(losses, tmp_path / "x.safetensors")
    assert found == pytest.approx(alone, rel=1e-5)  # sums over the batch in another order
    assert share == 0.5
