"""Other programs that `anima-start` runs: each is printed as the command that it is, and can be stopped as usual."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

from anima_jax.errors import UserError, shell_command
from anima_jax.launch import PARENT, STOP_SIGNALS
from anima_jax.serving.starting import planning
from anima_jax.serving.starting.planning import RunPlan


def short_path(path: str | os.PathLike[str]) -> str:
    """Return a path as seen from the current folder; on another drive of Windows, the whole path."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return os.path.abspath(path)


def show(module: str, *arguments: str) -> None:
    """Print the command line that runs a module with these arguments."""
    print(f"\n$ {shell_command(module, *arguments)}", flush=True)


def run(module: str, *arguments: str, shown: bool = True) -> int:
    """Run a module in a process of its own and return its exit code, that of a signal as shells report it.

    Signals that stop this process go to the other one, which ends in its own way: training saves a checkpoint.
    """
    if shown:
        show(module, *arguments)
    with started(module, *arguments) as process:
        return code_of(wait(process))


def plan(path: str, *overrides: str) -> RunPlan:
    """Return the plan of a run, made in a process of its own. Raises UserError if there is none."""
    show(planning.MODULE, path, *overrides)
    code, text = output_of(planning.MODULE, path, *overrides)
    if code:
        raise UserError("the run cannot be planned; the reason is above")
    return RunPlan(**json.loads(text.splitlines()[-1]))


def output_of(module: str, *arguments: str) -> tuple[int, str]:
    """Run a module and return its exit code and what it wrote to stdout; its stderr is this process's."""
    with started(module, *arguments, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        text = process.stdout.read().decode(errors="replace")
        return code_of(wait(process)), text


@contextlib.contextmanager
def started(module: str, *arguments: str, stdout: int | None = None) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a module; in the block, signals that would stop this process go to it. It does not outlive the block."""
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(
        command, stdout=stdout, env=os.environ | {PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    )
    with _signals_to(process):
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
            wait(process)


def wait(process: "subprocess.Popen[bytes]") -> int:
    """Wait for a process to end, also when the terminal interrupts both; return its code as `subprocess` has it."""
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            return process.wait()


def code_of(returncode: int) -> int:
    """Return a process's exit code as shells report it: 128 and the number of the signal that ended it."""
    return 128 - returncode if returncode < 0 else returncode


@contextlib.contextmanager
def _signals_to(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Send the signals that stop this process to another one. The terminal sends SIGINT to both itself."""

    def forward(number: int, frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    before = {}
    for name in STOP_SIGNALS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, forward)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
