"""Files that cannot be used: each is named once, training goes on without it, and the number is told at the end."""

import logging
import threading

from anima_jax.errors import UserError

log = logging.getLogger(__name__)


class Problems:
    """Counts what is skipped. With `strict` the first of them is an error. Safe to use from several threads."""

    def __init__(self, strict: bool = False):
        self.strict = strict
        self.lines: list[str] = []
        """What was said of each file, again where it was met again: in a second source, or at a second size."""
        self._told, self._lock = set[str](), threading.Lock()

    @property
    def count(self) -> int:
        """Number of files skipped so far, each counted once."""
        return len(self._told)

    def skip(self, *errors: UserError | str) -> None:
        """Log one line for each file that is left out, if not told before. Raises it as a UserError if `strict`."""
        for error in errors:
            line = " ".join(str(error).split())
            # A file name need not be UTF-8; its stray bytes, which no terminal takes, are shown as escapes.
            line = line.encode("utf-8", "backslashreplace").decode()
            if self.strict:
                raise UserError(line)
            with self._lock:
                new = line not in self._told
                self._told.add(line)
                self.lines.append(line)
            if new:
                log.warning("skipped: %s", line)

    def summary(self) -> str:
        """One line, or the empty string if nothing was skipped."""
        if not self.count:
            return ""
        files = "1 file was" if self.count == 1 else f"{self.count} files were"
        return f"{files} skipped, named above (--strict_data makes that an error)"
