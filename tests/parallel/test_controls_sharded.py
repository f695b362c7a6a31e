"""Images with control networks on a mesh of devices are those of one device."""

import jax
import numpy as np

from anima_jax.parallel.mesh import make_mesh
from tests.compilation import quick_compilation
from tests.sampling.test_controls import EULER, load, requests, write_files


def drawn_on(folder, sizes):
    """Latents of a mixed batch, each image with its own controls."""
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    with quick_compilation(), jax.set_mesh(mesh):
        return load(folder).draw_latents(requests(folder), EULER)


def test_controls_on_a_mesh_are_those_of_one_device(on_eight, tmp_path):
    write_files(tmp_path)
    on_mesh = on_eight(drawn_on, tmp_path, {"data": 1, "fsdp": 2, "tensor": 2, "context": 2})
    single = drawn_on(tmp_path, dict.fromkeys(("data", "fsdp", "tensor", "context"), 1))
    for found, expected in zip(on_mesh, single, strict=True):
        # Sums over devices have another order, which a random network amplifies.
        np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())
