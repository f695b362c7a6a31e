"""Names and metadata of exported files: what managers of adapters read in them."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save

from anima_jax.config.load import load_config
from anima_jax.data.dataset import read_data
from anima_jax.data.problems import Problems
from anima_jax.errors import UserError
from anima_jax.training.export import about_adapter, export, find_export
from anima_jax.training.export_metadata import export_metadata
from anima_jax.training.intervals import RunPoint
from anima_jax.training.run import Run
from anima_jax.training.state import prepare
from convert.__main__ import main as convert
from tests.small_run import write_config, write_transformer

POINT = RunPoint(step=3, total_steps=8, epochs=(0, 1), examples=6)
CAPTIONS = ("mystyle, 1girl, Red Hair", "mystyle, 1girl,, solo ", "mystyle, 1boy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("named")
    (folder / "my pictures").mkdir()
    for number, caption in enumerate(CAPTIONS):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / "my pictures" / f"{number}.png")
        (folder / "my pictures" / f"{number}.txt").write_text(caption)
    write_transformer(folder / "base.safetensors")
    return folder


def configured(folder, keys="", overrides=(), **tables):
    keys += "\nepochs = 2\nsave_every_n_epochs = 1\nseed = 5"
    tables = {"adapter": "type = 'lora'\nrank = 4\nalpha = 2.0", **tables}
    return load_config(write_config(folder, folder / "my pictures", keys, **tables), overrides)


def metadata_of(config):
    data = read_data(config, Problems(), batch_size_of=lambda size: 1)
    return export_metadata(Run(config, 1), data, POINT, "ab" * 32)


@pytest.fixture(scope="module")
def exported(folder):
    """An adapter called my_style in `epoch1` of a run's folder, and its metadata."""
    config = configured(folder, "output_name = 'my_style'")
    partition = prepare(config)
    about = about_adapter(config, partition, POINT.step)
    named = {"metadata": metadata_of(config), "name": config.output_name}
    path = export(folder / "run" / "epoch1", partition, partition.params, "bfloat16", about, **named)
    with safe_open(path, "np") as file:
        return path, file.metadata()


def test_the_metadata_has_what_managers_show(exported):
    _, metadata = exported
    expected = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "anima-preview/lora",
        "modelspec.title": "my_style",
        "modelspec.resolution": "64x64",
        "ss_output_name": "my_style",
        "ss_base_model_version": "anima",
        "ss_sd_model_name": "base.safetensors",
        "ss_new_sd_model_hash": "ab" * 32,
        "ss_network_dim": "4",
        "ss_network_alpha": "2",
        "ss_learning_rate": "0.001",
        "ss_num_train_images": "3",
        "ss_epoch": "1",
        "ss_steps": "3",
        "ss_seed": "5",
    }
    assert {key: metadata[key] for key in expected} == expected
    assert {"rank": "4", "alpha": "2", "step": "3", "format": "pt"}.items() <= metadata.items()  # as before
    # By sd-scripts' rule: what commas separate, stripped, in lower case, counted over the images.
    words = {"mystyle": 3, "1girl": 2, "1boy": 1, "red hair": 1, "solo": 1}
    assert json.loads(metadata["ss_tag_frequency"]) == {"my pictures": words}
    assert json.loads(metadata["ss_dataset_dirs"]) == {"my pictures": {"n_repeats": 1.0, "img_count": 3}}


def test_the_hashes_are_sd_scripts(exported):
    """sd-scripts serialises tensors and `ss_` metadata with the safetensors library and hashes parts of the bytes."""
    path, metadata = exported
    content = save(load_file(path), {key: text for key, text in metadata.items() if key.startswith("ss_")})
    data_start = 8 + int.from_bytes(content[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(content[data_start:]).hexdigest()
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]


def test_the_metadata_is_the_same_in_every_run_of_a_configuration(folder):
    first, again = (metadata_of(configured(folder, overrides=[f"output_dir='{folder / name}'"])) for name in ("a", "b"))
    assert first == again
    assert not any("date" in key or "time" in key.removeprefix("ss_timestep_sampling") for key in first)


def test_a_full_model_has_no_ranks(folder):
    config = load_config(write_config(folder, folder / "my pictures", "epochs = 1\nsave_every_n_epochs = 1"))
    metadata = metadata_of(config)
    assert metadata["modelspec.architecture"] == "anima-preview"
    assert not any(key.startswith("ss_network") for key in metadata)


def test_a_named_export_is_found_and_can_be_trained_on(exported, folder):
    path, _ = exported
    assert {file.name for file in path.parent.iterdir()} == {"my_style.safetensors", "adapter_config.json"}
    assert find_export(folder / "run") == find_export(path.parent) == path
    again = configured(folder, adapter=f"type = 'lora'\nrank = 4\nalpha = 2.0\ninit_from_existing = '{path.parent}'")
    assert "modules begin from" in prepare(again).messages[0]


def test_convert_keeps_the_metadata_and_renews_the_hashes(exported, tmp_path):
    path, before = exported
    convert(["lora", str(path), str(tmp_path / "kohya.safetensors"), "--to", "kohya"])
    with safe_open(tmp_path / "kohya.safetensors", "np") as file:
        after = file.metadata()
    changed = {key for key in before if after[key] != before[key]}
    assert changed <= {"sshs_model_hash", "sshs_legacy_hash"}
    content = (tmp_path / "kohya.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert after["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()


def test_two_files_beside_each_other_are_no_export(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(save({"a": np.zeros(1)}))
    with pytest.raises(UserError, match=r"2 other \.safetensors files; expected one of these"):
        find_export(tmp_path)


@pytest.mark.parametrize("name", ["", "a/b", "..", "C:\\\\x", "a\\nb", ".hidden", "x" * 201])
def test_names_that_no_file_can_have_are_refused(folder, name):
    with pytest.raises(UserError, match="output_name: found"):
        configured(folder, f'output_name = "{name}"')
