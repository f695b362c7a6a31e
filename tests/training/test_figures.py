"""Files of figures: what a resumed run goes on with, and what a full disk does to them."""

import contextlib
import json
import resource
import signal

from anima_jax.training import figures
from anima_jax.training.figures import JsonlWriter, RetryingFile


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


def test_what_finds_no_room_is_said_once_and_written_when_there_is_room_again(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(figures.log, "warning", said.append)
    file = RetryingFile(tmp_path / "figures")
    file.write(b"one\n")
    file.flush()
    with no_file_longer_than(6):
        for line in (b"two\n", b"three\n"):
            file.write(line)
            file.flush()
    assert (tmp_path / "figures").read_bytes() == b"one\ntw"
    reason = "the file would be larger than this process may write (ulimit -f)"
    assert said == [f"{tmp_path}/figures: cannot be written: {reason}; the run goes on without"]
    file.write(b"four\n")
    file.close()
    assert (tmp_path / "figures").read_bytes() == b"one\ntwo\nthree\nfour\n"
