"""A control network on a mesh of eight devices: velocity and gradients of one device, with images of mixed sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from anima_jax.models import parameters
from anima_jax.models.control import ControlConfig, ControlNetwork
from anima_jax.models.dit import AnimaDiT
from anima_jax.parallel import rules
from anima_jax.parallel.mesh import make_mesh
from tests.models.networks import normal, quick_jit, random_params
from tests.parallel import meshes

CONFIG = dataclasses.replace(meshes.CONFIG, blocks=2, adapter=None)

PLACES = ("self_attn_k_proj", "mlp_layer1")
CONTROL = ControlConfig(3, 8, 8, 8, 1, (), PLACES, CONFIG.blocks, width=CONFIG.width, absent=("1.mlp_layer1",))


def steered(rngs) -> AnimaDiT:
    model = AnimaDiT(CONFIG, rngs=rngs)
    model.control = nnx.data(ControlNetwork(CONTROL, rngs=rngs))
    return model


def velocity_and_gradients(sizes):
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    graphdef, shapes = parameters.abstract(steered)
    params = random_params(shapes)
    params = jax.device_put(params, rules.shardings(params, params, mesh))
    frozen = {path: value for path, value in params.items() if not path.startswith("control.")}
    trained = {path: value for path, value in params.items() if path not in frozen}
    grid, patches = np.array([[1, 4, 8], [1, 5, 6]] * 2, np.int32), normal(4, 32, 768)
    inputs = normal(4, 32, 64, seed=1), grid, jnp.linspace(0, 1, 4), normal(4, 8, CONFIG.context_width, seed=2)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(trained, frozen):
        model = parameters.merge(graphdef, frozen | trained)
        embedding = model.control.embed_patches(patches, grid)
        out = model.velocity(*map(jnp.asarray, inputs), controls=[(model.control, embedding, 0.5)])
        real = np.arange(32)[:, None] < grid.prod(axis=1)[:, None, None]
        return jnp.mean(jnp.square(out * real)), out * real

    with jax.set_mesh(mesh):
        (_, out), grads = quick_jit(run)(trained, frozen)
    return np.asarray(out), {path: np.asarray(grad) for path, grad in grads.items()}


def test_a_steered_transformer_has_the_numbers_of_one_device(on_eight):
    # The fsdp axis shards the batch, as the data axis does, and the weights.
    out, grads = on_eight(velocity_and_gradients, {"data": 1, "fsdp": 2, "tensor": 2, "context": 2})
    expected, expected_grads = velocity_and_gradients({"data": 1, "fsdp": 1, "tensor": 1, "context": 1})
    # Sums over devices have another order.
    np.testing.assert_allclose(out, expected, atol=2e-5 * np.abs(expected).max())
    largest = max(np.abs(grad).max() for grad in expected_grads.values())
    for path, grad in expected_grads.items():
        # Some are zero but for rounding: a bias before a norm has no effect.
        assert np.linalg.norm(grads[path] - grad) <= 1e-4 * np.linalg.norm(grad) + 1e-6 * largest, path
    assert not grads["control.blocks.mlp_layer1.up.bias"][1].any()
