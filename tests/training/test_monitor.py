"""What a run reports: TensorBoard's files as another program reads them, and what is handed to Weights & Biases."""

import importlib.util
import pathlib
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
from anima_jax.training.monitor import Monitor, check_monitoring
from tests.small_run import write_config, write_transformer
from tests.training.test_figures import no_file_longer_than

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


@pytest.fixture
def configured(tmp_path):
    (tmp_path / "pictures").mkdir()
    write_transformer(tmp_path / "base.safetensors")
    path = write_config(tmp_path, tmp_path / "pictures", "epochs = 1")
    return lambda *overrides: load_config(path, overrides)


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


@pytest.mark.parametrize(("by_examples", "x"), [("false", 3), ("true", 24)])
def test_scalars_and_pictures_stand_at_their_step_or_their_examples(tmp_path, configured, by_examples, x):
    monitor = Monitor(tmp_path, configured(f"x_axis_examples={by_examples}"))
    monitor.scalars(3, 24, {"train/loss": 0.5, "held_out/loss_quantile_0.10": 0.25})
    monitor.at(1, {"train/epoch_loss": 2.0}, step=3)
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    monitor.pictures(3, "samples", picture, 24)
    monitor.close()
    assert scalars(tmp_path) == {
        "train/loss": [(x, 0.5)],
        "held_out/loss_quantile_0.10": [(x, 0.25)],
        "train/epoch_loss": [(1, 2.0)],
    }
    ((step, shown),) = [(e.step, v.image) for e in events(tmp_path) for v in e.summary.value if v.HasField("image")]
    (tmp_path / "shown.png").write_bytes(shown.encoded_image_string)
    np.testing.assert_array_equal(Image.open(tmp_path / "shown.png"), picture)
    assert step == x


def test_a_resumed_run_hides_what_was_written_beyond_the_step_it_goes_on_from(tmp_path, configured):
    Monitor(tmp_path, configured(), resumed_after=(7, 56)).close()
    # TensorBoard drops the points from the step on that a session's first event names.
    assert [event.step for event in events(tmp_path) if event.HasField("session_log")] == [8]


def test_tensorboard_outlives_a_full_disk_without_a_broken_record(tmp_path, configured):
    monitor = Monitor(tmp_path, configured())
    with no_file_longer_than(200):
        for step in range(50):
            monitor.scalars(step, step, {"train/loss": 1.0})
        file, deadline = next(tmp_path.glob("events.*")), time.monotonic() + 60
        while file.stat().st_size < 200 and time.monotonic() < deadline:  # a thread writes
            time.sleep(0.01)
            monitor._writer.flush()
        assert file.stat().st_size == 200
    monitor.close()
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == list(range(50))


def test_nothing_is_written_where_tensorboard_is_turned_off(tmp_path, configured):
    (tmp_path / "run").mkdir()
    monitor = Monitor(tmp_path / "run", configured("monitoring.enable_tensorboard=false"))
    monitor.scalars(1, 1, {"train/loss": 1.0})
    monitor.pictures(1, "samples", Image.new("RGB", (4, 4)))
    monitor.close()
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_that_is_not_installed_is_an_error_of_one_line(tmp_path, configured):
    check_monitoring(configured())
    config = configured("monitoring.enable_wandb=true")
    for refuse in (lambda: check_monitoring(config), lambda: Monitor(tmp_path, config)):
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


def test_wandb_is_told_what_tensorboard_is_with_the_step_among_the_figures(tmp_path, configured, wandb):
    names = ("monitoring.enable_wandb=true", "monitoring.wandb_api_key=secret", "monitoring.wandb_tracker_name=anima")
    monitor = Monitor(tmp_path, configured(*names))
    monitor.scalars(3, 24, {"train/loss": 0.5, "train/grad_norm": float("nan")})
    monitor.pictures(3, "samples", Image.new("RGB", (6, 4)))
    monitor.close()
    (_, key), (_, options), *rest = wandb.log_of_calls
    assert key == {"key": "secret"}
    assert (options["project"], options["name"], options["dir"]) == ("anima", None, str(tmp_path))
    assert options["config"]["optimizer"]["lr"] == 1e-3
    assert "secret" not in str(options)
    logged = [("log", {"train/loss": 0.5, "step": 3}), ("log", {"samples": (6, 4), "step": 3}), ("finish", {})]
    assert rest == logged


def test_wandb_that_does_not_start_is_an_error_of_one_line(tmp_path, configured, wandb):
    with pytest.raises(UserError, match="wandb does not start: no network"):
        Monitor(tmp_path, configured("monitoring.enable_wandb=true", "monitoring.wandb_tracker_name=unreachable"))
