"""python -m anima_jax.train on real input: photographs with captions, networks in files."""

import json
import pathlib
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from anima_jax.config.load import load_config
from anima_jax.data.batch_plan import BatchPlan, Tier
from anima_jax.generate import main as generate
from anima_jax.train import main as train
from anima_jax.training.events import export_names
from anima_jax.training.intervals import RunPoint
from anima_jax.training.run import Run
from tests.small_run import ASSETS, write_config, write_transformer

PHOTOGRAPHS = {
    "astronaut.png": "a woman in an orange space suit",
    "chelsea.png": "a cat",
    "coffee.png": "a cup of coffee on a wooden table",
    "rocket.jpg": "a rocket on its launch pad at night",
    "retina.jpg": "the back of an eye",
    "motorcycle_left.png": "a motorcycle in a garage",
    "hubble_deep_field.jpg": "galaxies",
    "color.png": "coloured bands",
}


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, colour in enumerate(("red", "green")):
        Image.new("RGB", (70, 90), colour).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {colour} wall")
    return folder


def run_folder(folder: pathlib.Path) -> pathlib.Path:
    (run,) = (folder / "runs").iterdir()
    return run


def losses_of(run: pathlib.Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


LORA = "type = 'lora'\nrank = 8"


class TrainedRun(NamedTuple):
    """A run on photographs: its configuration, its folder, and the parameters of the base model."""

    config: pathlib.Path
    run: pathlib.Path
    base: dict

    def saved(self, name: str) -> dict[str, np.ndarray]:
        return load_file(self.run / "step100" / name)


@pytest.fixture(scope="module", params=[None, LORA], ids=["full", "lora"])
def trained(request, tmp_path_factory) -> TrainedRun:
    """A run of 100 steps that trains the whole transformer, or a LoRA."""
    skimage, adapter, root = pytest.importorskip("skimage"), request.param, tmp_path_factory.mktemp("trained")
    source, folder = pathlib.Path(skimage.__file__).parent / "data", root / "photographs"
    folder.mkdir()
    for name, caption in PHOTOGRAPHS.items():
        (folder / name).write_bytes((source / name).read_bytes())
        (folder / name).with_suffix(".txt").write_text(caption)
    base = write_transformer(root / "base.safetensors")
    tables = {
        "optimizer": f"type = 'adamw'\nlr = {1e-2 if adapter else 2e-3}",
        "sample": "prompts = ['a cat']\nsteps = 2",
    }
    config = write_config(
        root,
        folder,
        "epochs = 100\nmicro_batch_size_per_gpu = 4\ngradient_accumulation_steps = 2\n"
        "ema_decay = 0.9\nsave_dtype = 'float32'",
        **tables,
        **({"adapter": adapter} if adapter else {}),
    )
    result = subprocess.run(
        [sys.executable, "-m", "anima_jax.train", "--config", str(config)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return TrainedRun(config, run_folder(root), base)


@pytest.mark.slow
def test_training_on_photographs_lowers_the_loss(trained):
    losses = losses_of(trained.run)
    assert len(losses) == 100
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


@pytest.mark.slow
def test_a_run_keeps_its_configuration_and_draws_samples(trained):
    assert (trained.run / "main.toml").read_text() == trained.config.read_text()
    assert (trained.run / "samples" / "step000100.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("trained", [LORA], indirect=True, ids=["lora"])
def test_a_saved_lora_contains_trained_factors_and_nothing_else(trained):
    saved = trained.saved("adapter_model.safetensors")
    assert all(name.startswith("diffusion_model.") and ".lora_" in name for name in saved)
    assert any(np.any(array) for name, array in saved.items() if "lora_B" in name)


@pytest.mark.slow
@pytest.mark.parametrize("trained", [None], indirect=True, ids=["full"])
def test_a_saved_model_has_every_tensor_of_the_base_and_nearly_all_changed(trained):
    saved, original = trained.saved("model.safetensors"), load_file(trained.config.parent / "base.safetensors")
    assert saved.keys() == original.keys()
    assert sum(array.size for array in saved.values()) == sum(array.size for array in trained.base.values())
    changed = [name for name in saved if not np.array_equal(saved[name], original[name])]
    assert len(changed) > 0.9 * len(saved)


@pytest.mark.slow
def test_what_a_run_saves_can_be_sampled_and_a_seed_gives_the_same_image(trained, tmp_path):
    arguments = ["--config", str(trained.config), "--checkpoint", str(trained.run)]
    arguments += ["--prompt", "a cat", "--steps", "2", "--seed", "7"]
    for name in ("one.png", "two.png"):
        generate([*arguments, "-o", str(tmp_path / name)])
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert Image.open(tmp_path / "one.png").size == (64, 64)


def test_models_are_saved_after_the_epochs_and_steps_that_the_configuration_names(tmp_path, pictures):
    write_transformer(tmp_path / "base.safetensors")
    config = write_config(tmp_path, pictures, "epochs = 4\nsave_every_n_epochs = 2\nsave_every_n_steps = 5")
    plan = BatchPlan([Tier("64", np.arange(10), 16, 4)], seed=0)  # epochs end in steps 3 (2.5), 5, 8 (7.5) and 10
    run = Run(load_config(config, ["micro_batch_size_per_gpu=4"]), replicas=1)
    epochs = {step: (plan.epochs_finished(step - 1), plan.epochs_finished(step)) for step in range(1, 11)}
    names = {step: export_names(run, RunPoint(step, 10, epochs[step])) for step in range(1, 11)}
    assert {step: found for step, found in names.items() if found} == {5: ["epoch2", "step5"], 10: ["epoch4", "step10"]}
    assert export_names(run, RunPoint(9, 9, epochs[9])) == ["step9"]


def complaint(capsys, main, *arguments) -> str:
    """The one line that a command prints when it refuses."""
    with pytest.raises(SystemExit) as exit_:
        main(list(map(str, arguments)))
    assert exit_.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


BASE = "base.safetensors"


def truncated(path: pathlib.Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("spoil", "arguments", "expected"),
    [
        (None, ["--set", "optimiser.lr=1"], "'optimizer'"),
        (None, ["--set", "epochs=many"], "epochs"),
        (None, ["--set", "model.vae_path=/nowhere.safetensors"], "vae_path"),
        (None, ["--set", f"model.llm_path={ASSETS}"], "llm_path"),
        (lambda folder: truncated(folder / BASE), [], BASE),
        (lambda folder: (folder / BASE).write_bytes(b"\x80\x02}q\x00."), [], "pickle"),
        (lambda folder: (folder / BASE).write_bytes((ASSETS / "tiny_vae.safetensors").read_bytes()), [], "VAE"),
        (lambda folder: (folder / "pictures" / "0.png").write_bytes(b"no picture"), ["--strict_data"], "0.png"),
        (lambda folder: [path.unlink() for path in (folder / "pictures").iterdir()], [], "pictures"),
        (lambda folder: (folder / "main.toml").write_text("epochs ="), [], "not valid TOML"),
        (lambda folder: (folder / "main.toml").unlink(), [], "no such file"),
    ],
)
def test_bad_input_ends_in_one_line_and_writes_nothing(tmp_path, pictures, capsys, spoil, arguments, expected):
    write_transformer(tmp_path / BASE)
    config = write_config(tmp_path, pictures, "epochs = 1")
    if spoil:
        spoil(tmp_path)
    assert expected in complaint(capsys, train, "--config", config, *arguments)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "output", "expected"),
    [
        (["--width", "76"], "out.png", "multiple of 8 (nearest: 72 and 80)"),
        (["--steps", "0"], "out.png", "steps"),
        (["--sampler", "eular"], "out.png", "did you mean 'euler'"),
        (["--schedule", "simpel"], "out.png", "did you mean 'simple'"),
        (["--seed", "one"], "out.png", "invalid seed value"),
        (["--checkpoint", "{folder}/pictures"], "out.png", "model.safetensors"),
        (["--checkpoint", "{folder}/nothing"], "out.png", "no such file"),
        ([], "out.tiff", ".png"),
        ([], f"{BASE}/out.png", f"{BASE} is a file, expected a folder"),
    ],
)
def test_generate_refuses_what_it_cannot_draw(tmp_path, pictures, capsys, arguments, output, expected):
    write_transformer(tmp_path / BASE)
    config = write_config(tmp_path, pictures, "epochs = 1")
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    options = ["--config", config, "--prompt", "a cat", "-o", tmp_path / output]
    assert expected in complaint(capsys, generate, *options, *arguments)
    assert not list(tmp_path.glob("*.png"))


def test_generate_without_a_configuration_needs_every_network(tmp_path, capsys):
    options = ["--prompt", "a cat", "-o", tmp_path / "out.png", "--transformer", "x"]
    assert "--vae" in complaint(capsys, generate, *options)
    assert not list(tmp_path.glob("*.png"))
