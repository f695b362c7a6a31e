"""Products in 8 bits on meshes of eight devices: the values and gradients of one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from anima_jax.models.layers import linear
from anima_jax.models.quantised import quantise
from anima_jax.parallel import rules
from anima_jax.parallel.mesh import make_mesh
from tests.models.networks import normal
from tests.parallel.meshes import MESHES

PATHS = {"if": "blocks.mlp.layer1.kernel", "fo": "blocks.mlp.layer2.kernel"}


def product_on(sizes, axes, rotation=0):
    """Return the product of sharded activations and a sharded kernel of one layer, and the activations' gradient."""
    mesh = make_mesh(sizes)
    kernel = quantise(jnp.asarray(normal(1, 64, 128)), "int8")
    kernel = dataclasses.replace(kernel, compute="int8", rotation=rotation)
    kernel = jax.device_put(kernel, rules.shardings({PATHS[axes]: kernel}, {PATHS[axes]: kernel}, mesh)[PATHS[axes]])

    def run(x, kernel, grad):
        out, pull_back = jax.vjp(lambda x: linear(x, kernel[0], kernel_axes=axes), x)
        return out, *pull_back(grad)

    with jax.set_mesh(mesh):
        spec = jax.sharding.PartitionSpec(("data", "fsdp"), "context", "tensor" if axes == "fo" else None)
        x = jax.device_put(normal(8, 4, 64, seed=1), jax.sharding.NamedSharding(mesh, spec))
        return [np.asarray(part) for part in jax.jit(run)(x, kernel, jnp.asarray(normal(8, 4, 128, seed=2)))]


def products_on(sizes):
    return [product_on(sizes, "if"), product_on(sizes, "fo"), product_on(sizes, "fo", 16)]


def test_products_on_a_mesh_are_those_of_one_device(on_eight):
    alone = products_on(dict.fromkeys(rules.AXES, 1))
    for sizes in MESHES[1:4]:
        for found, expected in zip(on_eight(products_on, sizes), alone, strict=True):
            # Integers' sums are exact, but a rotation may round to the next one; gradients sum in another order.
            for tolerance, part, one in zip((2e-3, 1e-5), found, expected, strict=True):
                np.testing.assert_allclose(part, one, atol=tolerance * np.abs(one).max())
