"""The README's quick start: after training, the model draws what captions say that it never saw, and learns a colour.

The run takes minutes: all tests that need it are in this file, so that it runs once.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from anima_jax import AnimaPipeline
from anima_jax.config.load import load_config
from anima_jax.data.shapes import BACKGROUNDS, COLOURS, SHAPES, Scene, draw, draw_in_colours, sample_placement, scenes
from anima_jax.diffusion.samplers import SAMPLERS
from anima_jax.train import main as train
from anima_jax.training.export import find_export
from convert.__main__ import main as convert
from tests.shapes_judge import judge, overlap, score
from tests.small_run import ASSETS, psnr, write_config

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "shapes.toml"
CYAN = (40, 205, 215)


@pytest.fixture(scope="module")
def quick_start(tmp_path_factory) -> tuple[pathlib.Path, str]:
    """The folder of a run of configs/shapes.toml and its output.

    If `QUICK_START_RUN` is set, that folder is used and nothing is trained.
    """
    if "QUICK_START_RUN" in os.environ:
        run = pathlib.Path(os.environ["QUICK_START_RUN"])
        return run, f"--checkpoint {run}"
    folder = tmp_path_factory.mktemp("quick_start")
    command = [sys.executable, "-m", "anima_jax.train", "--config", str(CONFIG), "--set", f"output_dir={folder}/runs"]
    environment = os.environ | {"TFDS_DATA_DIR": str(folder / "data")}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    (run,) = (folder / "runs").iterdir()
    return run, output


@pytest.fixture(scope="module")
def trained(quick_start):
    """The configuration of a finished quick-start run, and a pipeline with its model."""
    run, output = quick_start
    model = find_export(run)
    if f"--checkpoint {run}" not in output or not all(name.startswith("net.") for name in load_file(model)):
        pytest.fail(f"{model} is not what the run announced: {output}")
    config = load_config(CONFIG)
    pipeline = AnimaPipeline.load(
        transformer=model,
        vae=config.model.vae_path,
        text_encoder=config.model.llm_path,
        tokenizers=config.model.tokenizer_path,
        dtype=jnp.float32,
    )
    return config, pipeline


def generate(trained, seed: int, **settings) -> list[np.ndarray]:
    """Return an image for each held-out caption."""
    config, pipeline = trained
    settings = config.sample.sampling | settings
    captions = [scene.caption for scene in scenes(held_out=True)]
    return [np.asarray(image) for image in pipeline(captions, width=64, height=64, seed=seed, **settings)]


@pytest.mark.slow
def test_the_quick_start_learns_to_draw_held_out_captions(trained):
    images, wanted = [image for seed in range(4) for image in generate(trained, seed)], scenes(held_out=True) * 4
    named = sum(judge(image) == scene for image, scene in zip(images, wanted, strict=True))
    assert len(images) == 64
    assert named >= 60
    # The VAE alone reaches 0.97: an edge half a pixel off costs 0.05.
    assert np.mean([overlap(image, scene) for image, scene in zip(images, wanted, strict=True)]) >= 0.93


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_what_the_captions_say(trained, sampler):
    # CFG++ guides more strongly at the same scale; its form of DPM-Solver++(2S) still needs more than 1.
    weakest = 1.6 if sampler == "dpmpp_2s_ancestral_cfg_pp" else 1.0
    scale = {"guidance_scale": weakest} if "cfg_pp" in sampler or "cfgpp" in sampler else {}
    noise = "torch-cuda" if sampler.endswith("_gpu") else "torch-cpu"
    scores = score(generate(trained, 0, steps=20, sampler=sampler, noise=noise, **scale), scenes(held_out=True))
    # 12 of 16 images; by chance it would be 3.
    assert min(scores.values()) >= 0.75, scores


# An adapter that teaches a new colour


def write_lesson(folder: pathlib.Path) -> list[Scene]:
    """Cyan shapes, a quarter of whose shapes and backgrounds are held out, among pictures of what is known already.

    Returns the scenes that are held out.
    """
    folder.mkdir()
    pairs = [(s, shape, b, back) for s, shape in enumerate(SHAPES) for b, back in enumerate(BACKGROUNDS)]
    pictures = []
    for number, (shape, background) in enumerate([(shape, back) for s, shape, b, back in pairs if (s + b) % 4] * 8):
        placement = sample_placement(np.random.default_rng([7, number]))
        picture = draw_in_colours(shape, CYAN, BACKGROUNDS[background], *placement)
        pictures.append((picture, Scene(shape, "cyan", background).caption))
    for number, scene in enumerate(scenes(held_out=False)):
        pictures.append((draw(scene, *sample_placement(np.random.default_rng([8, number]))), scene.caption))
    for number, (picture, caption) in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(caption)
    return [Scene(shape, "cyan", back) for s, shape, b, back in pairs if not (s + b) % 4]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rate"), [("type = 'lora'\nrank = 8", 1.5e-3), ("type = 'lokr'\nrank = 4", 1e-2)])
def test_an_adapter_on_the_quick_start_learns_a_colour_and_merging_it_is_loading_it(
    quick_start, tmp_path, monkeypatch, kind, rate
):
    known = scenes(held_out=True)[::2]
    new = write_lesson(tmp_path / "pictures")
    shutil.copy(find_export(quick_start[0]), tmp_path / "base.safetensors")
    config = write_config(
        tmp_path,
        tmp_path / "pictures",
        "epochs = 1000\nmax_steps = 400\nsave_every_n_steps = 400\nmicro_batch_size_per_gpu = 16\nema_decay = 0.98\n"
        "uncond_fraction = 0.1\nwarmup_steps = 10\nsave_dtype = 'float32'\ncaching_batch_size = 16\n",
        model="shift = 3.0\n",
        optimizer=f"type = 'adamw'\nlr = {rate}\nbetas = [0.9, 0.99]",
        adapter=kind,
    )
    train(["--config", str(config)])
    lora = find_export(next((tmp_path / "runs").iterdir()))
    convert(["merge", str(tmp_path / "base.safetensors"), str(lora), str(tmp_path / "merged.safetensors")])

    def load(transformer, **options):
        networks = {"vae": ASSETS / "tiny_vae.safetensors", "text_encoder": ASSETS / "tiny_qwen3.safetensors"}
        tokenizers = ASSETS / "tokenizers"
        return AnimaPipeline.load(
            transformer=transformer, tokenizers=tokenizers, dtype=jnp.float32, **networks, **options
        )

    def pictures(pipeline, seed=0):
        captions = [scene.caption for scene in new + known]
        settings = {"steps": 20, "guidance_scale": 3.0, "guidance_interval": (0.0, 0.4), "sampler": "euler_ancestral"}
        return pipeline(captions, width=64, height=64, **settings, shift=1.0, seed=seed)

    loaded = load(tmp_path / "base.safetensors", loras=[(lora, 1.0)])
    drawn = pictures(loaded) + pictures(loaded, seed=1)
    monkeypatch.setitem(COLOURS, "cyan", CYAN)  # for the judge
    for wanted in (new, known):
        own = [np.asarray(picture) for picture, scene in zip(drawn, (new + known) * 2, strict=True) if scene in wanted]
        scores = score(own, wanted * 2)
        assert min(scores.values()) >= 0.85, scores
    # The base knows no such colour.
    loaded.set_lora_weights([0.0])
    bare = score([np.asarray(picture) for picture in pictures(loaded)[: len(new)]], new)
    assert bare["colour"] <= 0.25
    merged = pictures(load(tmp_path / "merged.safetensors"))
    assert min(psnr(a, b) for a, b in zip(merged, drawn, strict=False)) > 50
