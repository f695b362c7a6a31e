"""Files that grow during a run: JSON lines that a resumed run continues, and files that outlive a full disk."""

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
    """A file for writing. Data that cannot be written stay in memory for the next `flush`; a warning is logged once."""

    def __init__(self, path: str | os.PathLike[str], mode: str = "wb"):
        self._path, self._waiting, self._warned = os.fspath(path), bytearray(), False
        self._file = open(path, mode, buffering=0)  # noqa: SIM115 - `close` closes it

    def write(self, data: bytes) -> None:
        """Add `data` to the buffer that the next `flush` writes."""
        self._waiting += data

    def flush(self) -> None:
        """Write the buffer, or as much of it as possible."""
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
            self._warned = False
        except OSError as error:
            if not self._warned:
                log.warning(f"{self._path}: cannot be written: {os_reason(error)}; the run continues without")
            self._warned = True

    def sync(self) -> None:
        """Flush, and let what is written survive a power failure, if the file system supports it."""
        self.flush()
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close the file."""
        self.flush()
        with contextlib.suppress(OSError):
            self._file.close()


class JsonlWriter(RetryingFile):
    """A file of JSON lines, each `{"step": …}` with the metrics of that step, continued after `after_step`.

    Lines that an earlier attempt wrote for later steps are dropped, and so is an incomplete line. `kept` are the
    remaining lines from step `remembered` (by default `after_step`) on. Only process 0 writes, but all processes have
    `kept`. Raises UserError if the file cannot be written.
    """

    def __init__(self, path: pathlib.Path, after_step: int, *, remembered: int | None = None):
        self.kept: list[dict[str, Any]] = []
        with writing_to(os.fspath(path)):
            if path.exists():
                temporary = path.with_name(path.name + ".partial") if is_process_0() else pathlib.Path(os.devnull)
                with open(path, "rb") as old, open(temporary, "wb") as new:
                    for line in old:
                        found = _parsed(line)
                        if found and found["step"] <= after_step:
                            new.write(line)
                            if found["step"] >= (after_step if remembered is None else remembered):
                                self.kept.append(found)
                    new.flush()
                    with contextlib.suppress(OSError):  # a process that writes to the null device
                        os.fsync(new.fileno())
                if is_process_0():
                    temporary.replace(path)
            super().__init__(path if is_process_0() else os.devnull, "ab")

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Write a line. Values that are not finite become null, because JSON does not have them."""
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        self.write((json.dumps({"step": step, **finite}) + "\n").encode())
        self.flush()


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return the content of a line; None if the line is incomplete or has no step."""
    with contextlib.suppress(ValueError):
        found = json.loads(line)
        if isinstance(found, dict) and isinstance(found.get("step"), int) and line.endswith(b"\n"):
            return found
    return None
