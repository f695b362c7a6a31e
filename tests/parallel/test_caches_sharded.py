"""Step caches on a mesh of devices save what they save on one, with the same values."""

import dataclasses

import jax
import numpy as np

from anima_jax.models.dit import AnimaDiT
from anima_jax.parallel import rules
from anima_jax.parallel.mesh import make_mesh
from anima_jax.sampling.request import SamplingParams
from tests.models.networks import random_model
from tests.parallel.meshes import CONFIG
from tests.sampling.test_step_cache import drawn, pipeline_of

CACHES = ("easy:1", "first_block:0.5")


def cached_on(sizes):
    """Latents with each cache, and its savings; guidance ends on the way, and the images have padding."""
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    pipeline = pipeline_of(random_model(AnimaDiT, dataclasses.replace(CONFIG, blocks=2, adapter=None)))
    pipeline.dit_params = jax.device_put(
        pipeline.dit_params, rules.shardings(pipeline.dit_params, pipeline.dit_params, mesh)
    )
    context = np.random.default_rng(0).standard_normal((1, 16, 32)).astype(np.float32)
    settings = {"steps": 6, "sampler": "euler", "guidance_interval": (0.0, 0.5)}
    with jax.set_mesh(mesh):
        runs = [SamplingParams(cache=cache, **settings) for cache in CACHES]
        return [drawn(pipeline, [(10, 12), (6, 16)], params, (context, 0.5 * context)) for params in runs]


def test_step_caches_save_the_same_evaluations_on_a_mesh(on_eight):
    on_mesh = on_eight(cached_on, {"data": 2, "fsdp": 1, "tensor": 1, "context": 2})
    on_one = cached_on({"data": 1, "fsdp": 1, "tensor": 1, "context": 1})
    for (found, saved), (expected, saved_on_one) in zip(on_mesh, on_one, strict=True):
        assert saved == saved_on_one
        assert saved[0] > 0
        for image, other in zip(found, expected, strict=True):
            # Sums over devices have another order, which a random network amplifies.
            np.testing.assert_allclose(image, other, atol=1e-4 * np.abs(other).max())
