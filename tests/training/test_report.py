"""What a person sees: the bar's figures, the log of a resumed run, tables, and pictures that say what they show."""

import json
import time

import numpy as np
import pytest

from anima_jax.config.load import load_config
from anima_jax.training import report
from anima_jax.training.estimate import abstract_partition
from anima_jax.training.figures import JsonlWriter
from anima_jax.training.intervals import crosses_multiple
from anima_jax.training.monitor import Monitor
from anima_jax.training.state import prepare
from tests.small_run import write_config, write_transformer
from tests.training.test_monitor import scalars


@pytest.fixture
def config(tmp_path):
    (tmp_path / "pictures").mkdir()
    write_transformer(tmp_path / "base.safetensors")
    return lambda *overrides, **tables: load_config(
        write_config(tmp_path, tmp_path / "pictures", "epochs = 1", **tables), overrides
    )


@pytest.fixture
def log(tmp_path):
    lines = JsonlWriter(tmp_path / "log.jsonl", 0)
    yield lines
    lines.close()


def lines_of(folder) -> list[dict]:
    text = (folder / "log.jsonl").read_text()
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def test_figures_reach_the_monitor_under_the_trainers_names(tmp_path, config, log):
    monitor = Monitor(tmp_path, config())
    progress = report.Progress(
        6,
        log,
        logging_steps=2,
        monitor=monitor,
        rates=lambda step: {"base": 0.1 * step},
        peak_flops=1e6,
        start=(2, 16, 0),
    )
    waits = {3: 0.0, 4: 0.0, 5: 0.02, 6: 0.04}
    for step, wait in waits.items():
        figures = {"loss": float(step), "grad_norm": 2.0}
        progress.step(step, figures, examples=8 * step, epoch=step // 4, flops=1e3, waited=wait)
        time.sleep(0.05)
    progress.close()
    monitor.close()
    found = scalars(tmp_path)
    assert found["train/loss"] == [(4, 4.0), (6, 6.0)]
    assert found["train/grad_norm"] == [(4, 2.0), (6, 2.0)]
    assert found["train/epoch_loss"] == [(1, 3.5)]  # of steps 3 and 4; epoch 1 ended with step 4
    np.testing.assert_allclose([y for _, y in found["learning_rate/base"]], [0.3, 0.5], rtol=1e-6)
    assert found["speed/data_wait_seconds"][1][1] == pytest.approx(0.03, rel=1e-6)
    speeds = {tag: [y for _, y in points] for tag, points in found.items() if tag.startswith("speed/")}
    # A step takes 0.05 s and what a busy machine adds; each has 8 images and 1,000 FLOPs of a peak of 1,000,000.
    assert all(0 < rate <= 20 for rate in speeds["speed/steps_per_second"])
    np.testing.assert_allclose(
        speeds["speed/images_per_second"], np.multiply(speeds["speed/steps_per_second"], 8), 1e-5
    )
    np.testing.assert_allclose(speeds["speed/mfu"], np.multiply(speeds["speed/steps_per_second"], 1e-3), 1e-5)
    lines = lines_of(tmp_path)
    assert [(line["step"], line["loss"], line["grad_norm"]) for line in lines] == [(n, n, 2.0) for n in range(3, 7)]
    assert ["images_per_second" in line for line in lines] == [False, True, False, True]


def test_a_step_reports_one_step_late_and_what_is_not_finite_is_null_and_outside_the_mean(capsys, tmp_path, log):
    progress = report.Progress(3, log)
    progress.step(1, {"loss": 1.0, "grad_norm": 1.0})
    assert not lines_of(tmp_path)
    progress.step(2, {"loss": float("nan"), "grad_norm": float("inf")})
    assert [line["step"] for line in lines_of(tmp_path)] == [1]
    progress.step(3, {"loss": 1.0, "grad_norm": 1.0})
    assert np.isnan(progress.last["loss"])
    progress.close()
    assert [line["loss"] for line in lines_of(tmp_path)] == [1.0, None, 1.0]
    assert "loss 1.0000" in capsys.readouterr().err


def test_the_bar_shows_loss_rate_speed_and_the_time_that_is_left(capsys, log):
    progress = report.Progress(10, log, rates=lambda step: {"mlp": 0.0, "base": 2e-5})
    for step in range(1, 4):
        progress.step(step, {"loss": 0.5}, examples=4 * step)
    progress.close()
    last = capsys.readouterr().err.splitlines()[-1]
    assert "3/10" in last
    assert "step" in last
    assert "loss 0.5000, lr 2e-05" in last
    assert "images/s" in last
    assert "<" in last  # elapsed<remaining


def test_where_no_terminal_shows_a_bar_every_so_many_steps_are_a_line(capsys, log):
    progress = report.Progress(6, log, every=2)
    for step in range(1, 6):
        progress.step(step, {"loss": 0.5})
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("|")[-1].split()[0] for line in lines] == ["2/6", "4/6"]
    assert all("loss 0.5000" in line for line in lines)


def test_time_between_steps_is_no_steps_time(log):
    progress = report.Progress(4, log)
    for step in (1, 2):
        progress.step(step, {"loss": 0.5})
    progress.flush()
    time.sleep(1.5)  # samples are drawn
    for step in (3, 4):
        progress.step(step, {"loss": 0.5})
    progress.close()
    assert progress.seconds_a_step < 0.4  # of three steps that take nothing; the pause would make it 0.5


def test_the_table_counts_each_groups_parameters(config):
    text = report.start_up_table(
        settings := config("model.mlp_lr=0", "model.dtype=bfloat16"), prepare(settings), "8 pictures"
    )
    trained = prepare(settings)
    everything = {**trained.params, **trained.frozen}
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith("  ")}
    mlp = sum(value.size for path, value in everything.items() if path.startswith("blocks.mlp."))
    assert rows["mlp"][1:] == [f"{mlp:,}", "0", "frozen", "bfloat16"]
    adapter = sum(value.size for path, value in everything.items() if path.startswith("llm_adapter."))
    assert rows["llm_adapter"][1:] == [f"{adapter:,}", f"{adapter:,}", "0.001", "float32"]
    total = sum(value.size for value in everything.values())
    halves = report.parameter_table(trained, settings.learning_rates, "bfloat16").splitlines()
    assert halves[1].split() == [*rows["llm_adapter"][:4], "bfloat16"]
    assert rows["total"][1:3] == [f"{total:,}", f"{total - mlp:,}"]
    assert "2 blocks of width 64" in text
    assert "8 pictures" in text


def test_the_table_of_a_lora_shows_what_lies_frozen_under_it(config):
    trained = prepare(settings := config(adapter="type = 'lora'\nrank = 4"))
    rows = {
        line.split()[0]: line.split() for line in report.parameter_table(trained, settings.learning_rates).splitlines()
    }
    factors = sum(value.size for path, value in trained.params.items() if path.startswith("blocks.mlp."))
    frozen = sum(value.size for path, value in trained.frozen.items() if path.startswith("blocks.mlp."))
    assert rows["mlp"][1:3] == [f"{factors + frozen:,}", f"{factors:,}"]
    assert rows["base"][2:4] == ["0", "frozen"]


def test_the_table_counts_quantised_weights_as_the_weights_they_stand_for(config):
    settings = config("model.transformer_dtype='int8'", adapter="type = 'lora'\nrank = 4")
    plain, small = (
        report.parameter_table(abstract_partition(c), c.learning_rates).splitlines()
        for c in (config(adapter="type = 'lora'\nrank = 4"), settings)
    )
    for before, after in zip(plain[1:], small[1:], strict=True):
        assert before.split()[:3] == after.split()[:3]
    assert "int8" in small[4]  # the MLPs'


def test_an_interval_is_due_when_a_multiple_of_it_is_reached():
    assert [n for n in range(1, 10) if crosses_multiple(3, n - 1, n)] == [3, 6, 9]
    assert crosses_multiple(3, 1, 7)
    assert not crosses_multiple(3, 3, 5)
    assert not crosses_multiple(None, 0, 100)
