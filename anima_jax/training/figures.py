"""Files of figures that a run writes on its way. A full disk stops none of them, nor the run."""

import contextlib
import json
import logging
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from anima_jax.checkpoints.locations import writing_to
from anima_jax.errors import os_reason
from anima_jax.parallel.hosts import is_process_0

log = logging.getLogger(__name__)


class RetryingFile:
    """A file to write to. What the disk has no room for waits in memory for the next `flush`; it is said once."""

    def __init__(self, path: str | os.PathLike[str], mode: str = "wb"):
        self._path, self._waiting, self._told = os.fspath(path), bytearray(), False
        self._file = open(path, mode, buffering=0)  # noqa: SIM115 - `close` closes it

    def write(self, data: bytes) -> None:
        """Take `data`, for the next `flush` to write."""
        self._waiting += data

    def flush(self) -> None:
        """Write what was taken, or as much of it as there is room for."""
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
            self._told = False
        except OSError as error:
            if not self._told:
                log.warning(f"{self._path}: cannot be written: {os_reason(error)}; the run goes on without")
            self._told = True

    def close(self) -> None:
        """Flush, and end."""
        self.flush()
        with contextlib.suppress(OSError):
            self._file.close()


class JsonlWriter(RetryingFile):
    """A file of JSON lines, `{"step": …}` and the figures of that step, written on from `after_step`.

    What an earlier attempt wrote beyond that step is dropped, and so is a line that a kill left unfinished. Of the rest
    `kept` are those from the step `remembered` on. Of a run's processes only the first one writes; all know what is
    `kept`. Raises UserError where the file cannot be written.
    """

    def __init__(self, path: pathlib.Path, after_step: int, *, remembered: int | None = None):
        self.kept: list[dict[str, Any]] = []
        with writing_to(os.fspath(path)):
            if path.exists():
                temporary = path.with_name(path.name + ".partial") if is_process_0() else pathlib.Path(os.devnull)
                with open(path, "rb") as old, open(temporary, "wb") as new:
                    for line in old:
                        found = _figures(line)
                        if found and found["step"] <= after_step:
                            new.write(line)
                            if found["step"] >= (after_step if remembered is None else remembered):
                                self.kept.append(found)
                if is_process_0():
                    temporary.replace(path)
            super().__init__(path if is_process_0() else os.devnull, "ab")

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """A line; null stands for figures that are not finite, which JSON does not know."""
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        self.write((json.dumps({"step": step, **finite}) + "\n").encode())
        self.flush()


def _figures(line: bytes) -> dict[str, Any] | None:
    """A line's figures; None for one that is not whole."""
    with contextlib.suppress(ValueError):
        found = json.loads(line)
        if isinstance(found, dict) and isinstance(found.get("step"), int) and line.endswith(b"\n"):
            return found
    return None
