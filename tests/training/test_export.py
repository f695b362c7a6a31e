"""What a run leaves for others: which files, which of them is drawn with, which are kept."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from anima_jax.errors import UserError
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT
from anima_jax.training.export import export, find_export, rotate
from anima_jax.training.state import ParamPartition
from tests.models.networks import random_params
from tests.small_run import CONFIG


def exported(folder, names):
    """Folders with a model each, made in this order."""
    for age, name in enumerate(names):
        path = folder / name / "model.safetensors"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
        os.utime(path, ns=(age, age))


@pytest.fixture
def averaged_export(tmp_path):
    """The parameters of an export in `step7` whose averaged weights are twice the trained ones, and its file."""
    graphdef, abstract = parameters.abstract(lambda rngs: AnimaDiT(CONFIG, rngs=rngs))
    params = random_params(abstract)
    partition = ParamPartition(CONFIG, graphdef, {}, {}, [], None)
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
