"""Runs of several processes: how they join, agree on decisions, and end together.

Every process runs the same program on its own devices. Process 0 does what must be done only once (write a file, print
a line). Decisions that must be the same in all processes (when to save, when to stop) are exchanged.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from anima_jax.errors import UserError, show_value, system_error

T = TypeVar("T")

HEARTBEAT_S = 30
"""Seconds without a heartbeat after which a process counts as dead, and JAX aborts all others."""

JOIN_MINUTES = 5
"""Minutes that a process waits for the others at the start."""

MOST_DIFFERENCES = 3
"""Maximum number of differences between two processes that an error names."""

NO_CLUSTER = ("coordinator_address should be defined", "must be called before")
"""Parts of JAX's errors if it finds no cluster, or if it is used before `join`."""

FLAGS = {
    "coordinator_address": (str, "HOST:PORT of process 0"),
    "num_processes": (int, "number of processes; 1 runs alone"),
    "process_id": (int, "number of this process, from 0"),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `join` to `parser`."""
    for flag, (kind, what) in FLAGS.items():
        parser.add_argument(f"--{flag}", type=kind, help=f"{what}; automatic on SLURM, GKE, Cloud TPU and MPI")


def join(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the run's other processes, found by JAX (SLURM, Kubernetes, Cloud TPU, MPI) or given by the arguments.

    Does nothing if there are no others, if `num_processes` is 1 or if this process has already joined. Must be called
    before any computation with JAX. Raises UserError if the arguments are not valid or the others cannot be joined.
    """
    if num_processes == 1 or jax.distributed.is_initialized():
        return
    _check_flags(coordinator_address, num_processes, process_id)
    # JAX's SIGTERM handler would replace ours.
    jax.config.update("jax_enable_preemption_service", False)
    where = f" at {coordinator_address}" if coordinator_address else ""
    killed = (
        f"error: ended before all processes had joined{where}: start all within {JOIN_MINUTES} minutes, with the "
        "same --coordinator_address and each with its own --process_id, and check that the port is open"
    )
    try:
        with _if_killed(killed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on Kubernetes, JAX warns if its Python package is missing
            if coordinator_address:
                print(f"process {process_id} of {num_processes}: waiting for the others{where}", file=sys.stderr)
            jax.distributed.initialize(
                coordinator_address,
                num_processes,
                process_id,
                initialization_timeout=60 * JOIN_MINUTES,
                heartbeat_timeout_seconds=HEARTBEAT_S,
                shutdown_timeout_seconds=60,
            )
    except (RuntimeError, ValueError) as error:
        if coordinator_address is None and any(text in str(error) for text in NO_CLUSTER):
            return
        raise UserError(f"cannot join the other processes: {_one_line(error)}; --num_processes 1 runs alone") from error


def _check_flags(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Raise UserError unless all flags are given, with valid values, or none."""
    values = dict(zip(FLAGS, (coordinator_address, num_processes, process_id), strict=True))
    missing = [f"--{flag}" for flag, value in values.items() if value is None]
    if coordinator_address is None or num_processes is None or process_id is None:
        if len(missing) < len(FLAGS):
            flags = ", ".join(f"--{flag}" for flag in FLAGS)
            raise UserError(f"{', '.join(missing)}: missing, expected all of {flags} or none")
        return
    if not re.fullmatch(r".+:\d{1,5}", coordinator_address):
        raise UserError(f"--coordinator_address {coordinator_address}: expected HOST:PORT of process 0")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id {process_id}, --num_processes {num_processes}: expected 0 ≤ process_id < num_processes"
        )


def is_single_process() -> bool:
    """Return whether the run has a single process."""
    return jax.process_count() == 1


def is_process_0() -> bool:
    """Return whether this is process 0, the one that writes and prints."""
    return jax.process_index() == 0


def barrier(what: str) -> None:
    """Wait for the run's other processes; `what` names the barrier."""
    if not is_single_process():
        multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def process_0_first() -> Iterator[None]:
    """Run the block in process 0 before the others, so that they find what it wrote."""
    if not is_process_0():
        barrier("process 0 first")
    yield
    if is_process_0():
        barrier("process 0 first")


def from_process_0(make: Callable[[], pathlib.Path]) -> pathlib.Path:
    """Return the path that `make` returns in process 0; it is not called in other processes."""
    if is_single_process():
        return make()
    own = os.fsencode(make()) if is_process_0() else b""
    return pathlib.Path(os.fsdecode(_gathered(own)[0]))


def value_of_process_0(make: Callable[[], T]) -> T:
    """Return the JSON value that `make` returns in process 0; it is not called in other processes."""
    if is_single_process():
        return make()
    return json.loads(_gathered(json.dumps(make()).encode() if is_process_0() else b"")[0])


def values_of_all(own: T) -> list[T]:
    """Return every process's JSON value, in the order of process ids."""
    return [own] if is_single_process() else list(map(json.loads, _gathered(json.dumps(own).encode())))


def assert_same_on_all_processes(values: Callable[[], Mapping[str, Any]]) -> None:
    """Raise UserError in every process unless the result of `values`, JSON values by name, is the same in all."""
    if is_single_process():
        return
    first, *others = map(json.loads, _gathered(json.dumps(values(), default=str).encode()))
    for number, other in enumerate(others, 1):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if names:
            differences = [
                f"{name} is {show_value(other.get(name))}, not {show_value(first.get(name))}"
                for name in names[:MOST_DIFFERENCES]
            ]
            more = f", and {len(names) - MOST_DIFFERENCES} more" if len(names) > MOST_DIFFERENCES else ""
            raise UserError(
                f"process {number} of {jax.process_count()} disagrees with process 0: {'; '.join(differences)}{more}; "
                "expected the same configuration, flags and files in all processes"
            )


def _gathered(own: bytes) -> list[bytes]:
    """Return every process's bytes, in the order of process ids."""
    lengths = np.ravel(multihost_utils.process_allgather(np.int32(len(own))))
    padded = np.frombuffer(own.ljust(lengths.max(), b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


class _LogLines:
    """Prints each state of a tqdm bar as a line on stderr, without control characters."""

    def write(self, text: str) -> None:
        """Print the text between a bar's control characters, if there is any."""
        if line := text.strip():
            print(line, file=sys.stderr)

    def flush(self) -> None:
        pass


def progress_bar(total: int, unit: str) -> "tqdm[Any]":
    """Return a progress bar over `total` items on stderr: in a terminal a bar, else a line a minute.

    Only process 0 shows it, and only if there are any items.
    """
    disabled = not total or not is_process_0()
    if sys.stderr.isatty():
        return tqdm(total=total, unit=unit, dynamic_ncols=True, disable=disabled)
    layout = "{n_fmt}/{total_fmt} " + unit + "s, {elapsed}<{remaining}"
    return tqdm(
        total=total,
        bar_format=layout,
        mininterval=60,
        maxinterval=60,
        miniters=1,
        delay=1,
        file=_LogLines(),
        disable=disabled,
    )


def smallest(number: int | None) -> int | None:
    """Return the smallest number of all processes; None, the answer of a process that has none, does not count."""
    return min((found for found in values_of_all(number) if found is not None), default=None)


class Consensus:
    """A function that returns the maximum of the numbers that all processes passed to it in the previous call.

    Because of this delay no step waits for the exchange. The first call returns 0. In a single process each call
    returns its own number.
    """

    def __init__(self, mesh: Mesh):
        self._sharding = NamedSharding(mesh, P(mesh.axis_names))
        self._largest = jax.jit(lambda numbers: numbers.max(), out_shardings=NamedSharding(mesh, P()))
        self._pending: jax.Array | None = None

    def __call__(self, number: int) -> int:
        if is_single_process():
            return number
        before, shape = self._pending, (self._sharding.mesh.size,)
        own = jax.make_array_from_callback(shape, self._sharding, lambda _: np.full(1, number, np.int32))
        self._pending = self._largest(own)
        return 0 if before is None else int(before)


@contextlib.contextmanager
def abort_all_on_error() -> Iterator[None]:
    """Run the block so that only process 0 prints to stdout, and an error in any process ends all of them.

    The process with the error exits without waiting for the others, which JAX aborts after `HEARTBEAT_S` seconds. Each
    of those prints a last line that says what to do. A single process runs the block normally.
    """
    if is_single_process():
        yield
        return
    killed = (
        f"error: {_this_process()} was killed, or ended because another one did; start all of them again with "
        "--resume_from_checkpoint"
    )
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_if_killed(killed))
            if not is_process_0():
                devnull = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(devnull))
            yield
    except BaseException as error:
        code = _report(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def _if_killed(line: str) -> Iterator[None]:
    """Print `line` to stderr if this process dies within the block.

    If another process is lost, JAX aborts this one from C++, after a page of its own messages, and no Python code runs.
    So a child process prints the line: it waits for a line on a pipe, which closes without one only if this process
    dies.
    """
    child = subprocess.Popen(["sh", "-c", 'read -r _ || echo "$0" >&2', line], stdin=subprocess.PIPE)
    try:
        yield
    finally:
        child.communicate(b"\n")


def _report(error: BaseException) -> int:
    """Print why this process ends and return its exit code."""
    if isinstance(error, UserError):
        for message in error.messages:
            print(f"error: {message}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, jax.errors.JaxRuntimeError):
        print(
            f"error: {_this_process()} stops: another process has ended or cannot be reached, or a device has failed; "
            f"start all of them again with --resume_from_checkpoint ({_one_line(error)})",
            file=sys.stderr,
        )
        return 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return int(error.code or 0)
    if found := system_error(error):
        print(f"error: {found[1]}", file=sys.stderr)
        return found[0]
    traceback.print_exception(error)
    # If a process is lost, dispatching a step may also raise a ValueError.
    print(
        f"error: {_this_process()} stops because of the above; start all of them again with --resume_from_checkpoint",
        file=sys.stderr,
    )
    return 1


def _this_process() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
