"""Files that cannot be used: each is named once, training goes on without it, and the number is told at the end."""

import logging
import threading

from anima_jax.errors import UserError

log = logging.getLogger(__name__)


class Problems:
    """Counts what is skipped. With `strict` the first of them is an error. Safe to use from several threads."""

    def __init__(self, strict: bool = False):
        self.strict = strict
        self._count, self._lock = 0, threading.Lock()

    @property
    def count(self) -> int:
        """Number of files skipped so far."""
        return self._count

    def skip(self, error: UserError | str) -> None:
        """Log one line for a file that is left out. Raises it as a UserError if `strict`."""
        line = " ".join(str(error).split())
        # A file name need not be UTF-8; its stray bytes, which no terminal takes, are shown as escapes.
        line = line.encode("utf-8", "backslashreplace").decode()
        if self.strict:
            raise UserError(line)
        with self._lock:
            self._count += 1
        log.warning("skipped: %s", line)

    def summary(self) -> str:
        """One line, or the empty string if nothing was skipped."""
        if not self._count:
            return ""
        files = "1 file was" if self._count == 1 else f"{self._count} files were"
        return f"{files} skipped, named above (--strict_data makes that an error)"
