"""The quick start, as the README gives it: after it the model draws what captions say that it has never seen."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from anima_jax import AnimaPipeline
from anima_jax.config.load import load_config
from anima_jax.data.shapes import scenes
from anima_jax.training.export import find_export
from tests.shapes_judge import score

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "shapes.toml"


@pytest.mark.slow
def test_the_quick_start_learns_to_draw_held_out_captions(quick_start):
    run, said = quick_start
    model = find_export(run)
    if f"--checkpoint {run}" not in said or not all(name.startswith("net.") for name in load_file(model)):
        pytest.fail(f"{model} is not what the run promises: {said}")

    config = load_config(CONFIG)
    pipeline = AnimaPipeline.load(
        transformer=model,
        vae=config.model.vae_path,
        text_encoder=config.model.llm_path,
        tokenizers=config.model.tokenizer_path,
        dtype=jnp.float32,
    )
    wanted = scenes(held_out=True)
    pictures = []
    for seed in range(4):
        pictures += pipeline(
            [scene.caption for scene in wanted],
            width=64,
            height=64,
            steps=config.sample.steps,
            guidance_scale=config.sample.guidance_scale,
            shift=config.sample.shift,
            seed=seed,
        )
    scores = score([np.asarray(picture) for picture in pictures], wanted * 4)
    assert len(pictures) == 64
    assert min(scores.values()) >= 0.9, scores
