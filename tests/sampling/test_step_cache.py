"""Step caches: ComfyUI's EasyCache and diffusers' First Block Cache, images apart from their batch, bad input."""

import dataclasses
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from anima_jax import AnimaPipeline
from anima_jax.diffusion.samplers import SAMPLERS
from anima_jax.diffusion.step_cache import METHODS, Savings, StepCache
from anima_jax.errors import UserError
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT, DiTConfig
from anima_jax.models.dit_inputs import KeysValues, Modulations
from anima_jax.sampling.context import Context
from anima_jax.sampling.noise import BatchNoise
from anima_jax.sampling.request import ImageRequest, SamplingParams
from tests.golden_files import GOLDEN, golden, relative_error
from tests.models import dit_peer
from tests.models.networks import randomise

THRESHOLD = 0.12

FIELD_CONTEXTS = np.ones((1, 1, 1)), np.zeros((1, 1, 1))

with safe_open(GOLDEN / "step_cache.safetensors", "np") as file:
    CASES = json.loads(file.metadata()["cases"])


class Holder(nnx.Module):
    def __init__(self, **values):
        for name, value in values.items():
            setattr(self, name, value)


class Field(nnx.Module):
    """The fields of tests/golden/README.md for the prompt (context 1) and the negative prompt (0), as a transformer."""

    def __init__(self):
        kernel = nnx.Param(jnp.zeros((1, 1, 64)))
        self.blocks = Holder(cross_attn=Holder(k_proj=Holder(kernel=kernel)))

    def keys_values(self, rows_bnd):
        return KeysValues(rows_bnd[None, :, None], rows_bnd[None, :, None])

    def modulations(self, sigmas_s):
        return Modulations((), sigmas_s[:, None, None])

    def velocity(self, x, grid, level, context, after_first=None, **options):
        """The first block adds a part of the field, the others the rest; `x` itself is not part of the result."""
        s, is_prompt = level.final.reshape(()), context.keys[0, :, 0, 0, 0][:, None, None] > 0.5
        positive = jnp.tanh(1.3 * x + 0.2) * (0.7 + 0.3 * s) - 0.4 * x * jnp.cos(2 * s) + 0.1
        negative = 0.8 * jnp.tanh(0.9 * x - 0.1) * (0.6 + 0.4 * s) - 0.3 * x * jnp.cos(1.7 * s) - 0.05
        field = jnp.where(is_prompt, positive, negative)
        return field if after_first is None else after_first(x, x + 0.3 * field, lambda x1: x1 + 0.7 * field) - x


def pipeline_of(model) -> AnimaPipeline:
    pipeline = AnimaPipeline.__new__(AnimaPipeline)
    pipeline.dtype = jnp.dtype(jnp.float32)
    pipeline.dit_graphdef, pipeline.dit_params = parameters.split(model)
    pipeline.savings = Savings()
    return pipeline


@pytest.fixture(scope="module")
def field():
    return pipeline_of(Field())


def drawn(pipeline, sizes_yx, params, contexts=FIELD_CONTEXTS, seed=5):
    """Latents of these sizes, and how many evaluations of how many were saved."""
    pipeline.savings = Savings()
    requests = [ImageRequest("x", x * 8, y * 8, seed + n) for n, (y, x) in enumerate(sizes_yx)]
    noise = BatchNoise(requests, "torch-cpu", SAMPLERS[params.sampler], params.levels())
    both = [Context(jnp.broadcast_to(value, (len(requests), *np.shape(value)[1:])), None) for value in contexts]
    latents = pipeline.sample(*both, noise, params.levels(), params, callback=lambda *_: None)
    return latents, (pipeline.savings.saved, pipeline.savings.evaluations)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_easy_skips_what_comfyuis_node_skips_with_the_same_values(field, index):
    case = CASES[index]
    params = SamplingParams(
        sampler=case["sampler"],
        schedule=case["schedule"],
        steps=case["steps"],
        shift=case.get("shift", 3.0),
        guidance_scale=case["cfg"],
        guidance_interval=tuple(case.get("guided", (0.0, 1.0))),
        cache=f"easy:{case['threshold']}",
        cache_interval=case.get("interval"),
    )
    (latents,), saved = drawn(field, [case["size"]], params)
    assert saved == (case["ran"].count("-"), len(case["ran"]))
    # float32 here, float64 there; another evaluation skipped would change the result by a percent or more.
    assert relative_error(latents.reshape(-1)[::61], golden("step_cache")[str(index)]) < 1e-5


@pytest.mark.parametrize("cache", ["easy:0.3", "first_block:0.3"])
def test_an_image_is_the_same_bits_in_a_batch_whose_images_skip_other_evaluations(field, cache):
    params = SamplingParams(steps=12, sampler="euler", cache=cache)
    sizes = [(16, 24), (15, 23), (22, 16)]  # of one token budget
    together, (saved, _) = drawn(field, sizes, params)
    alone = [drawn(field, [size], params, seed=5 + n) for n, size in enumerate(sizes)]
    counts = [count for _, (count, _) in alone]
    assert 0 < saved <= min(counts)
    for found, ((expected,), _) in zip(together, alone, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_threshold_that_is_never_reached_changes_nothing(field):
    params = SamplingParams(steps=4, sampler="euler")
    plain, _ = drawn(field, [(16, 24)], params)
    for method in METHODS:
        cached, (saved, _) = drawn(field, [(16, 24)], dataclasses.replace(params, cache=f"{method}:1e-9"))
        assert saved == 0
        # The field as the difference of two sums has another rounding.
        assert relative_error(cached[0], plain[0]) < 1e-5


def test_first_block_is_diffusers_first_block_cache():
    """Oracle: its hooks on its own transformer, along Euler's steps without guidance."""
    pytest.importorskip("torch"), pytest.importorskip("diffusers")
    config = DiTConfig(width=96, blocks=3, heads=2, mlp_width=128, context_width=32, adaln_rank=16, adapter=None)
    peer = randomise(dit_peer.transformer(config))
    params = SamplingParams(steps=16, sampler="euler", guidance_scale=1.0, cache=f"first_block:{THRESHOLD}")
    structure, _ = parameters.split(AnimaDiT(config, rngs=nnx.Rngs(0)))
    pipeline = pipeline_of(parameters.merge(structure, dit_peer.our_params(peer, config)))
    context = np.random.default_rng(0).standard_normal((1, 512, 32)).astype(np.float32)
    (found,), (saved, evaluations) = drawn(pipeline, [(12, 16)], params, contexts=(context, context))

    ran = with_first_block_cache(peer, THRESHOLD)
    levels, request = params.levels(), ImageRequest("x", 128, 96, 5)
    x = BatchNoise([request], "torch-cpu", SAMPLERS["euler"], levels).start[0][None]
    for sigma, after in itertools.pairwise(levels):
        latents = np.ascontiguousarray(np.moveaxis(x, -1, 1))
        x = x + (after - sigma) * dit_peer.velocity(peer, latents, np.array([sigma]), context)
    assert (saved, evaluations) == (16 - len(ran), 16)
    assert 3 < saved < 13
    assert relative_error(found, x[0]) < 1e-4  # a random network amplifies rounding


def with_first_block_cache(peer, threshold: float) -> list[int]:
    """Turn on diffusers' cache, and return the list to which each run of the second block adds an item."""
    from diffusers import hooks
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
    from diffusers.hooks.hooks import CacheContext
    from diffusers.hooks.hooks import _set_cache_context as set_context
    from diffusers.models.transformers import transformer_cosmos

    TransformerBlockRegistry.register(transformer_cosmos.CosmosTransformerBlock, TransformerBlockMetadata())
    hooks.apply_first_block_cache(peer, hooks.FirstBlockCacheConfig(threshold=threshold))
    set_context(peer, CacheContext("prompt"))
    runs: list[int] = []
    peer.transformer_blocks[1].attn1.register_forward_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"cache": "esay"},
            "cache 'esay', expected one of off, easy, first_block, as in easy:0.2 (did you mean 'easy'?)",
        ),
        ({"cache": "easy:0"}, "cache 'easy:0': threshold '0', expected a number above 0"),
        ({"cache": "easy:-1"}, "cache 'easy:-1': threshold '-1', expected a number above 0"),
        ({"cache": "first_block:nan"}, "cache 'first_block:nan': threshold 'nan', expected a number above 0"),
        ({"cache": "easy:inf"}, "cache 'easy:inf': threshold 'inf', expected a number above 0"),
        ({"cache": "easy:"}, "cache 'easy:': threshold '', expected a number above 0"),
        ({"cache": "easy:0.1:2"}, "cache 'easy:0.1:2': threshold '0.1:2', expected a number above 0"),
        ({"cache": 0.2}, "cache 0.2, expected text"),
        ({"cache_interval": (0.1, 0.5)}, "cache_interval without cache: expected cache, too"),
        ({"cache": "easy", "cache_interval": (0.5, 0.1)}, "cache_interval 0.5 0.1, expected two ascending numbers"),
        ({"cache": "easy", "cache_interval": (0.5, float("nan"))}, "cache_interval 0.5 nan, expected two ascending"),
        ({"cache": "easy", "cache_interval": 0.5}, "cache_interval 0.5, expected two ascending numbers"),
        ({"cache": "easy", "cache_interval": "01"}, "cache_interval 0 1, expected two ascending numbers"),
        ({"guidance_interval": ("0", "1")}, "guidance_interval 0 1, expected two ascending numbers"),
        ({"guidance_interval": None}, "guidance_interval None, expected two ascending numbers"),
    ],
)
def test_what_is_not_a_cache_is_one_line(settings, message):
    with pytest.raises(UserError) as error:
        SamplingParams(**settings).check()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_off_is_none_and_defaults_are_those_of_the_nodes():
    assert SamplingParams(cache="off") == SamplingParams()
    assert StepCache.parse("easy") == StepCache("easy", 0.2, (0.15, 0.95))
    assert StepCache.parse("first_block:0.07", (0.2, 1.0)) == StepCache("first_block", 0.07, (0.2, 1.0))
