"""A run that is stopped and goes on, by its command line: bit for bit the run that was never stopped."""

import contextlib
import io
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from anima_jax.data.dataset import TrainingData
from anima_jax.exit_codes import STOPPED
from anima_jax.train import main as train
from anima_jax.training.evaluate import Evaluation
from anima_jax.training.writer import Writer
from tests.small_run import write_config, write_transformer
from tests.training.test_writer import no_file_longer_than, scalars

pytestmark = pytest.mark.usefixtures("compiled_quickly")

MAIN = (
    "epochs = 4\nmicro_batch_size_per_gpu = 2\nema_decay = 0.9\nsave_dtype = 'float32'\nuncond_fraction = 0.2\n"
    "lr_scheduler = 'cosine'\nwarmup_steps = 3\ncheckpoint_every_n_epochs = 1\nmax_checkpoints = 2\n"
)


KILLS = 5


def small_config(root: pathlib.Path) -> pathlib.Path:
    """Write nine pictures of one size, and the configuration of 18 steps of two in four epochs."""
    folder = root / "pictures"
    folder.mkdir()
    for number in range(9):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)).save(
            folder / f"{number}.png"
        )
        (folder / f"{number}.txt").write_text(f"a red square number {number}")
    write_transformer(root / "base.safetensors")
    return write_config(root, folder, MAIN)


@pytest.fixture
def config(tmp_path):
    return small_config(tmp_path)


def command(config: pathlib.Path, output: pathlib.Path, *arguments: str) -> list[str]:
    options = ["--config", str(config), "--set", f"output_dir={output}"]
    return [sys.executable, "-m", "anima_jax.train", *options, *arguments]


def run_of(output: pathlib.Path) -> pathlib.Path:
    (run,) = output.iterdir()
    return run


def losses_of(run: pathlib.Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def check_equal(run: pathlib.Path, undisturbed: pathlib.Path) -> None:
    """The same losses and, bit for bit, the same weights and averages."""
    assert losses_of(run) == losses_of(undisturbed)
    files = {path.relative_to(undisturbed) for path in undisturbed.glob("step*/**/model.safetensors")}
    assert len(files) == 2  # trained weights and their average
    for path in files:
        found, expected = load_file(run / path), load_file(undisturbed / path)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[pathlib.Path, float]:
    """The folder of a run that nothing disturbed, and the seconds that it took."""
    root, began = tmp_path_factory.mktemp("undisturbed"), time.monotonic()
    subprocess.run(command(small_config(root), root / "runs"), check=True, capture_output=True)
    return run_of(root / "runs"), time.monotonic() - began


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_as_if_it_had_not_stopped(config, undisturbed, tmp_path):
    stopped = subprocess.Popen(command(config, tmp_path / "two"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    metrics = None
    while stopped.poll() is None and metrics is None:
        metrics = next((tmp_path / "two").glob("*/metrics.jsonl"), None) if (tmp_path / "two").exists() else None
        time.sleep(0.02)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait() == STOPPED, stopped.stdout.read().decode()
    (stopped.stdout or sys.stdin).close()
    done = len(losses_of(run_of(tmp_path / "two")))
    again = subprocess.run(
        command(config, tmp_path / "two", "--resume_from_checkpoint"), check=False, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert f"after step {done}" in again.stdout
    check_equal(run_of(tmp_path / "two"), undisturbed[0])


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_bit_identical(config, undisturbed, tmp_path):
    """A few; `tests/benchmarks/kill.py` does as many as it is asked for."""
    expected, took = undisturbed
    moments, kills = random.Random(0), 0
    often = ("--set", "checkpoint_every_n_minutes=0.0001")  # after every step: kills fall into saves too
    for _ in range(4 * KILLS):
        resume = ("--resume_from_checkpoint",) if list((tmp_path / "two").glob("*/checkpoints/*/_CHECK*")) else ()
        if not resume and (tmp_path / "two").exists():
            for old in (tmp_path / "two").iterdir():
                old.rename(tmp_path / f"empty{kills}")  # killed before its first checkpoint: begin anew
        process = subprocess.Popen(
            command(config, tmp_path / "two", *often, *resume), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            output, _ = process.communicate(timeout=None if kills >= KILLS else moments.uniform(0.5, 1.0) * took)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, output.decode()
        if kills >= KILLS or len(losses_of(run_of(tmp_path / "two"))) == 18:
            break
    check_equal(run_of(tmp_path / "two"), expected)


def evaluated_config(root: pathlib.Path) -> pathlib.Path:
    """The same run, evaluated before its first step and after each second epoch."""
    config = small_config(root)
    (root / "eval.toml").write_text((root / "dataset.toml").read_text())
    more = f"eval_datasets = [{{name = 'held_out', config = '{root / 'eval.toml'}'}}]\neval_every_n_epochs = 2\n"
    config.write_text(more + config.read_text())
    return config


def output_of(arguments: list[str], *, code: int = 0) -> str:
    """What a run prints that ends with this exit code."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            train(arguments)
            ended = 0
        except SystemExit as exit_:
            ended = exit_.code
    assert ended == code
    return output.getvalue()


class CutShort(NamedTuple):
    """A run whose evaluations SIGTERM cut short before the first step and after step 7, and an undisturbed one."""

    outputs: list[str]
    """What each of its three attempts printed."""

    run: pathlib.Path
    undisturbed: pathlib.Path


@pytest.fixture(scope="module")
def cut_short(tmp_path_factory) -> CutShort:
    root = tmp_path_factory.mktemp("cut_short")
    sets = ("checkpoint_every_n_epochs=100", "eval_every_n_steps=7", "max_steps=9")  # 7: in the second epoch
    arguments = ["--config", str(evaluated_config(root)), *(word for key in sets for word in ("--set", key))]
    train([*arguments, "--set", f"output_dir={root / 'one'}"])
    whole, calls = Evaluation.__call__, []

    def disturbed(*given):
        calls.append(given)
        if len(calls) in {1, 3}:  # before the first step, and after step 7
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(*given)

    arguments += ["--set", f"output_dir={root / 'two'}"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Evaluation, "__call__", disturbed)
        attempts = (arguments, *[[*arguments, "--resume_from_checkpoint"]] * 2)
        outputs = [output_of(attempt, code=code) for attempt, code in zip(attempts, (STOPPED, STOPPED, 0), strict=True)]
    return CutShort(outputs, run_of(root / "two"), run_of(root / "one"))


@pytest.mark.slow
def test_sigterm_in_an_evaluation_stops_the_run_after_the_step_before_it(cut_short):
    first, second, third = cut_short.outputs
    assert "stopped after step 0" in first
    assert "sample with" not in first  # nothing is saved yet
    assert "stopped after step 7" in second
    assert "sample with" in third


@pytest.mark.slow
def test_an_evaluation_that_sigterm_cuts_short_is_made_up_for(cut_short):
    check_equal(cut_short.run, cut_short.undisturbed)
    lines = [
        [json.loads(x) for x in (run / "evaluations.jsonl").read_text().splitlines()]
        for run in (cut_short.run, cut_short.undisturbed)
    ]
    for line in itertools.chain(*lines):
        line.pop("eval/eval_time_sec")
    assert [line["step"] for line in lines[0]] == [0, 7, 9]
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_the_mean_loss_of_an_epoch_includes_the_steps_before_a_stop(cut_short):
    two, one = (dict(scalars(run)["train/epoch_loss"]) for run in (cut_short.run, cut_short.undisturbed))
    assert scalars(cut_short.undisturbed)["train/epoch_loss"][1][0] == 2  # ended after step 9, began before the stop
    assert two == one


@pytest.mark.slow
def test_a_run_on_a_full_disk_goes_on_and_says_at_its_end_that_its_model_is_not_saved(config, tmp_path, capsys):
    arguments = ["--config", str(config), "--set", "save_every_n_epochs=1"]
    with no_file_longer_than(200_000), pytest.raises(SystemExit) as exit_:
        train([*arguments, "--set", "max_steps=7"])
    assert exit_.value.code == 2
    run, err = run_of(tmp_path / "runs"), capsys.readouterr().err
    reason = "the file would be larger than this process may write (ulimit -f)"
    assert f"epoch1/model.safetensors: cannot be written: {reason}; the run continues" in err
    assert f"{run}/step7: the model could not be saved" in err
    assert "the checkpoint of step 5 could not be saved" in err
    assert len(losses_of(run)) == 7


@pytest.mark.slow
def test_a_run_does_not_need_its_configuration_files_once_it_has_read_them(config, tmp_path, monkeypatch):
    """They may be renamed or edited while it trains; its copies, which it advises to upload, contain no key."""
    config.write_text(config.read_text() + "[monitoring]\nwandb_api_key = 'a secret'\n")
    encode = TrainingData.encode

    def renamed(*arguments):
        for path in list(tmp_path.glob("*.toml")):
            path.rename(path.with_suffix(".old"))
        encode(*arguments)

    monkeypatch.setattr(TrainingData, "encode", renamed)
    arguments = ["--config", str(config), "--set", "max_steps=2", "--set", "monitoring.wandb_run_name='mine'"]
    out = output_of(arguments)
    assert "--set max_steps=2" in out
    assert "monitoring" not in out  # the command to sample with has no secrets
    run = run_of(tmp_path / "runs")
    copies = {str(path.relative_to(run)): path.read_text() for path in run.rglob("*.toml")}
    assert copies.keys() == {"main.toml", "dataset.toml", "step2/main.toml"}
    for name in ("main.toml", "step2/main.toml"):
        assert copies[name] == (tmp_path / "main.old").read_text().replace("'a secret'", '""')


@pytest.mark.slow
def test_what_changed_is_said_and_what_cannot_go_on_is_refused(config, tmp_path, capsys):
    arguments = ["--config", str(config)]
    train([*arguments, "--set", "max_steps=3"])
    capsys.readouterr()
    train([*arguments, "--resume_from_checkpoint", "--set", "max_steps=4", "--set", "optimizer.lr=5e-4"])
    assert "optimizer.lr was 0.001, now 0.0005" in capsys.readouterr().out
    (tmp_path / "pictures" / "3.txt").write_text("an edited caption")
    train([*arguments, "--resume_from_checkpoint", "--set", "max_steps=5"])
    assert "captions of tier 64 changed" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        train([*arguments, "--resume_from_checkpoint", "--set", "micro_batch_size_per_gpu=3"])
    assert exit_.value.code == 2
    assert "a step of tier 64 took 2 examples, now 3" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        train([*arguments, "--resume_from_checkpoint", "20200101_00-00-00"])
    assert exit_.value.code == 2


@pytest.mark.slow
def test_a_finished_run_says_so_and_makes_up_for_a_model_that_it_could_not_save(config, tmp_path):
    arguments = ["--config", str(config), "--set", "max_steps=2"]
    train(arguments)
    run = run_of(tmp_path / "runs")
    saved = (run / "step2" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "step2")  # as after a full disk
    out = output_of([*arguments, "--resume_from_checkpoint"])
    assert "the run is finished: 2 of 2 steps; to train longer, raise epochs or max_steps" in out
    assert (run / "step2" / "model.safetensors").read_bytes() == saved
    assert "saved" not in output_of([*arguments, "--resume_from_checkpoint"])


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> tuple[str, pathlib.Path]:
    """What a run with evaluations, exports, checkpoints and a profile printed, and its folder."""
    root = tmp_path_factory.mktemp("whole_run")
    options = ["--regenerate_cache", "--profile", "3:5"]  # both data sets share one cache
    out = output_of(["--config", str(evaluated_config(root)), "--set", "save_every_n_epochs=1", *options])
    return out, run_of(root / "runs")


def test_a_run_tells_that_the_llm_adapter_is_trained(whole_run):
    out, _ = whole_run
    assert "the LLM adapter is trained too" in out.replace("The LLM", "the LLM")


def test_an_evaluation_is_the_mean_over_the_quantiles_of_time(whole_run):
    _, run = whole_run
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in evaluations] == [0, 9, 18]
    for line in evaluations:
        quantiles = [line[f"held_out/loss_quantile_0.{n}0"] for n in range(1, 10)]
        assert line["held_out/loss"] == pytest.approx(np.mean(quantiles), rel=1e-6)


def test_the_newest_exports_and_checkpoints_are_kept(whole_run):
    _, run = whole_run
    assert sorted(path.name for path in run.glob("epoch*")) == ["epoch3", "epoch4"]  # max_checkpoints = 2
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["14", "18"]


def test_a_runs_folder_has_its_dashboards_profile_and_configuration(whole_run):
    _, run = whole_run
    assert list(run.glob("events.out.tfevents.*"))
    assert list((run / "profile").rglob("*.xplane.pb"))
    assert {path.name for path in run.glob("*.toml")} == {"main.toml", "dataset.toml", "eval.toml"}


def test_a_step_is_handed_over_before_the_one_before_is_computed(config, tmp_path, monkeypatch):
    """What a step found is read when the next one is under way, unless something that is due needs it."""
    read, flush = [], Writer.flush

    def noted(writer):
        if writer._pending is not None and sys._getframe(1).f_code is not Writer.step.__code__:
            read.append(writer._pending.point.step)
        flush(writer)

    monkeypatch.setattr(Writer, "flush", noted)
    train(["--config", str(config), "--set", "checkpoint_every_n_minutes=60", "--set", "checkpoint_every_n_epochs=100"])
    steps = len(losses_of(run_of(tmp_path / "runs")))
    assert steps > 5
    assert set(read) <= {1, 2, steps}  # the self-check, and the end


def test_a_run_whose_losses_stay_infinite_stops_and_names_its_last_checkpoint(config, tmp_path, capsys):
    options = ["--set", "optimizer.lr=1e18", "--set", "max_skipped_steps=3", "--set", "lr_scheduler=constant"]
    with pytest.raises(SystemExit) as exit_:
        train(["--config", str(config), *options, "--set", "checkpoint_every_n_minutes=0.0001"])
    assert exit_.value.code == 1
    printed, said = capsys.readouterr()
    assert re.search(
        r"step \d+: the \w+ is not finite.* \(3 in a row\); its examples: \S+\.png, \S+\.png$", printed, re.M
    )
    assert "3 steps in a row had no finite loss or gradient; the last good checkpoint is that of step 1\n" in said
    assert [path.name for path in (run_of(tmp_path / "runs") / "checkpoints").iterdir()] == ["1"]
    assert len(losses_of(run_of(tmp_path / "runs"))) < 10
