"""Pictures that a run draws: when, of what, and that each says what it shows."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from anima_jax import AnimaPipeline
from anima_jax.config.load import load_config
from anima_jax.errors import UserError
from anima_jax.training.intervals import RunPoint
from anima_jax.training.jsonl import JsonlWriter
from anima_jax.training.samples import Samples
from anima_jax.training.step import TrainState
from anima_jax.training.writer import Dashboards, Writer
from tests.small_run import ASSETS, write_config, write_transformer
from tests.training.test_writer import events


@pytest.fixture
def configured(tmp_path):
    (tmp_path / "pictures").mkdir()
    write_transformer(tmp_path / "base.safetensors")

    def load(sample):
        return load_config(write_config(tmp_path, tmp_path / "pictures", "epochs = 1", sample=sample))

    return load


def test_samples_are_due_by_steps_or_epochs_and_at_the_end(tmp_path, configured):
    def due(sample):
        samples = Samples(configured(sample).sample, (32, 32), None, {}, tmp_path, None)  # type: ignore[arg-type]
        # An epoch ends after every three steps.
        return [n for n in range(1, 11) if samples.due(RunPoint(n, 10, ((n - 1) // 3, n // 3)))]

    assert due("prompts = ['a']\nevery_n_steps = 4") == [4, 8, 10]
    assert due("prompts = ['a']\nevery_n_epochs = 2") == [6, 10]
    assert due("prompts = ['a']\nevery_n_epochs = 2\nevery_n_steps = 4") == [4, 6, 8, 10]


def test_a_grid_shows_every_prompt_with_every_seed_and_says_so(tmp_path, configured):
    sample = "prompts = ['a cat', '猫']\nseeds = [3, 5]\nsteps = 1\nguidance_scale = 1.0"
    config = configured(sample)
    pipeline = AnimaPipeline.load(
        transformer=tmp_path / "base.safetensors",
        vae=ASSETS / "tiny_vae.safetensors",
        text_encoder=ASSETS / "tiny_qwen3.safetensors",
        tokenizers=ASSETS / "tokenizers",
        dtype=jnp.float32,
    )
    params = dict(pipeline.dit_params)
    drawn = [
        image
        for seed in (3, 5)
        for image in pipeline(["a cat", "猫"], width=32, height=32, steps=1, guidance_scale=1.0, seed=seed)
    ]
    log = JsonlWriter(tmp_path / "metrics.jsonl", 0)
    writer = Writer(RunPoint(499, 500), log, dashboards=Dashboards(tmp_path / "board", config))
    samples = Samples(config.sample, (32, 32), pipeline, {}, tmp_path / "samples", writer)
    samples.perform(RunPoint(500, 500), TrainState(jnp.array(500), params, ((), ()), None, jnp.array(0), jnp.array(0)))
    writer.close()
    picture = Image.open(tmp_path / "samples" / "step000500.png")
    # No chunk `prompt`: ComfyUI takes its text for a graph of nodes.
    assert set(picture.text) == {"anima_jax_samples"}
    settings = json.loads(picture.text["anima_jax_samples"])
    assert (settings["prompts"], settings["seeds"], settings["step"]) == (["a cat", "猫"], [3, 5], 500)
    grid = np.asarray(picture)
    for tile, image in enumerate(drawn):
        tile_pixels = grid[:128, 132 * tile : 132 * tile + 128][::4, ::4]  # enlarged four times, 4 pixels apart
        np.testing.assert_array_equal(tile_pixels, image)
    (event,) = [event for event in events(tmp_path / "board") if event.summary.value]
    (value,) = event.summary.value
    assert (event.step, value.tag) == (500, "samples")
    (tmp_path / "shown.png").write_bytes(value.image.encoded_image_string)
    np.testing.assert_array_equal(Image.open(tmp_path / "shown.png"), grid)


def test_each_prompt_has_its_own_negative_prompt_however_many_are_drawn_at_once(tmp_path, configured):
    sample = "prompts = ['a', 'b', 'c']\nnegative_prompt = ['x', 'x', 'y']\nseeds = [3, 5]\nat_once = 1\nsteps = 2"
    config, calls = configured(sample).sample, []

    class Pipeline:
        """Notes what is asked for."""

        dit_params, dtype = {}, jnp.float32

        def draw(self, requests, params):
            calls.append((requests, params))
            return [Image.new("RGB", (32, 32))] * len(requests)

    log = JsonlWriter(tmp_path / "metrics.jsonl", 0)
    for at_once in (1, 4):
        calls.clear()
        writer = Writer(RunPoint(0, 5), log)
        own = config.model_copy(update={"at_once": at_once})
        samples = Samples(own, (32, 32), Pipeline(), {}, tmp_path / str(at_once), writer)  # type: ignore[arg-type]
        samples.perform(RunPoint(5, 5), TrainState(jnp.array(5), {}, ((), ()), None, jnp.array(0), jnp.array(0)))
        assert [len(requests) for requests, _ in calls] == ([1] * 6 if at_once == 1 else [2, 1, 2, 1])
        drawn = [(r.prompt, p.negative_prompt, r.seed, r.batch_index) for requests, p in calls for r in requests]
        # A seed's images are one ComfyUI batch: each has the same noise, whatever is drawn with it.
        each = [("a", "x", 0), ("b", "x", 1), ("c", "y", 2)]
        assert drawn == [(prompt, negative, seed, index) for seed in (3, 5) for prompt, negative, index in each]
    writer.close()


def test_negative_prompts_that_are_not_one_for_each_prompt_are_an_error(configured):
    with pytest.raises(UserError, match="found 1 text for 2 prompts, expected one text, or one for each"):
        configured("prompts = ['a', 'b']\nnegative_prompt = ['x']")
    assert configured("prompts = ['a', 'b']\nnegative_prompt = 'x'").sample.negative_prompts == ("x", "x")
