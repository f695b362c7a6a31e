"""`dpm_adaptive` in the pipeline: its steps against those on the host, which equal ComfyUI's, and its batches."""

import jax.numpy as jnp
import numpy as np
import pytest

from anima_jax import AnimaPipeline
from anima_jax.diffusion import samplers, schedules
from anima_jax.errors import NotFiniteError
from anima_jax.sampling.batches import draw_whole_batches, whole_batches
from anima_jax.sampling.noise import BatchNoise
from anima_jax.sampling.request import ImageRequest, SamplingParams
from tests.diffusion.test_samplers import in_adaptive_steps
from tests.golden_files import relative_error
from tests.small_run import ASSETS, write_transformer

OPTIONS = {"rtol": 0.3, "atol": 0.1, "h_init": 1.5, "eta": 0.4}
"""Options that make for few steps, some of which are rejected."""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    path = tmp_path_factory.mktemp("adaptive") / "base.safetensors"
    write_transformer(path)
    tiny = {name: ASSETS / f"tiny_{file}.safetensors" for name, file in (("vae", "vae"), ("text_encoder", "qwen3"))}
    return AnimaPipeline.load(transformer=path, tokenizers=ASSETS / "tokenizers", dtype=jnp.float32, **tiny)


def latents_of(pipeline, *requests, **params):
    calls = []

    def callback(done, total, latents):
        calls.append((done, total, latents()))

    found = pipeline.draw_latents(
        [ImageRequest("x", *request) for request in requests],
        SamplingParams(sampler="dpm_adaptive", steps=4, guidance_scale=1.5, **params),
        callback=callback,
    )
    return found, calls


def test_steps_are_those_that_the_error_of_a_whole_batch_asks_for(pipeline):
    """The network's estimate at a point is the result of one Euler step to 0."""
    requests = [ImageRequest("x", 32, 24, 3, 2, index) for index in range(2)]
    levels = schedules.sigmas("simple", 4)
    noise = BatchNoise(requests, "torch-cpu", samplers.SAMPLERS["dpm_adaptive"], levels)
    drawn = [np.stack(noise.step(samplers.plan.Draw(1.0, 0.5))) for _ in range(9)]
    prompts = pipeline.encode(["x", "x"]), pipeline.encode(["", ""])
    params = SamplingParams(sampler="euler", guidance_scale=1.5)

    def estimates(x, sigma):
        clean = [np.asarray(image / sigma, np.float32) for image in x]
        step = np.array([sigma, 0.0], np.float32)
        estimate = np.stack(pipeline.sample(*prompts, Start(clean), step, params, callback=lambda *_: None))
        return estimate, estimate

    expected = in_adaptive_steps(levels, np.stack(noise.start), drawn, estimates, **OPTIONS)
    found, calls = latents_of(pipeline, (32, 24, 3, 2, 0), (32, 24, 3, 2, 1), sampler_options=OPTIONS)
    # 1e-3 as in tests/golden/README.md: a random network amplifies rounding.
    assert relative_error(found, expected) < 1e-3
    counts = [done for done, _, _ in calls]
    assert counts == list(range(0, counts[-1] + 1, 3))
    assert all(done < total for done, total, _ in calls[:-1])
    assert calls[-1][:2] == (counts[-1], counts[-1])


class Start:
    """The noise of a `BatchNoise` that has only a start."""

    keys_b3 = None
    step = None

    def __init__(self, start):
        self.start = start


def test_an_image_does_not_depend_on_what_else_is_drawn(pipeline):
    params = {"noise": "jax", "sampler_options": OPTIONS}
    requests = (32, 24, 3, 2, 0), (32, 24, 3, 2, 1), (24, 32, 9, 2, 1)
    (first, second, other), calls = latents_of(pipeline, *requests, **params)
    for request, together in zip(requests[1:], (second, other), strict=True):
        (alone,), _ = latents_of(pipeline, request, **params)
        np.testing.assert_array_equal(together, alone)
    assert relative_error(second, first) > 1e-2
    done, totals, shown = zip(*calls, strict=True)
    assert list(done) == sorted(done)
    assert [d == t for d, t in zip(done, totals, strict=True)] == [False] * (len(done) - 1) + [True]
    assert [image.shape for image in shown[-1]] == [first.shape, second.shape, other.shape]


def test_a_network_that_returns_nan_ends_the_sampling(pipeline, monkeypatch):
    broken = {name: value * np.nan for name, value in pipeline.dit_params.items()}
    monkeypatch.setattr(pipeline, "dit_params", broken)
    with pytest.raises(NotFiniteError):
        latents_of(pipeline, (32, 24, 3, 2, 0), sampler_options=OPTIONS)


def test_options_are_arguments_of_the_pipeline(pipeline):
    def drawn(**params):
        return np.asarray(pipeline("x", width=32, height=24, steps=3, seed=1, **params)[0]).astype(int)

    ancestral, euler = drawn(sampler="euler_ancestral", eta=0.0), drawn(sampler="euler")
    assert np.abs(ancestral - euler).max() <= 1
    np.testing.assert_array_equal(drawn(sampler="euler_ancestral", sampler_options={"eta": 0}), ancestral)


def test_a_batch_is_drawn_once_and_whole():
    drawn = []

    def draw(batch, callback):
        drawn.append([(request.seed, request.batch_index) for request in batch])
        callback(5, 5, lambda: [np.full((1, 1, 1, 1), request.seed + 0.1 * request.batch_index) for request in batch])
        return [np.full((1, 1, 1, 1), request.seed + 0.1 * request.batch_index) for request in batch]

    requests = [
        ImageRequest("x", seed=seed, batch_size=3, batch_index=index) for seed, index in ((1, 2), (2, 0), (1, 0))
    ]
    told = []
    found = draw_whole_batches(requests, lambda done, total, latents: told.append((done, total, latents())), draw)
    assert drawn == [[(1, 0), (1, 1), (1, 2)], [(2, 0), (2, 1), (2, 2)]]
    assert [float(image.item()) for image in found] == [1.2, 2.0, 1.0]
    assert [(done, total, [image.item() for image in images]) for done, total, images in told] == [
        (5, 10, [1.2, 0.0, 1.0]),
        (10, 10, [1.2, 2.0, 1.0]),
    ]


def test_requests_that_are_a_batch_together_may_have_different_prompts():
    def batches(*requests):
        found = whole_batches(
            [ImageRequest(prompt, seed=seed, batch_size=2, batch_index=i) for prompt, seed, i in requests]
        )
        return [[(request.prompt, request.seed, request.batch_index) for request in batch] for batch in found]

    assert batches(("b", 1, 1), ("a", 1, 0)) == [[("a", 1, 0), ("b", 1, 1)]]
    assert batches(("a", 1, 0), ("b", 2, 1)) == [[("a", 1, 0), ("a", 1, 1)], [("b", 2, 0), ("b", 2, 1)]]
    two = [("a", 1, 0), ("a", 1, 1), ("b", 1, 0), ("b", 1, 1)]
    assert batches(*two) == [two[:2], two[2:]]
