"""A run's figures: the bar, JSON lines, TensorBoard's files as another program reads them, and calls of W&B."""

import contextlib
import importlib.util
import json
import pathlib
import resource
import signal
import struct
import sys
import textwrap
import time

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from anima_jax.config.load import load_config
from anima_jax.errors import UserError
from anima_jax.training import jsonl
from anima_jax.training.intervals import RunPoint
from anima_jax.training.jsonl import JsonlWriter, RetryingFile
from anima_jax.training.writer import Dashboards, Writer, check_monitoring
from tests.disks import LoopDisk
from tests.small_run import write_config, write_transformer

RECORDER = """
    log_of_calls = []

    def login(**options):
        log_of_calls.append(("login", options))

    def init(**options):
        log_of_calls.append(("init", options))
        if options["project"] == "unreachable":
            raise ConnectionError("no network")

    def log(values):
        log_of_calls.append(("log", values))

    def finish():
        log_of_calls.append(("finish", {}))

    def Image(image):
        return image.size
"""
"""Stands for the library `wandb`, which the tests do not install."""


@contextlib.contextmanager
def no_file_longer_than(size: int):
    """As on a full disk, a write gets so far and then raises OSError."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def events(folder: pathlib.Path) -> list[Event]:
    """Every event of TensorBoard's files in `folder`: records of (length, checksum, bytes, checksum)."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def scalars(folder: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events(folder):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


@pytest.fixture
def config(tmp_path):
    (tmp_path / "pictures").mkdir()
    write_transformer(tmp_path / "base.safetensors")
    return lambda *overrides: load_config(write_config(tmp_path, tmp_path / "pictures", "epochs = 1"), overrides)


@pytest.fixture
def log(tmp_path):
    lines = JsonlWriter(tmp_path / "log.jsonl", 0)
    yield lines
    lines.close()


def lines_of(folder) -> list[dict]:
    text = (folder / "log.jsonl").read_text()
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def test_a_resumed_log_drops_what_lies_beyond_the_checkpoint_and_a_line_that_a_kill_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = JsonlWriter(path, 0)
    for step in (1, 2, 3):
        log.add(step, {"loss": 0.1 * step})
    log.write(b'{"step": 4, "lo')
    log.close()
    log = JsonlWriter(path, 2, remembered=2)
    assert log.kept == [{"step": 2, "loss": 0.2}]
    log.add(3, {"loss": 9.0})
    log.close()
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [0.1, 0.2, 9.0]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_metrics_before_a_checkpoint_survive_a_power_failure(tmp_path):
    with contextlib.closing(LoopDisk(tmp_path, mib=16)) as disk:
        path = disk.folder / "metrics.jsonl"
        for first in (1, 3):  # the second attempt continues the first one's file
            log = JsonlWriter(path, first - 1)
            log.add(first, {"loss": 0.5})
            log.add(first + 1, {"loss": 0.25})
            log.sync()
        after = disk.after_a_power_failure() / path.name
        assert [json.loads(line)["step"] for line in after.read_text().splitlines()] == [1, 2, 3, 4]


def test_what_finds_no_room_is_said_once_and_written_when_there_is_room_again(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(jsonl.log, "warning", said.append)
    file = RetryingFile(tmp_path / "figures")
    file.write(b"one\n")
    file.flush()
    with no_file_longer_than(6):
        for line in (b"two\n", b"three\n"):
            file.write(line)
            file.flush()
    assert (tmp_path / "figures").read_bytes() == b"one\ntw"
    reason = "the file would be larger than this process may write (ulimit -f)"
    assert said == [f"{tmp_path}/figures: cannot be written: {reason}; the run continues without"]
    file.write(b"four\n")
    file.close()
    assert (tmp_path / "figures").read_bytes() == b"one\ntwo\nthree\nfour\n"


@pytest.fixture
def four_steps(tmp_path, config, log):
    """What dashboards and metrics.jsonl contain of steps 3 to 6, of which every second one is logged."""
    writer = Writer(
        RunPoint(2, 6, examples=16),
        log,
        logging_steps=2,
        dashboards=Dashboards(tmp_path, config()),
        rates=lambda step: {"base": 0.1 * step},
        peak_flops=1e6,
    )
    waits = {3: 0.0, 4: 0.0, 5: 0.02, 6: 0.04}
    for step, wait in waits.items():
        figures = {"loss": float(step), "grad_norm": 2.0}
        point = RunPoint(step, 6, ((step - 1) // 4, step // 4), 8 * step)
        writer.step(point, figures, flops=1e3, waited=wait)
        time.sleep(0.05)
    writer.close()
    return scalars(tmp_path), lines_of(tmp_path)


def test_figures_reach_the_dashboards_under_diffusion_pipes_names(four_steps):
    found, _ = four_steps
    assert found["train/loss"] == [(4, 4.0), (6, 6.0)]
    assert found["train/grad_norm"] == [(4, 2.0), (6, 2.0)]
    assert found["train/epoch_loss"] == [(1, 3.5)]  # of steps 3 and 4; epoch 1 ended with step 4
    np.testing.assert_allclose([y for _, y in found["learning_rate/base"]], [0.3, 0.5], rtol=1e-6)


def test_speeds_follow_from_the_time_of_a_step(four_steps):
    found, _ = four_steps
    assert found["speed/data_wait_seconds"][1][1] == pytest.approx(0.03, rel=1e-6)
    speeds = {tag: [y for _, y in points] for tag, points in found.items() if tag.startswith("speed/")}
    # A step takes 0.05 s and what a busy machine adds; each has 8 images and 1,000 FLOPs of a peak of 1,000,000.
    assert all(0 < rate <= 20 for rate in speeds["speed/steps_per_second"])
    np.testing.assert_allclose(
        speeds["speed/images_per_second"], np.multiply(speeds["speed/steps_per_second"], 8), 1e-5
    )
    np.testing.assert_allclose(speeds["speed/mfu"], np.multiply(speeds["speed/steps_per_second"], 1e-3), 1e-5)


def test_every_step_has_a_line_and_logged_steps_have_speeds(four_steps):
    _, lines = four_steps
    assert [(line["step"], line["loss"], line["grad_norm"]) for line in lines] == [(n, n, 2.0) for n in range(3, 7)]
    assert ["images_per_second" in line for line in lines] == [False, True, False, True]


def test_a_step_reports_one_step_late_and_what_is_not_finite_is_null_and_outside_the_mean(capsys, tmp_path, log):
    writer = Writer(RunPoint(0, 3), log)
    writer.step(RunPoint(1, 10), {"loss": 1.0, "grad_norm": 1.0})
    assert not lines_of(tmp_path)
    writer.step(RunPoint(2, 10), {"loss": float("nan"), "grad_norm": float("inf")})
    assert [line["step"] for line in lines_of(tmp_path)] == [1]
    writer.step(RunPoint(3, 10), {"loss": 1.0, "grad_norm": 1.0})
    assert np.isnan(writer.last["loss"])
    writer.close()
    assert [line["loss"] for line in lines_of(tmp_path)] == [1.0, None, 1.0]
    assert "loss 1.0000" in capsys.readouterr().err


def test_the_bar_shows_loss_rate_speed_and_the_time_that_is_left(capsys, log):
    writer = Writer(RunPoint(0, 10), log, rates=lambda step: {"mlp": 0.0, "base": 2e-5})
    for step in range(1, 4):
        writer.step(RunPoint(step, 10, examples=4 * step), {"loss": 0.5})
    writer.close()
    last = capsys.readouterr().err.splitlines()[-1]
    assert "3/10" in last
    assert "step" in last
    assert "loss 0.5000, lr 2e-05" in last
    assert "images/s" in last
    assert "<" in last  # elapsed<remaining


def test_where_no_terminal_shows_a_bar_every_so_many_steps_are_a_line(capsys, log):
    writer = Writer(RunPoint(0, 6), log, steps_per_print=2)
    for step in range(1, 6):
        writer.step(RunPoint(step, 10), {"loss": 0.5})
    writer.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("|")[-1].split()[0] for line in lines] == ["2/6", "4/6"]
    assert all("loss 0.5000" in line for line in lines)


def test_time_between_steps_is_no_steps_time(log):
    writer = Writer(RunPoint(0, 4), log)
    for step in (1, 2):
        writer.step(RunPoint(step, 10), {"loss": 0.5})
    writer.flush()
    time.sleep(1.5)  # samples are drawn
    for step in (3, 4):
        writer.step(RunPoint(step, 10), {"loss": 0.5})
    writer.close()
    assert writer.seconds_a_step < 0.4  # of three steps that take nothing; the pause would make it 0.5


@pytest.mark.parametrize(("by_examples", "x"), [("false", 3), ("true", 24)])
def test_scalars_and_pictures_stand_at_their_step_or_their_examples(tmp_path, config, by_examples, x):
    dashboards = Dashboards(tmp_path, config(f"x_axis_examples={by_examples}"))
    point = RunPoint(3, 10, examples=24)
    dashboards.scalars(point, {"train/loss": 0.5, "held_out/loss_quantile_0.10": 0.25})
    dashboards.scalars(point, {"train/epoch_loss": 2.0}, x=1)
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    dashboards.image(point, "samples", picture)
    dashboards.close()
    assert scalars(tmp_path) == {
        "train/loss": [(x, 0.5)],
        "held_out/loss_quantile_0.10": [(x, 0.25)],
        "train/epoch_loss": [(1, 2.0)],
    }
    ((step, shown),) = [(e.step, v.image) for e in events(tmp_path) for v in e.summary.value if v.HasField("image")]
    (tmp_path / "shown.png").write_bytes(shown.encoded_image_string)
    np.testing.assert_array_equal(Image.open(tmp_path / "shown.png"), picture)
    assert step == x


def test_a_resumed_run_hides_what_was_written_beyond_the_step_it_goes_on_from(tmp_path, config):
    Dashboards(tmp_path, config(), resumed_at=RunPoint(7, 10, examples=56)).close()
    # TensorBoard drops the points from the step on that a session's first event names.
    assert [event.step for event in events(tmp_path) if event.HasField("session_log")] == [8]


def test_tensorboard_outlives_a_full_disk_without_a_broken_record(tmp_path, config):
    dashboards = Dashboards(tmp_path, config())
    with no_file_longer_than(200):
        for step in range(50):
            dashboards.scalars(RunPoint(step, 50), {"train/loss": 1.0})
        file, deadline = next(tmp_path.glob("events.*")), time.monotonic() + 60
        while file.stat().st_size < 200 and time.monotonic() < deadline:  # a thread writes
            time.sleep(0.01)
            dashboards._tensorboard.flush()
        assert file.stat().st_size == 200
    dashboards.close()
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == list(range(50))


def test_nothing_is_written_where_tensorboard_is_turned_off(tmp_path, config):
    (tmp_path / "run").mkdir()
    dashboards = Dashboards(tmp_path / "run", config("monitoring.enable_tensorboard=false"))
    dashboards.scalars(RunPoint(1, 1), {"train/loss": 1.0})
    dashboards.image(RunPoint(1, 1), "samples", Image.new("RGB", (4, 4)))
    dashboards.close()
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_that_is_not_installed_is_an_error_of_one_line(tmp_path, config):
    check_monitoring(config())
    config = config("monitoring.enable_wandb=true")
    for refuse in (lambda: check_monitoring(config), lambda: Dashboards(tmp_path, config)):
        with pytest.raises(UserError, match="enable_wandb = true, but wandb is not installed") as error:
            refuse()
        assert len(error.value.messages) == 1
        assert config.path in error.value.messages[0]


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "wandb.py").write_text(textwrap.dedent(RECORDER))
    monkeypatch.syspath_prepend(str(tmp_path / "library"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    yield wandb
    sys.modules.pop("wandb", None)


def test_wandb_is_told_what_tensorboard_is_with_the_step_among_the_figures(tmp_path, config, wandb):
    names = ("monitoring.enable_wandb=true", "monitoring.wandb_api_key=secret", "monitoring.wandb_tracker_name=anima")
    dashboards = Dashboards(tmp_path, config(*names))
    dashboards.scalars(RunPoint(3, 10), {"train/loss": 0.5, "train/grad_norm": float("nan")})
    dashboards.image(RunPoint(3, 10), "samples", Image.new("RGB", (6, 4)))
    dashboards.close()
    (_, key), (_, options), *rest = wandb.log_of_calls
    assert key == {"key": "secret"}
    assert (options["project"], options["name"], options["dir"]) == ("anima", None, str(tmp_path))
    assert options["config"]["optimizer"]["lr"] == 1e-3
    assert "secret" not in str(options)
    logged = [("log", {"train/loss": 0.5, "step": 3}), ("log", {"samples": (6, 4), "step": 3}), ("finish", {})]
    assert rest == logged


def test_wandb_that_does_not_start_is_an_error_of_one_line(tmp_path, config, wandb):
    with pytest.raises(UserError, match="wandb does not start: no network"):
        Dashboards(tmp_path, config("monitoring.enable_wandb=true", "monitoring.wandb_tracker_name=unreachable"))
