"""The compilation cache, and xprof traces of chosen steps."""

import contextlib
import dataclasses
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from jax.experimental.compilation_cache import compilation_cache

from anima_jax.errors import UserError

Result = TypeVar("Result")


MIN_COMPILE_TIME = "jax_persistent_cache_min_compile_time_secs"


def user_cache_folder() -> pathlib.Path:
    """Return the user's folder of compiled programs. It is not shared, because they are executable code."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification says to ignore a relative path.
    base = pathlib.Path(root) if os.path.isabs(root) else pathlib.Path("~/.cache").expanduser()
    return base / "anima_jax" / "xla"


def use_compilation_cache(folder: str | None) -> str | None:
    """Cache compiled programs in `folder`. Returns the folder that is used, None if there is no cache.

    None selects JAX's own setting (JAX_COMPILATION_CACHE_DIR) or else the user's cache folder; if that is not writable,
    there is no cache. The empty string turns the cache off. Raises UserError if a given `folder` is not writable.
    """
    chosen = folder
    if chosen is None:
        own = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue] - made at run time
        chosen = own or str(user_cache_folder())
    if chosen and "://" not in chosen:
        chosen = os.path.abspath(os.path.expanduser(chosen))
        if not _make_writable(chosen):
            if folder is not None:
                raise UserError(f"compilation_cache_dir = {chosen}: expected a writable folder, or '' for no cache")
            chosen = ""
    jax.config.update("jax_compilation_cache_dir", chosen or None)
    if MIN_COMPILE_TIME.upper() not in os.environ:
        # JAX leaves out programs that compile in less than a second; a second run would compile those again.
        jax.config.update(MIN_COMPILE_TIME, 0.0)
    compilation_cache.reset_cache()  # JAX reads the setting only at its first compilation
    return chosen or None


def _make_writable(folder: str) -> bool:
    """Create `folder` if it does not exist, and return whether it is writable."""
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


@dataclasses.dataclass
class Compilation:
    """Seconds of a compilation, number of programs looked up in the cache, and number of programs found there."""

    seconds: float = 0.0
    lookups: int = 0
    hits: int = 0

    def __str__(self) -> str:
        if not self.lookups:
            return f"{self.seconds:.1f} s (no compilation cache)"
        return f"{self.seconds:.1f} s (compilation cache: {'hit' if self.hits == self.lookups else 'miss'})"


@contextlib.contextmanager
def watch_compilation() -> Iterator[Compilation]:
    """Measure compilation in the block, which should be a jitted function's first call: it returns once compiled."""
    found = Compilation()

    def listen(event: str, **_) -> None:
        found.lookups += event == "/jax/compilation_cache/compile_requests_use_cache"
        found.hits += event == "/jax/compilation_cache/cache_hits"

    started = time.monotonic()
    jax.monitoring.register_event_listener(listen)
    try:
        yield found
    finally:
        found.seconds = time.monotonic() - started
        jax.monitoring.unregister_event_listener(listen)


def parse_steps(text: str) -> range:
    """Parse START:STOP, the steps from START (from 1) to STOP − 1. Raises UserError if `text` is not valid."""
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if match and 1 <= int(match[1]) < int(match[2]):
        return range(int(match[1]), int(match[2]))
    raise UserError(f"--profile {text}: expected START:STOP, two step numbers with 1 ≤ START < STOP, as in 10:13")


class Profiler:
    """Runs train steps and writes an xprof trace of those in `steps` to `folder`; `xprof FOLDER` shows it."""

    def __init__(self, steps: range | None, folder: pathlib.Path):
        self._steps, self._folder = steps or range(0), folder
        self._tracing = False

    def run_step(self, number: int, step: Callable[..., Result], *arguments: Any) -> Result:
        """Run step `number` (from 1) of the run and return `step(*arguments)`."""
        if number in self._steps and not self._tracing:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            result = step(*arguments)
        if self._tracing and number >= self._steps[-1]:
            self._stop(result)
        return result

    def close(self) -> None:
        """Write an unfinished trace, if the run ended before the last step to trace."""
        if self._tracing:
            self._stop(None)

    def _stop(self, result: Any) -> None:
        jax.block_until_ready(result)  # steps run asynchronously; without this the trace ends early
        jax.profiler.stop_trace()
        self._tracing, self._steps = False, range(0)
