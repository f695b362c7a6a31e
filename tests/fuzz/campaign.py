"""The child process of a campaign: it draws inputs, gives each to the program, and notes those that are lost.

An input is lost if it ends in anything but a result, or one line for each error and exit code 2: in a traceback, a long
message, more than `LIMIT_S` seconds of CPU time, or in this process's memory or life (which its parent notices).
"""

import contextlib
import dataclasses
import io
import os
import pathlib
import pickle
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

import hypothesis
from hypothesis import strategies as st

from anima_jax.errors import UserError
from tests.fuzz.mutations import KINDS, Change, Files, changed

LIMIT_S = 10.0
"""CPU time for one input, of all threads together."""

LIMIT_BYTES = 2**31
"""Memory that inputs may need beyond what the process has when it begins."""

LONGEST_MESSAGE, LONGEST_OUTPUT = 4200, 200_000

INPUTS = st.binary(min_size=10, max_size=37)
"""A valid input, and up to four changes. Bytes are what hypothesis draws fastest, and makes smaller best."""


def decoded(drawn: bytes) -> tuple[int, list[Change]]:
    """The number of the valid input, and the changes, that bytes stand for."""
    rows = [drawn[at : at + 9] for at in range(1, len(drawn) - 8, 9)]
    return drawn[0], [Change(KINDS[row[0] % len(KINDS)], *struct.unpack("<2I", row[1:])) for row in rows]


class TooSlow(BaseException):
    """An input took more than `LIMIT_S`; not an Exception, so that nothing of the program catches it."""


class Over(BaseException):
    """The campaign has tried enough; not an Exception, which hypothesis would take for a failure."""


class LostError(Exception):
    """An input was lost in a way that is not known yet."""


@dataclasses.dataclass
class Counts:
    """How many inputs ended how, and the smallest input of every way to be lost."""

    results: int = 0
    refused: int = 0
    lost: dict[str, Files] = dataclasses.field(default_factory=dict)

    @property
    def inputs(self) -> int:
        return self.results + self.refused + len(self.lost)


def _too_slow(_: int, frame: FrameType | None) -> None:
    raise TooSlow


def _where(error: BaseException) -> str:
    """The innermost line of the program, and the kind of the error: inputs lost in the same way share it."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/anima_jax/" in frame.filename]
    place = f"{pathlib.Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "outside"
    return f"{type(error).__name__} at {place}"


def write(files: Files, folder: pathlib.Path) -> None:
    """Make `folder` hold these files and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def lost(read: Callable[[pathlib.Path], None], folder: pathlib.Path, files: Files) -> tuple[str, bool]:
    """Give an input to the program; return how it was lost ("" if it was not), and whether it was refused."""
    write(files, folder)
    said, refused = io.StringIO(), False
    before = signal.signal(signal.SIGPROF, _too_slow)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
            try:
                read(folder)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
    except UserError as error:
        refused = True
        longest = max(error.messages, key=len, default="")
        if not longest or len(longest) > LONGEST_MESSAGE:
            return f"a message of {len(longest)} characters: {longest[:60]!a}", True
    except SystemExit as ended:
        if ended.code not in (0, None):
            return f"exit code {ended.code}", True
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{_where(error)}: {str(error)[:150]!a}", True
    finally:
        signal.signal(signal.SIGPROF, before)
    if len(said.getvalue()) > LONGEST_OUTPUT:
        return f"{len(said.getvalue())} characters of output", refused
    return "", refused


def limit_memory() -> None:
    """Let this process use only `LIMIT_BYTES` more of memory than it does, and what threads of every core reserve."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + LIMIT_BYTES + (os.cpu_count() or 1) * 2**29
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def campaign(
    read: Callable[[pathlib.Path], None],
    seeds: list[Files],
    folder: pathlib.Path,
    *,
    seed: int,
    seconds: float,
    most: int,
) -> Counts:
    """Try changed `seeds` until the time is over or there were `most` inputs; before each, note it in `folder`."""
    counts, ways = Counts(), dict[str, str]()
    for files in seeds:
        lost(read, folder / "input", files)  # what is loaded at first use is no input's
    limit_memory()
    end = time.monotonic() + seconds
    shrinking: list[str] = []

    def try_one(drawn: bytes) -> None:
        if counts.inputs >= most or time.monotonic() > end:
            raise Over
        number, changes = decoded(drawn)
        files = seeds[number % len(seeds)]
        for change in changes:
            files = changed(files, change, seeds)
        (folder / "current").write_bytes(pickle.dumps((counts.results, counts.refused, counts.lost, files)))
        how, refused = lost(read, folder / "input", files)
        way = how.partition(": ")[0]
        counts.results += not (how or refused)
        counts.refused += refused and not how
        if not how or (way in ways and [way] != shrinking):
            return
        if not shrinking:
            shrinking.append(way)
        if [way] == shrinking:
            counts.lost.pop(ways.get(way, ""), None)
            ways[way] = how
            counts.lost[how] = files
            raise LostError(way)

    test: Any = hypothesis.given(INPUTS)(try_one)
    test = hypothesis.settings(
        max_examples=2000,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )(test)
    with contextlib.suppress(Over):
        while True:
            shrinking.clear()
            with contextlib.suppress(LostError, hypothesis.errors.Flaky):
                hypothesis.seed(seed)(test)()
            seed += 1
    return counts


def child(name: str, folder: pathlib.Path, seed: int, seconds: float, most: int) -> None:
    """What the child process runs: its counts are pickled to `folder`."""
    from tests.fuzz.formats import FORMATS, corpus

    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT), 2)
    (folder / "work").mkdir()
    os.chdir(folder / "work")
    format_ = FORMATS[name]
    counts = campaign(format_.read, [*format_.seeds(), *corpus(name)], folder, seed=seed, seconds=seconds, most=most)
    (folder / "counts").write_bytes(pickle.dumps((counts.results, counts.refused, counts.lost)))
    sys.stderr.flush()
    os._exit(0)
