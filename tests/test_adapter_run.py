"""Adapters through whole runs: a run goes on exactly, and splits its batches without a difference."""

import json
import pathlib
import shutil
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from anima_jax.generate import main as generate
from anima_jax.train import main as train
from tests.small_run import psnr, write_config, write_transformer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_quickly")]

ADAPTERS = {
    "lora": "type = 'lora'\nrank = 4\nalpha = 8.0\ndropout = 0.2\nrank_dropout = 0.2",
    "dora": "type = 'dora'\nrank = 2\nexclude_modules = 'blocks\\.0\\.mlp'",
    "lokr": "type = 'lokr'\nrank = 2\nrank_dropout = 0.2",
    "loha": "type = 'loha'\nrank = 2",
    "text": "type = 'lora'\nrank = 2\ntext_encoder_lr = 1e-3\nlr_pattern = { 'blocks.1' = 1e-4 }",
}


class AdapterRun(NamedTuple):
    """A finished run of eight steps of four examples in four epochs."""

    config: pathlib.Path
    folder: pathlib.Path


def trained(root: pathlib.Path, kind: str, *sets: str) -> AdapterRun:
    """Train an adapter of this kind on eight images, with a checkpoint after every step."""
    images = root / "images"
    images.mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"a red square number {number}")
    write_transformer(root / "base.safetensors")
    main = (
        "epochs = 4\nmicro_batch_size_per_gpu = 4\nema_decay = 0.9\nsave_dtype = 'float32'\nuncond_fraction = 0.2\n"
        "save_every_n_epochs = 4\ncheckpoint_every_n_minutes = 0.0001"
    )
    model = "cache_text_embeddings = false\n" if kind == "text" else ""
    sample = "prompts = ['a red square']\nsteps = 2\nseeds = [3]\nguidance_scale = 2.0"
    config = write_config(root, images, main, adapter=ADAPTERS[kind], model=model, sample=sample)
    train(["--config", str(config), *(word for key in sets for word in ("--set", key))])
    (folder,) = (root / "runs").iterdir()
    return AdapterRun(config, folder)


@pytest.fixture(scope="module", params=ADAPTERS)
def whole(request, tmp_path_factory) -> AdapterRun:
    return trained(tmp_path_factory.mktemp("whole"), request.param)


def losses_of(run: pathlib.Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_on_exactly(whole, tmp_path):
    continued = tmp_path / whole.folder.name
    shutil.copytree(whole.folder, continued)
    shutil.rmtree(continued / "epoch4")
    steps = sorted(int(path.name) for path in (continued / "checkpoints").iterdir())
    for step in steps[steps.index(5) + 1 :]:  # as of a run that was killed after step 5, within an epoch
        shutil.rmtree(continued / "checkpoints" / str(step))
    train(["--config", str(whole.config), "--set", f"output_dir={tmp_path}", "--resume_from_checkpoint"])
    assert losses_of(continued) == losses_of(whole.folder)
    assert len(set(losses_of(continued))) == 8
    for part in ("adapter_model.safetensors", "ema/adapter_model.safetensors"):
        found, expected = (load_file(run / "epoch4" / part) for run in (continued, whole.folder))
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_array_equal(found[key], array, err_msg=key)


def test_a_run_draws_what_its_file_draws(whole, tmp_path, capsys):
    output = tmp_path / "out.png"
    command = ["--config", str(whole.config), "--checkpoint", str(whole.folder), "--prompt", "a red square"]
    generate([*command, "--seed", "3", "-o", str(output)])
    assert " modules matched" in capsys.readouterr().out
    image = np.asarray(Image.open(output))
    grid = np.asarray(Image.open(whole.folder / "samples" / "step000008.png").convert("RGB"))
    height, width, _ = image.shape
    tile = grid[: 2 * height : 2, : 2 * width : 2]  # small images are shown twice as large
    # In float32 factors beside the weights and weights with the product in them differ in rounding alone.
    assert psnr(image, tile) > 45


@pytest.mark.parametrize("whole", ["lora"], indirect=True)
def test_micro_batches_change_nothing_that_an_adapter_drops(whole, tmp_path):
    split = trained(tmp_path, "lora", "micro_batch_size_per_gpu=2", "gradient_accumulation_steps=2")
    np.testing.assert_allclose(losses_of(whole.folder), losses_of(split.folder), rtol=1e-4)
