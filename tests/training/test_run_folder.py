"""Which folder a run trains in: by its name, by the scheduler's job, or the newest; a started one only if asked."""

import contextlib
import os
import pathlib
import threading
import types

import pytest

from anima_jax.errors import UserError
from anima_jax.training import run_folder
from anima_jax.training.run_folder import ChosenRun, alone_in, choose_run, find_run, job_name, make_folder

VARIABLES = {word for _, *words in run_folder.JOBS for word in words}


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def settings(root: pathlib.Path, **keys) -> types.SimpleNamespace:
    keys = {"run_name": None, "resume": False, "resume_from_checkpoint": None} | keys
    return types.SimpleNamespace(output_dir=str(root), **keys)


def chosen(root: pathlib.Path, **keys) -> ChosenRun:
    with contextlib.ExitStack() as locks:
        return choose_run(settings(root, **keys), locks)


def checkpoint(folder: pathlib.Path, step: int = 1, *, written: int = 0) -> pathlib.Path:
    """Make a folder that holds a complete checkpoint, as far as its name tells."""
    (folder / "checkpoints" / str(step)).mkdir(parents=True)
    (folder / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").touch()
    os.utime(folder / "checkpoints", (written, written))
    return folder


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"SLURM_JOB_ID": "77"}, "slurm-77"),
        ({"SLURM_JOB_ID": "78", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}, "slurm-70-3"),
        ({"JOBSET_NAME": "anima", "JOB_NAME": "anima-slice-0"}, "job-anima"),
        ({"JOB_NAME": "../etc/x y"}, "job-.._etc_x_y"),
        ({"SLURM_JOB_ID": ""}, None),
    ],
)
def test_a_requeued_job_has_the_same_name(monkeypatch, variables, name):
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert job_name() == name


def test_auto_begins_in_the_jobs_folder_and_resumes_once_it_has_a_checkpoint(tmp_path, monkeypatch):
    checkpoint(tmp_path / "20260101_10-00-00")  # another run
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    folder = tmp_path / "slurm-5"
    assert chosen(tmp_path, resume="auto") == (folder, False, False)
    make_folder(tmp_path, folder)
    assert chosen(tmp_path, resume="auto") == (folder, False, True)
    checkpoint(folder)
    assert chosen(tmp_path, resume="auto") == (folder, True, True)
    assert chosen(tmp_path) == (None, False, False)  # without it, each run of a job has its own


def test_auto_without_a_job_resumes_the_newest_run_or_begins(tmp_path):
    assert chosen(tmp_path / "none", resume="auto") == (None, False, False)
    checkpoint(tmp_path / "20260101_10-00-00")
    checkpoint(tmp_path / "old", written=1_700_000_000)  # 2023
    assert chosen(tmp_path, resume="auto").folder == tmp_path / "20260101_10-00-00"
    checkpoint(tmp_path / "new", written=1_800_000_000)  # 2027
    assert chosen(tmp_path, resume="auto", resume_from_checkpoint="") == (tmp_path / "new", True, True)
    assert find_run(tmp_path, "") == tmp_path / "new"


def test_a_run_name_that_is_taken_is_an_error_unless_it_is_resumed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".lock").touch()
    assert chosen(tmp_path, run_name="mine") == (tmp_path / "mine", False, True)
    checkpoint(tmp_path / "mine")
    with pytest.raises(UserError, match="mine already exists; --resume auto goes on with it"):
        chosen(tmp_path, run_name="mine")
    assert chosen(tmp_path, run_name="mine", resume="auto").resumed
    assert chosen(tmp_path, run_name="mine", resume_from_checkpoint="").folder == tmp_path / "mine"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file"):
        chosen(tmp_path, run_name="file")


def test_a_requeued_job_waits_for_the_one_before_it_and_sees_its_last_checkpoint(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    with alone_in(folder):
        monkeypatch.setattr(run_folder, "PATIENCE_S", 0.3)
        with pytest.raises(UserError, match="is being trained by process"):
            chosen(tmp_path, run_name="mine", resume="auto")
    before = contextlib.ExitStack()
    before.enter_context(alone_in(folder))
    ends = threading.Timer(0.5, lambda: (checkpoint(folder), before.close()))
    ends.start()
    monkeypatch.setattr(run_folder, "PATIENCE_S", 60)
    assert chosen(tmp_path, run_name="mine", resume="auto") == (folder, True, True)
    ends.join()
    assert "waiting up to 60 s for process" in capsys.readouterr().err
