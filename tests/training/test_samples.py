"""Pictures that a run draws: when, of what, and that each says what it shows."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from anima_jax import AnimaPipeline
from anima_jax.config.load import load_config
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
