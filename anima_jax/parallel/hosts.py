"""Several processes that are one run: joining, agreeing, and ending together.

Every process runs the same program on its own devices. What only one may do (write a file, print a line) the first one
does; what all must decide alike (when to save, when to stop) they exchange.
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
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from anima_jax.errors import UserError, show_value

HEARTBEAT_S = 30
"""Seconds after which a silent process is taken for dead, and all others end."""

JOINING_MINUTES = 5
"""How long a process waits for the others at the beginning."""

_MOST_FACTS = 3
"""No more differences between processes than these are named."""

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
    if coordinator is not None and not re.fullmatch(r".+:\d{1,5}", coordinator):
        raise UserError(f"--coordinator_address {coordinator}: expected HOST:PORT of the first process")
    if process is not None and not (processes and 0 <= process < processes):
        raise UserError(
            f"--process_id {process}, --num_processes {processes}: expected a process from 0, below the number"
        )
    where = f" at {coordinator}" if coordinator else ""
    # JAX's own handler of SIGTERM would take the place of ours.
    jax.config.update("jax_enable_preemption_service", False)
    last = (
        f"error: ended before all processes had met{where}: are all of them started, with the same "
        f"--coordinator_address and each its own --process_id, within {JOINING_MINUTES} minutes, and is the port open?"
    )
    try:
        with _epitaph(last), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Kubernetes without its package is no cluster to join
            if coordinator:
                print(f"process {process} of {processes}: waiting for the others{where}", file=sys.stderr)
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                initialization_timeout=60 * JOINING_MINUTES,
                heartbeat_timeout_seconds=HEARTBEAT_S,
                shutdown_timeout_seconds=60,
            )
    except (RuntimeError, ValueError) as error:
        found_none = ALONE in str(error) or "must be called before" in str(error)
        if missing and found_none:
            return
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"cannot join the run's other processes: {reason}; --num_processes 1 runs alone") from error


def is_single_process() -> bool:
    """Whether the run has no other processes."""
    return jax.process_count() == 1


def is_process_0() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def barrier(what: str) -> None:
    """Wait for the run's other processes."""
    if not is_single_process():
        multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def process_0_first() -> Iterator[None]:
    """The first process goes through the block before the others: what it writes there they find."""
    if not is_process_0():
        barrier("the first process has gone ahead")
    yield
    if is_process_0():
        barrier("the first process has gone ahead")


def from_process_0(make: Callable[[], pathlib.Path]) -> pathlib.Path:
    """The path that the first process makes."""
    if is_single_process():
        return make()
    data = os.fsencode(make()) if is_process_0() else b""
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.frombuffer(data[:length].ljust(length, b"\0"), np.uint8)
    return pathlib.Path(os.fsdecode(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded)))))


def assert_same_on_all_processes(facts: Callable[[], Mapping[str, Any]]) -> None:
    """Raise UserError in every process unless all have the same `facts`, values of JSON by a person's words."""
    if is_single_process():
        return
    own = json.dumps(facts(), default=str).encode()
    length = int(np.max(multihost_utils.process_allgather(np.int32(len(own)))))
    rows = multihost_utils.process_allgather(np.frombuffer(own.ljust(length), np.uint8))
    first, *others = (json.loads(bytes(row)) for row in np.asarray(rows))
    for number, other in enumerate(others, 1):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if names:
            shown = (
                f"{name} is {show_value(other.get(name))}, not {show_value(first.get(name))}"
                for name in names[:_MOST_FACTS]
            )
            more = f", and {len(names) - _MOST_FACTS} more" if len(names) > _MOST_FACTS else ""
            raise UserError(
                f"process {number} of {jax.process_count()} has not what process 0 has: {'; '.join(shown)}{more}; "
                "expected one configuration, the same flags and the same files in all processes"
            )


class Consensus:
    """The largest number that any process gave a step ago; a process that is alone has its own at once.

    What is exchanged at one step is read at the next, so that no step waits for it.
    """

    def __init__(self, mesh: Mesh):
        self._sharding = NamedSharding(mesh, P(mesh.axis_names))
        self._largest = jax.jit(lambda numbers: numbers.max(), out_shardings=NamedSharding(mesh, P()))
        self._under_way: jax.Array | None = None

    def __call__(self, number: int) -> int:
        if is_single_process():
            return number
        before, shape = self._under_way, (self._sharding.mesh.size,)
        own = jax.make_array_from_callback(shape, self._sharding, lambda _: np.full(1, number, np.int32))
        self._under_way = self._largest(own)
        return 0 if before is None else int(before)


@contextlib.contextmanager
def abort_all_on_error() -> Iterator[None]:
    """What several processes do as one: the first alone prints, and an error in any of them ends all.

    The process with the error ends at once instead of waiting for the others; JAX ends those when `HEARTBEAT_S` are
    over. Each leaves a last line that says what to do.
    """
    if is_single_process():
        yield
        return
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                _epitaph(
                    f"error: process {jax.process_index()} of {jax.process_count()} was ended, or ended because "
                    "another one was; start all of them again with --resume_from_checkpoint"
                )
            )
            if not is_process_0():
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield
    except BaseException as error:
        code = _report(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def _epitaph(line: str) -> Iterator[None]:
    """`line` on stderr should this process be killed in the block, or be ended by JAX, whose own words are many."""
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
        for fault in error.messages:
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
