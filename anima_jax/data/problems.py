"""Files that cannot be used. Each is reported once and skipped, and a summary counts them."""

import logging
import threading

from anima_jax.errors import UserError, one_line

log = logging.getLogger(__name__)


class Problems:
    """The skipped files. The first one is an error with `strict`; none is logged without `logged`. Thread-safe."""

    def __init__(self, strict: bool = False, logged: bool = True):
        self.strict, self.logged = strict, logged
        self.lines: list[str] = []
        """One line per skip, so two for a file in two sources or at two sizes."""
        self._reported, self._lock = set[str](), threading.Lock()

    @property
    def count(self) -> int:
        """Number of files skipped so far, each counted once."""
        return len(self._reported)

    def skip(self, *errors: UserError | str) -> None:
        """Log one line for each skipped file that is not known yet, if `logged`. Raises UserError if `strict`."""
        for error in errors:
            # File names may contain bytes that are not UTF-8, which terminals reject; these become escapes.
            line = one_line(error)
            if self.strict:
                raise UserError(line)
            with self._lock:
                new = line not in self._reported
                self._reported.add(line)
                self.lines.append(line)
            if new and self.logged:
                log.warning("skipped: %s", line)

    def summary(self) -> str:
        """Return one line, or an empty string if nothing was skipped."""
        if not self.count:
            return ""
        files = "1 file was" if self.count == 1 else f"{self.count} files were"
        return f"{files} skipped, named above (--strict_data makes that an error)"
