"""What a run leaves for others: which files, which of them is drawn with, which are kept."""

import os
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from anima_jax.errors import UserError
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT
from anima_jax.training.export import export, find_export, rotate, sweep
from anima_jax.training.run_folder import without_secrets
from anima_jax.training.state import ParamPartition
from tests.disks import fill, small_disk
from tests.models.networks import random_params
from tests.small_run import CONFIG


def exported(folder, names):
    """Folders with a model each, made in this order."""
    for age, name in enumerate(names):
        path = folder / name / "model.safetensors"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")  # no part of a model: a file has its name only once it is complete
        os.utime(path, ns=(age, age))


@pytest.fixture(scope="module")
def partition_and_params():
    """A full fine-tune of a small network: what is trained, and its random parameters."""
    graphdef, abstract = parameters.abstract(lambda rngs: AnimaDiT(CONFIG, rngs=rngs))
    return ParamPartition(CONFIG, graphdef, {}, {}, [], None), random_params(abstract)


@pytest.fixture
def averaged_export(tmp_path, partition_and_params):
    """The parameters of an export in `step7` whose averaged weights are twice the trained ones, and its file."""
    partition, params = partition_and_params
    averaged = jax.tree.map(lambda x: 2 * x, params)
    return params, export(tmp_path / "step7", partition, params, "float32", ema=averaged)


def test_averaged_weights_are_those_to_draw_with(tmp_path, averaged_export):
    _, path = averaged_export
    assert path == tmp_path / "step7" / "ema" / "model.safetensors"
    assert find_export(tmp_path) == find_export(tmp_path / "step7") == path
    assert find_export(tmp_path / "step7" / "model.safetensors") == tmp_path / "step7" / "model.safetensors"
    # diffusion-pipe's `init_from_existing` takes a folder with one such file.
    assert len(list((tmp_path / "step7").glob("*.safetensors"))) == 1


def test_trained_and_averaged_weights_are_saved_as_they_are(tmp_path, averaged_export):
    params, path = averaged_export
    trained, averaged = load_file(tmp_path / "step7" / "model.safetensors"), load_file(path)
    assert trained.keys() == averaged.keys()
    for name, array in trained.items():
        np.testing.assert_array_equal(averaged[name], 2 * array)
    weight = trained["net.blocks.0.mlp.layer1.weight"]
    np.testing.assert_array_equal(weight, np.asarray(params["blocks.mlp.layer1.kernel"])[0].T)
    assert weight.dtype == jnp.float32


def test_without_averaged_weights_the_newest_export_is_taken(tmp_path):
    exported(tmp_path, ["step20", "epoch1", "step3"])
    assert find_export(tmp_path) == tmp_path / "step3" / "model.safetensors"
    with pytest.raises(UserError, match="no such file or folder"):
        find_export(tmp_path / "step4")


def test_the_newest_exports_of_each_kind_are_kept_and_nothing_else_is_touched(tmp_path):
    exported(tmp_path, ["step9", "step10", "step100", "epoch2", "epoch1", "samples", "step5x", "my step7"])
    (tmp_path / "step1").write_text("a file")
    (tmp_path / ".step8.old").mkdir()  # of a process that was killed while it deleted
    assert rotate(tmp_path, None) == []
    assert sorted(rotate(tmp_path, 2)) == ["step9"]
    assert sorted(rotate(tmp_path, 1)) == ["epoch1", "step10"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["step100", "epoch2", "samples", "step5x", "my step7", "step1"]
    )


def files_in(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("room", [0.5, 1.5], ids=["a part of the model", "the model and a part of the average"])
def test_an_export_that_fills_the_disk_leaves_nothing_and_what_was_there_stays(tmp_path, partition_and_params, room):
    partition, params = partition_and_params
    size = sum(value.size * 2 for value in params.values())  # in bfloat16
    with small_disk(tmp_path / "disk", 4 * size // 1024) as disk:
        before = export(disk / "epoch1", partition, params, "bfloat16", files={"a.toml": b"a"})
        fill(disk, leave=int(room * size))
        kept = files_in(disk)
        for name in ("epoch2", "epoch1"):  # a new folder, and an epoch that a resumed run repeats
            with pytest.raises(UserError, match=f"{disk}/{name}/.*: cannot be written: the disk is full"):
                export(disk / name, partition, params, "bfloat16", ema=params, files={"a.toml": b"b"})
        assert files_in(disk) == kept
        assert sorted(path.name for path in disk.iterdir()) == ["ballast", "epoch1"]
        assert find_export(disk) == before


def test_only_folders_with_a_model_count_when_the_oldest_are_deleted(tmp_path):
    exported(tmp_path, ["epoch1", "epoch2"])
    (tmp_path / "epoch3").mkdir()  # of a failed export
    (tmp_path / "epoch4" / "ema").mkdir(parents=True)
    assert rotate(tmp_path, 2) == []
    assert rotate(tmp_path, 1) == ["epoch1"]
    assert (tmp_path / "epoch2" / "model.safetensors").exists()


def test_what_killed_attempts_left_is_swept_and_nothing_else(tmp_path):
    exported(tmp_path, ["epoch1", ".epoch3.partial", ".step5.old"])
    for folder in ("epoch2/ema", "samples", "step9"):
        (tmp_path / folder).mkdir(parents=True)
    left = ["samples/.step000500.png.0123abcd.tmp", "epoch1/.model.safetensors.0123abcd.tmp", ".main.toml.0123abcd.tmp"]
    kept = ["samples/step000500.png", "step9/notes.txt", "epoch1/.mine.tmp", "samples/.mine.png.0123abcd.tmp"]
    for name in left + kept:
        (tmp_path / name).write_bytes(b"")
    sweep(tmp_path)
    assert set(files_in(tmp_path)) == {"epoch1/model.safetensors", *kept}
    assert {path.name for path in tmp_path.iterdir()} == {"epoch1", "samples", "step9"}


@pytest.mark.parametrize(
    "line",
    [
        "[monitoring]\nwandb_api_key = 'KEY'  # mine",
        '[monitoring]\nenable_wandb = true\n"wandb_api_key"="KEY"\n#wandb_api_key = \'KEY\'',
        "monitoring = {enable_wandb = true, wandb_api_key = 'KEY', wandb_run_name = 'a'}",
        'monitoring.wandb_api_key = "K\\"EY"',
        "[monitoring]\nwandb_api_key = '''\nKEY'''",
        '[monitoring]\nwandb_api_key = """KEY\n"""',
        '[monitoring]\n"wandb_api\\u005fkey" = "KEY"',
    ],
)
def test_a_copied_configuration_has_no_key_of_wandb(line):
    text = f"output_dir = 'runs'  # kept\n{line}\n[optimizer]\nlr = 1e-4\n"
    found = without_secrets(text)
    assert "EY" not in found
    if "u005f" not in line:
        settings, before = tomllib.loads(found), tomllib.loads(text)
        assert settings["monitoring"].pop("wandb_api_key") == ""
        assert before["monitoring"].pop("wandb_api_key")
        assert settings == before
        assert "# kept" in found
