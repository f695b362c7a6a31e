"""Requests to a run: diffusion-pipe's files, and SIGTERM as a cluster sends it."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from anima_jax.training.signals import Signals


@pytest.fixture
def signals(tmp_path):
    found = Signals(tmp_path)
    yield found
    found.close()


@pytest.mark.parametrize("name", ["save", "save_quit"])
def test_a_file_is_one_request_and_is_removed(signals, tmp_path, name):
    assert signals.requested() is None
    (tmp_path / name).touch()
    assert signals.requested() == name
    assert list(tmp_path.iterdir()) == []
    assert signals.requested() is None


def test_quitting_comes_first_and_folders_and_other_files_ask_for_nothing(signals, tmp_path):
    for name in ("save", "save_quit", "saved", "save.txt"):
        (tmp_path / name).touch()
    assert [signals.requested() for _ in range(3)] == ["save_quit", "save", None]
    (tmp_path / "save").mkdir()
    assert signals.requested() is None


def test_sigterm_asks_to_save_and_quit_once_and_means_what_it_did_afterwards(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    signals = Signals(tmp_path)
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.requested() == "save_quit"
    assert signals.requested() is None
    assert signal.getsignal(signal.SIGTERM) == before
    signals.close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_cuts_short_what_can_be_made_up_for_and_nothing_else(signals):
    done = []

    def evaluation():
        done.append("begun")
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("ended")
        except Exception:  # as libraries have it
            done.append("swallowed")

    signals.cut_short(lambda: done.append("undisturbed"))
    signals.cut_short(evaluation)
    signals.cut_short(lambda: done.append("after the signal"))
    assert done == ["undisturbed", "begun"]
    assert signals.requested() == "save_quit"


# What a training loop is, without the training: it is asked, and takes a while.
LOOP = """
    import pathlib, signal, sys, time
    from anima_jax.training.signals import Signals
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    signals = Signals(pathlib.Path(sys.argv[1]))
    print("ready", flush=True)
    while not (found := signals.requested()):
        time.sleep(0.01)
    print(found, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 1)])
def test_what_comes_while_the_request_is_served_ends_the_process_at_once(tmp_path, number, code):
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(LOOP), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            process.terminate()
            assert process.stdout.readline() == "save_quit\n"
            process.send_signal(number)
            # Python ends an interrupted program by the same signal, or with 1 where it is told to.
            assert process.wait(timeout=30) in {code, -number}
        finally:
            process.kill()
