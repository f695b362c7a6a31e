"""Several processes that are one run: joining, agreeing, and ending together.

Every process runs the same program on its own devices. What only one may do (write a file, print a line) the first one
does; what all must decide alike (when to save, when to stop) they exchange.
"""

import argparse
import contextlib
import os
import pathlib
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from anima_jax.errors import UserError

HEARTBEAT_S = 30
"""Seconds after which a silent process is taken for dead, and all others end."""

ALONE = "coordinator_address should be defined"
"""What JAX says where it finds no cluster."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say who is who among several processes, for `join`."""
    for flag, kind, what in (
        ("coordinator_address", str, "HOST:PORT of the first of several processes"),
        ("num_processes", int, "how many there are; 1 joins no others"),
        ("process_id", int, "number of this one, from 0"),
    ):
        parser.add_argument(f"--{flag}", type=kind, help=f"{what}; found by itself on SLURM, GKE, Cloud TPU and MPI")


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Join the run's other processes: as JAX finds them on SLURM, Kubernetes, Cloud TPU and MPI, or as arguments say.

    Does nothing where there are no others, or with `processes` 1. Call it before anything else of JAX. Raises UserError
    if they cannot be joined.
    """
    given = {"--coordinator_address": coordinator, "--num_processes": processes, "--process_id": process}
    if processes == 1 or jax.distributed.is_initialized():
        return
    missing = [flag for flag, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise UserError(f"{', '.join(missing)}: missing, expected all of {', '.join(given)} or none")
    # JAX's own handler of SIGTERM would take the place of ours.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Kubernetes without its package is no cluster to join
            jax.distributed.initialize(
                coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT_S, shutdown_timeout_seconds=60
            )
    except (RuntimeError, ValueError) as error:
        found_none = ALONE in str(error) or "must be called before" in str(error)
        if missing and found_none:
            return
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"cannot join the run's other processes: {reason}; --num_processes 1 runs alone") from error


def is_alone() -> bool:
    """Whether the run has no other processes."""
    return jax.process_count() == 1


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def meet(what: str) -> None:
    """Wait for the run's other processes."""
    if not is_alone():
        multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """The first process goes through the block before the others: what it writes there they find."""
    if not is_first():
        meet("the first process has gone ahead")
    yield
    if is_first():
        meet("the first process has gone ahead")


def from_first(make: Callable[[], pathlib.Path]) -> pathlib.Path:
    """The path that the first process makes."""
    if is_alone():
        return make()
    data = os.fsencode(make()) if is_first() else b""
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.frombuffer(data[:length].ljust(length, b"\0"), np.uint8)
    return pathlib.Path(os.fsdecode(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded)))))


class Agreement:
    """The largest number that any process gave a step ago; a process that is alone has its own at once.

    What is exchanged at one step is read at the next, so that no step waits for it.
    """

    def __init__(self, mesh: Mesh):
        self._sharding = NamedSharding(mesh, P(mesh.axis_names))
        self._largest = jax.jit(lambda numbers: numbers.max(), out_shardings=NamedSharding(mesh, P()))
        self._under_way: jax.Array | None = None

    def __call__(self, number: int) -> int:
        if is_alone():
            return number
        before, shape = self._under_way, (self._sharding.mesh.size,)
        own = jax.make_array_from_callback(shape, self._sharding, lambda _: np.full(1, number, np.int32))
        self._under_way = self._largest(own)
        return 0 if before is None else int(before)


@contextlib.contextmanager
def one_run() -> Iterator[None]:
    """What several processes do as one: the first alone prints, and an error in any of them ends all.

    The process with the error ends at once instead of waiting for the others; JAX ends those when `HEARTBEAT_S` are
    over. Each leaves a last line that says what to do.
    """
    if is_alone():
        yield
        return
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_epitaph())
            if not is_first():
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield
    except BaseException as error:
        code = _report(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def _epitaph() -> Iterator[None]:
    """A line on stderr should this process be killed, or be ended by JAX, whose own words are many."""
    line = (
        f"error: process {jax.process_index()} of {jax.process_count()} was ended, or ended because another one was; "
        "start all of them again with --resume_from_checkpoint"
    )
    # The end of the pipe without a line in it is the end of this process.
    waiting = subprocess.Popen(["sh", "-c", 'read -r line || echo "$0" >&2', line], stdin=subprocess.PIPE)
    try:
        yield
    finally:
        waiting.communicate(b"\n")


def _report(error: BaseException) -> int:
    """Say what ends this process; its exit code."""
    which = f"process {jax.process_index()} of {jax.process_count()}"
    if isinstance(error, UserError):
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    if isinstance(error, jax.errors.JaxRuntimeError):
        reason = " ".join(str(error).split())[:300]
        print(
            f"error: {which} stops: another process has ended or cannot be reached, or a device has failed; start all "
            f"of them again with --resume_from_checkpoint ({reason})",
            file=sys.stderr,
        )
        return 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return int(error.code or 0)
    traceback.print_exception(error)
    print(f"error: {which} stops because of the above", file=sys.stderr)
    return 1
