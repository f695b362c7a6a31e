"""Adapters through whole runs: what one teaches, that merging it is loading it, and that a run goes on exactly."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from anima_jax import AnimaPipeline
from anima_jax.data.shapes import BACKGROUNDS, COLOURS, SHAPES, Scene, draw, draw_in_colours, sample_placement, scenes
from anima_jax.generate import main as generate
from anima_jax.train import main as train
from anima_jax.training.export import find_export
from convert.__main__ import main as convert
from tests import shapes_judge
from tests.small_run import ASSETS, write_config, write_transformer

CYAN = (40, 205, 215)


def psnr(first, second) -> float:
    error = np.mean((np.asarray(first, np.float64) - np.asarray(second, np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def run_of(folder: pathlib.Path) -> pathlib.Path:
    (run,) = (folder / "runs").iterdir()
    return run


# ---- a new colour ----------------------------------------------------------------------------------------------------


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
    lora = find_export(run_of(tmp_path))
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
        scores = shapes_judge.score(own, wanted * 2)
        assert min(scores.values()) >= 0.85, scores
    # The base knows no such colour.
    loaded.set_lora_weights([0.0])
    bare = shapes_judge.score([np.asarray(picture) for picture in pictures(loaded)[: len(new)]], new)
    assert bare["colour"] <= 0.25
    merged = pictures(load(tmp_path / "merged.safetensors"))
    assert min(psnr(a, b) for a, b in zip(merged, drawn, strict=False)) > 50


# ---- a run goes on, and splits its batches, without a difference -----------------------------------------------------


ADAPTERS = {
    "lora": "type = 'lora'\nrank = 4\nalpha = 8.0\ndropout = 0.2\nrank_dropout = 0.2",
    "dora": "type = 'dora'\nrank = 2\nexclude_modules = 'blocks\\.0\\.mlp'",
    "lokr": "type = 'lokr'\nrank = 2\nrank_dropout = 0.2",
    "loha": "type = 'loha'\nrank = 2",
    "text": "type = 'lora'\nrank = 2\ntext_encoder_lr = 1e-3\nlr_pattern = { 'blocks.1' = 1e-4 }",
}


@pytest.fixture
def configured(tmp_path):
    """Eight pictures, eight steps of four in four epochs; a function from an adapter's name to its configuration."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a red square number {number}")

    def write(name: str, **changes) -> pathlib.Path:
        root = tmp_path / name
        root.mkdir()
        write_transformer(root / "base.safetensors")
        keys = {"micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1, **changes}
        main = "epochs = 4\nema_decay = 0.9\nsave_dtype = 'float32'\nuncond_fraction = 0.2\nsave_every_n_epochs = 4\n"
        main += "checkpoint_every_n_epochs = 1\n" + "\n".join(f"{key} = {value}" for key, value in keys.items())
        kind = name.split("-", maxsplit=1)[0]
        model = "cache_text_embeddings = false\n" if kind == "text" else ""
        sample = "prompts = ['a red square']\nsteps = 2\nseeds = [3]\nguidance_scale = 2.0"
        return write_config(root, folder, main, adapter=ADAPTERS[kind], model=model, sample=sample)

    return write


def losses_of(run: pathlib.Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_run_goes_on_exactly_and_draws_what_its_file_draws(configured, kind, capsys):
    whole, halves = configured(f"{kind}-whole"), configured(f"{kind}-halves")
    train(["--config", str(whole)])
    train(["--config", str(halves), "--set", "max_steps=5"])
    train(["--config", str(halves), "--resume_from_checkpoint"])
    one, two = run_of(whole.parent), run_of(halves.parent)
    assert losses_of(one) == losses_of(two)
    assert len(set(losses_of(one))) == 8
    for part in ("adapter_model.safetensors", "ema/adapter_model.safetensors"):
        first, second = (load_file(run / "epoch4" / part) for run in (one, two))
        assert first.keys() == second.keys()
        for key, array in first.items():
            np.testing.assert_array_equal(array, second[key], err_msg=key)
    capsys.readouterr()
    output = one / "out.png"
    command = ["--config", str(whole), "--checkpoint", str(one), "--prompt", "a red square", "--seed", "3"]
    generate([*command, "-o", str(output)])
    assert " modules matched" in capsys.readouterr().out
    picture = np.asarray(Image.open(output))
    grid = np.asarray(Image.open(one / "samples" / "step000008.png").convert("RGB"))
    height, width, _ = picture.shape
    tile = grid[: 2 * height : 2, : 2 * width : 2]  # small pictures are shown twice as large
    # In float32 factors beside the weights and weights with the product in them differ in rounding alone.
    assert psnr(picture, tile) > 45


@pytest.mark.slow
def test_micro_batches_change_nothing_that_an_adapter_drops(configured):
    whole, split = (
        configured("lora-whole"),
        configured("lora-split", micro_batch_size_per_gpu=2, gradient_accumulation_steps=2),
    )
    for config in (whole, split):
        train(["--config", str(config)])
    first, second = (losses_of(run_of(config.parent)) for config in (whole, split))
    np.testing.assert_allclose(first, second, rtol=1e-4)
