"""Limits on the memory of threads that read and decode files at the same time.

A thread reserves the bytes of a file before it reads it, and then those of its pixels before it decodes them. Because
the two have separate budgets, and nothing is reserved after pixels, threads cannot wait for each other in a circle.
"""

import contextlib
import threading
from collections.abc import Iterator


class Budget:
    """A number of bytes that threads share. A request for more than all of them waits until nothing is reserved."""

    def __init__(self, total: int):
        self._total, self._used, self._changed = total, 0, threading.Condition()

    @contextlib.contextmanager
    def reserve(self, size: int) -> Iterator[None]:
        """Wait until `size` bytes are free, and reserve them during the block."""
        size = min(size, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._used + size <= self._total)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


FILES, PIXELS = Budget(2**30), Budget(2**31)
"""Bytes of files and of decoded pixels that all threads together may hold."""
