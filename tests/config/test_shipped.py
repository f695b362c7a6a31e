"""The configurations in configs/ load unchanged, once the files that they name exist."""

import re
import shutil
import tomllib
from pathlib import Path

import pytest

from anima_jax.config.dataset import DatasetConfig
from anima_jax.config.load import load_config
from anima_jax.config.main import MainConfig
from anima_jax.config.schema import key_table
from anima_jax.data.buckets import Bucketing
from anima_jax.data.shapes import scenes
from anima_jax.training.run import Run

CONFIGS = Path(__file__).parents[2] / "configs"
MAIN_FILES = sorted(path.name for path in CONFIGS.glob("*.toml") if "dataset" not in path.name)
DATASETS = sorted(path.name for path in CONFIGS.glob("*dataset.toml"))

PICTURES = ("data/pictures", "data/clips", "data/edges", "data/shapes_control/pictures", "data/shapes_control/edges")


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """A copy of configs/ in a folder where every file that they name exists, empty."""
    folder = shutil.copytree(CONFIGS, tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    for file in folder.glob("*.toml"):
        for name in re.findall(r'_path = "(.*\.safetensors)"', file.read_text()):
            root = folder if name.startswith("..") else tmp_path
            (root / name).resolve().parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
    for name in ("anima_jax/assets/tokenizers/qwen", "anima_jax/assets/tokenizers/t5", *PICTURES):
        (tmp_path / name).mkdir(parents=True)
    return folder


@pytest.mark.parametrize("name", MAIN_FILES)
def test_a_shipped_configuration_loads_without_a_message(configs, name):
    config = load_config(configs / name)
    assert config.messages == ()
    assert config.data.sources


@pytest.mark.parametrize("name", DATASETS)
def test_a_shipped_dataset_loads_without_a_message(configs, name):
    main = name.removesuffix("_dataset.toml") + ".toml"
    main = main if main in MAIN_FILES else "anima_lora.toml"
    config = load_config(configs / main, [f"dataset={configs / name}"])
    assert config.data.sources
    assert config.messages == ()


def test_the_quick_start_samples_what_it_is_not_trained_on(configs):
    config = load_config(configs / "shapes.toml")
    assert config.sample is not None
    assert set(config.sample.prompts) <= {scene.caption for scene in scenes(held_out=True)}
    assert config.data.size_wh == (64, 64)


@pytest.mark.parametrize("name", MAIN_FILES + DATASETS)
def test_every_commented_key_of_a_shipped_configuration_exists(name):
    """`# max_steps = 20000` must be valid when a reader removes the #."""
    keys = {key.split(".")[-1] for key in key_table(DatasetConfig if name in DATASETS else MainConfig)}
    commented = re.findall(r"^# ([a-z_]+) = (.*)$", (CONFIGS / name).read_text(), re.MULTILINE)
    for key, value in commented:
        assert key in keys
        tomllib.loads(f"value = {value}")


def test_there_is_one_configuration_for_each_use():
    uses = {"shapes", "anima_full", "anima_full_24gb", "anima_lora", "anima_video", "pod", "dataset", "video_dataset"}
    assert {*MAIN_FILES, *DATASETS} >= {f"{use}.toml" for use in uses}


def test_the_lora_has_the_recommended_settings_and_says_why(configs):
    """Sources: Anima's model card and its fine-tuning guide."""
    config = load_config(configs / "anima_lora.toml")
    assert (config.model.llm_adapter_lr, config.optimizer.lr, config.optimizer.betas) == (0, 2e-5, (0.9, 0.99))
    lines = (configs / "anima_lora.toml").read_text().splitlines()
    for key in ("llm_adapter_lr", "lr", "betas"):
        assert all(
            lines[number - 1].startswith("# ") for number, line in enumerate(lines) if line.startswith(f"{key} =")
        )


def test_steps_on_clips_and_on_images_have_the_same_number_of_examples(configs):
    config = load_config(configs / "anima_video.toml")
    sizes = {size for source in config.data.sources for size in Bucketing.of(source).sizes}
    assert {size.frames for size in sizes} == {1, 17, 33}
    run = Run(config, replicas=1)
    assert {run.global_batch(size) for size in sizes} == {16}
    assert {run.micro_batch(size) for size in sizes if size.frames == 1} == {8, 16}
    assert {run.micro_batch(size) for size in sizes if size.frames > 1} == {1, 2}


def test_the_page_on_control_networks_names_their_defaults(configs):
    page = (CONFIGS.parent / "docs" / "control.md").read_text(encoding="utf-8")
    dataset, control, inpainting, *_ = re.findall(r"```toml\n(.*?)```", page, re.S)
    tables = re.split(r"^(?=\[)", (configs / "anima_lora.toml").read_text(), flags=re.M)
    shared = "".join(table for table in tables if not table.startswith(("[adapter]", "[optimizer]", "[sample]")))
    (configs / "my_dataset.toml").write_text(dataset)

    def load(text):
        (configs / "my_control.toml").write_text(shared + text)
        return load_config(configs / "my_control.toml", [f"dataset={configs / 'my_dataset.toml'}"]).adapter

    default = load('[adapter]\ntype = "lllite"\n[optimizer]\ntype = "adamw"\nlr = 1e-4')
    assert load(control) == default
    assert load(inpainting + '[optimizer]\ntype = "adamw"\nlr = 1e-4').cond_in_channels == 4
