"""The commands' entry points: they import a main, which takes seconds, and what signals do until it has handlers.

`anima-train`, `anima-generate`, `anima-convert`, `anima-serve`, `anima-start` and `python -m` of the same modules begin
here.
"""

import contextlib
import importlib
import os
import signal
import socket
import sys
import threading
from types import FrameType

from anima_jax.exit_codes import INTERRUPTED, STOPPED

STOP_SIGNALS = ("SIGTERM", "SIGHUP", "SIGUSR1")
"""Signals with which schedulers and terminals end a run. Native Windows has only the first."""

PARENT = "ANIMA_JAX_PARENT"
"""The variable with the number of the process that started this one and without which it should not go on."""


def train() -> None:
    """Run `anima_jax.train`. Until the run handles them, `STOP_SIGNALS` end it at once: nothing can be lost."""
    _run("anima_jax.train", STOP_SIGNALS)


def generate() -> None:
    """Run `anima_jax.generate`."""
    _run("anima_jax.generate")


def convert() -> None:
    """Run `anima_jax.convert`."""
    _run("anima_jax.convert.__main__")


def serve() -> None:
    """Run `anima_jax.serve`."""
    _run("anima_jax.serve", STOP_SIGNALS)


def start() -> None:
    """Run `anima_jax.start`."""
    _run("anima_jax.start")


def _run(module: str, stops: tuple[str, ...] = ()) -> None:
    """Import a module and call its `main`. An interrupt during the import, or one of `stops`, ends the process."""
    for name in ("SIGINT", *stops):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _end)
    _open_standard_streams()
    _end_with_parent()
    _end_at_the_second()
    from anima_jax.errors import NO_FOLDER, in_a_folder  # only now: every import takes time without the handlers

    if not in_a_folder():
        print(f"error: {NO_FOLDER}", file=sys.stderr)
        sys.exit(2)
    main = importlib.import_module(module).main
    if signal.getsignal(signal.SIGINT) == _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # `command_line` reports a KeyboardInterrupt
    main()


def _open_standard_streams() -> None:
    """Open stdin, stdout and stderr to nowhere if they are closed: else the next file would take their number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w", encoding="utf-8"))


def _end_with_parent() -> None:
    """Let Linux send SIGTERM when the process named by `PARENT` dies, even by SIGKILL: training saves and stops."""
    if sys.platform == "linux" and os.environ.pop(PARENT, "") == str(os.getppid()):
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _end_at_the_second() -> None:
    """End the process at its second SIGINT or SIGTERM, even while it compiles.

    Python's handlers run between instructions of the main thread: during minutes in XLA, several signals are one.
    """
    received, written = socket.socketpair()
    written.setblocking(False)
    signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        numbers = list[int]()
        while len(numbers) < 2 and written.fileno() >= 0:  # which keeps the socket open
            numbers += [number for number in received.recv(64) if number in (signal.SIGINT, signal.SIGTERM)]
        os._exit(INTERRUPTED if numbers[-1] == signal.SIGINT else 128 + numbers[-1])

    threading.Thread(target=watch, daemon=True).start()


def _end(number: int, frame: FrameType | None) -> None:
    """Handle a signal: say so in a line and end. An exception could be lost in a library that is being imported."""
    line, code = f"stopped by {signal.Signals(number).name}; the same command starts it again", STOPPED
    if number == signal.SIGINT:
        line, code = "interrupted", INTERRUPTED
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())  # `print` may be what the signal interrupted
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)
