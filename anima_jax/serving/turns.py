"""Turns on the devices of a mesh, for threads that start programs.

On several devices, programs that exchange data must be started in the same order on all of them. A lock of `threading`
would let one thread take turn after turn; here the one that has waited longest is next.
"""

import collections
import contextlib
import threading
from collections.abc import Iterator


class Turns:
    """Lets one thread at a time have the devices, if `needed`; else everyone always has them."""

    def __init__(self, needed: bool):
        self._needed = needed
        self._changed = threading.Condition()
        self._queue: collections.deque[object] = collections.deque()

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Have the devices during the block."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def begin(self) -> None:
        """Wait until the devices are free, and take them."""
        if not self._needed:
            return
        me = object()
        with self._changed:
            self._queue.append(me)
            self._changed.wait_for(lambda: self._queue[0] is me)

    def end(self) -> None:
        """Pass the devices on."""
        if not self._needed:
            return
        with self._changed:
            self._queue.popleft()
            self._changed.notify_all()
