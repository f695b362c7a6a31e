"""Requests to a run: diffusion-pipe's files, and signals as clusters, terminals and people send them."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from anima_jax.training.command import output_may_fail
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
    while True:
        while not (found := signals.requested()):
            time.sleep(0.01)
        print(found, flush=True)
"""


@pytest.fixture
def loop(tmp_path):
    """Starts `LOOP`, with a command before it, in a process of its own."""
    started = []

    def start(*before: str) -> subprocess.Popen:
        command = [*before, sys.executable, "-c", textwrap.dedent(LOOP), str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("first", ["SIGHUP", pytest.param("SIGUSR1", marks=pytest.mark.slow)])
def test_a_closing_terminal_and_a_schedulers_warning_ask_to_save_and_never_end_the_process(loop, first):
    process = loop()
    for name in (first, first, "SIGTERM"):  # SLURM sends SIGTERM, too, when the time is up
        process.send_signal(getattr(signal, name))
        assert process.stdout.readline() == "save_quit\n"
    process.terminate()
    assert process.wait(timeout=30) == -signal.SIGTERM


def test_the_first_interrupt_saves_and_says_how_to_end_at_once(loop):
    process = loop()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "save_quit\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) in {1, -signal.SIGINT}
    assert "saving a checkpoint after the current step; press Ctrl-C again to end at once" in process.stderr.read()


# It says that it is ready when its main thread is in a call into C for minutes, as XLA's compilation is one. Before,
# the other thread cannot run: Python's handler of a signal must wait for the end of that call.
COMPILES = """
    import hashlib, sys, threading
    def main():
        sys.setswitchinterval(1e6)
        begun = threading.Event()
        threading.Thread(target=lambda: (begun.wait(), print("ready", flush=True)), daemon=True).start()
        begun.set()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def test_the_second_interrupt_ends_a_process_that_compiles(tmp_path):
    (tmp_path / "compiles.py").write_text(textwrap.dedent(COMPILES))
    code = "import signal as s; s.signal(s.SIGINT, s.default_int_handler); import anima_jax.launch as l; l._run('{}')"
    command = [sys.executable, "-c", code.format("compiles")]
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130


@pytest.mark.slow
def test_a_signal_that_is_ignored_stays_ignored(loop):
    process = loop("nohup")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "save_quit\n"
    process.terminate()
    assert process.stdout.readline() == "save_quit\n"  # SIGHUP was no request: there are two, not three


# A run in a terminal, that prints as it saves.
IN_TERMINAL = """
    import pathlib, signal, sys, time
    from anima_jax.training.command import output_may_fail
    from anima_jax.training.signals import Signals
    folder = pathlib.Path(sys.argv[1])
    with output_may_fail():
        signals = Signals(folder)
        (folder / "ready").touch()
        while not (found := signals.requested()):
            time.sleep(0.01)
        for stream in (sys.stdout, sys.stderr):
            print("writing the checkpoint", file=stream, flush=True)
        (folder / "saved").touch()
"""


def test_a_run_saves_when_its_terminal_is_closed(tmp_path):
    terminal, inside = os.openpty()
    command = ["setsid", "--ctty", sys.executable, "-c", textwrap.dedent(IN_TERMINAL), str(tmp_path)]
    with subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside) as process:
        os.close(inside)
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            os.close(terminal)
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
    assert (tmp_path / "saved").exists()


def test_output_that_cannot_be_written_is_dropped(tmp_path):
    with open("/dev/full", "w") as full, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        with output_may_fail():
            print("lost", flush=True)
        assert sys.stdout is full
    with open(tmp_path / "log", "w") as log, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", log)
        with output_may_fail():
            print("kept ×")
        print("after")
    assert (tmp_path / "log").read_text() == "kept ×\nafter\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 1)])
def test_what_comes_while_the_request_is_served_ends_the_process_at_once(loop, number, code):
    process = loop()
    process.terminate()
    assert process.stdout.readline() == "save_quit\n"
    process.send_signal(number)
    # Python ends an interrupted program by the same signal, or with 1 where it is told to.
    assert process.wait(timeout=30) in {code, -number}
