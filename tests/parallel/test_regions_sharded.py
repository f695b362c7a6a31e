"""Images with regions on a mesh of devices are those of one device."""

import dataclasses

import jax
import numpy as np

from anima_jax.models.dit import AnimaDiT
from anima_jax.parallel import rules
from anima_jax.parallel.mesh import make_mesh
from anima_jax.sampling.regions import Region
from anima_jax.sampling.request import SamplingParams
from tests.models.networks import random_model
from tests.parallel.meshes import CONFIG
from tests.sampling.test_regions import drawn, rows_of_prompt
from tests.sampling.test_step_cache import pipeline_of


def drawn_on(sizes):
    """Latents of two images with a mask and an area each, with a step cache."""
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    pipeline = pipeline_of(random_model(AnimaDiT, dataclasses.replace(CONFIG, blocks=2, adapter=None)))
    pipeline.dit_params = jax.device_put(
        pipeline.dit_params, rules.shardings(pipeline.dit_params, pipeline.dit_params, mesh)
    )
    regions = [
        [Region(np.indices((8 * y, 8 * x)).sum(axis=0) % 256 / 255, "0.9", 2.0), Region((16, 24, 48, 40), "-0.6")]
        for y, x in [(10, 12), (8, 16)]
    ]
    params = SamplingParams(steps=3, sampler="euler", cache="first_block:0.01")
    with jax.set_mesh(mesh):
        return drawn(pipeline, [(10, 12), (8, 16)], regions, params, context=rows_of_prompt)


def test_regions_on_a_mesh_are_those_of_one_device(on_eight):
    on_mesh = on_eight(drawn_on, {"data": 4, "fsdp": 1, "tensor": 1, "context": 2})
    for found, expected in zip(on_mesh, drawn_on(dict.fromkeys(("data", "fsdp", "tensor", "context"), 1)), strict=True):
        # Sums over devices have another order, which a random network amplifies.
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
