"""Where a run's time goes: compiled programs kept from run to run, and xprof traces of chosen steps."""

import contextlib
import dataclasses
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
from jax.experimental.compilation_cache import compilation_cache

from anima_jax.errors import UserError

Result = TypeVar("Result")


def user_cache_folder() -> pathlib.Path:
    """Where this user's compiled programs are kept. They are executable code: not a folder to share."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification: a relative path is to be ignored.
    base = pathlib.Path(root) if os.path.isabs(root) else pathlib.Path("~/.cache").expanduser()
    return base / "anima_jax" / "xla"


def use_compilation_cache(folder: str | None) -> str | None:
    """Keep compiled programs in `folder` from now on; returns the folder used, or None.

    None is JAX's own setting (JAX_COMPILATION_CACHE_DIR) if there is one, else the user's cache folder, and does
    without if that cannot be written; the empty string turns the cache off. Raises UserError for a `folder` that
    cannot be made.
    """
    if folder is None:
        own = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue] - made at run time
        folder, must_work = own or str(user_cache_folder()), False
    else:
        must_work = True
    if folder and "://" not in folder:
        folder = os.path.abspath(os.path.expanduser(folder))
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            writable = os.access(folder, os.W_OK | os.X_OK)
        except OSError:
            writable = False
        if not writable and must_work:
            raise UserError(f"compilation_cache_dir = {folder}: expected a folder that can be written, or '' for none")
        folder = folder if writable else ""
    jax.config.update("jax_compilation_cache_dir", folder or None)
    compilation_cache.reset_cache()  # JAX looks at the setting once, at its first compilation
    return folder or None


@dataclasses.dataclass
class Compilation:
    """What was compiled while it was watched: seconds, programs asked of the cache, and those found there."""

    seconds: float = 0.0
    asked: int = 0
    hits: int = 0

    def __str__(self) -> str:
        if not self.asked:
            return f"{self.seconds:.1f} s (no compilation cache)"
        return f"{self.seconds:.1f} s (compilation cache: {'hit' if self.hits == self.asked else 'miss'})"


@contextlib.contextmanager
def watch_compilation() -> Iterator[Compilation]:
    """Watches what the block compiles: a jitted function's first call returns when its program is there."""
    found = Compilation()

    def listen(event: str, **_) -> None:
        found.asked += event == "/jax/compilation_cache/compile_requests_use_cache"
        found.hits += event == "/jax/compilation_cache/cache_hits"

    started = time.monotonic()
    jax.monitoring.register_event_listener(listen)
    try:
        yield found
    finally:
        found.seconds = time.monotonic() - started
        jax.monitoring.unregister_event_listener(listen)


def parse_steps(text: str) -> range:
    """START:STOP, the steps from START (the first is 1) up to, not including, STOP. Raises UserError otherwise."""
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if match and 1 <= int(match[1]) < int(match[2]):
        return range(int(match[1]), int(match[2]))
    raise UserError(f"--profile {text}: expected START:STOP, two step numbers with 1 ≤ START < STOP, as in 10:13")


class Profiler:
    """Runs steps, and writes an xprof trace of those in `steps` into `folder`. View it with `xprof FOLDER`."""

    def __init__(self, steps: range | None, folder: pathlib.Path):
        self._steps, self._folder = steps or range(0), folder
        self._tracing = False

    def run(self, number: int, step: Callable[..., Result], *arguments) -> Result:
        """`step(*arguments)`, which is step `number` (from 1) of the run."""
        if number in self._steps and not self._tracing:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            result = step(*arguments)
        if self._tracing and number >= self._steps[-1]:
            self._stop(result)
        return result

    def close(self) -> None:
        """End a trace whose last step was not reached."""
        if self._tracing:
            self._stop(None)

    def _stop(self, result) -> None:
        jax.block_until_ready(result)  # steps run behind the host; the trace would lack their end
        jax.profiler.stop_trace()
        self._tracing, self._steps = False, range(0)
