"""Requests to a run to save, or to save and stop, by diffusion-pipe's signal files or SIGTERM."""

import contextlib
import pathlib
import signal
from collections.abc import Callable
from typing import Literal

from anima_jax.parallel.hosts import Consensus, is_process_0, is_single_process

Request = Literal["save", "save_quit"]

REQUESTS: tuple[Request | None, ...] = (None, "save", "save_quit")
"""Requests in order of priority: of several requests, the last in this list counts."""

FILES: tuple[Request, ...] = ("save_quit", "save")
"""Names of (empty) files in the run's folder that are requests; the first one found counts."""


class _CutShort(BaseException):
    """Ends the action of `Signals.cut_short`. It is not an Exception, because libraries may catch those."""


class Signals:
    """Requests to the run in `run_folder`. Until `close`, the first SIGTERM is a request to save and quit.

    A second SIGTERM ends the process at once, as it would without this class; so does a keyboard interrupt. With a
    `consensus`, the processes of a run agree on requests. Create the object in the main thread.
    """

    def __init__(self, run_folder: pathlib.Path, consensus: Consensus | None = None):
        self._folder, self._consensus = run_folder, consensus
        self._terminated = self._cutting = False
        self._before = signal.signal(signal.SIGTERM, self._on_sigterm)

    def requested(self) -> Request | None:
        """Return the request that this process received since the last call, None if there is none.

        Only process 0 looks for files. It removes the file of the request that it returns.
        """
        if self._terminated:
            self._terminated = False
            return "save_quit"
        for name in FILES if is_process_0() else ():
            path = self._folder / name
            if path.is_file():
                # If the file cannot be removed, the request repeats at every call; that is no reason to fail.
                with contextlib.suppress(OSError):
                    path.unlink()
                return name
        return None

    def agreed(self, *, save: bool = False) -> Request | None:
        """Return the request on which the processes of the run agree; `save` adds a request of this process to save.

        Several processes agree one call late, so that none waits for the others. All must call it equally often.
        """
        number = max(REQUESTS.index(self.requested()), REQUESTS.index("save") if save else 0)
        return REQUESTS[self._consensus(number) if self._consensus else number]

    def cut_short(self, action: Callable[[], None]) -> None:
        """Run an action that may take long and can be repeated later. SIGTERM ends it at once, or prevents its start.

        Several processes always complete it, because none may leave an action that they run together.
        """
        if self._terminated and is_single_process():
            return
        try:
            self._cutting = is_single_process()
            action()
            self._cutting = False  # inside `try`, so that a signal just before it is still caught
        except _CutShort:
            pass
        finally:
            self._cutting = False

    def close(self) -> None:
        """Restore the previous handler of SIGTERM."""
        signal.signal(signal.SIGTERM, self._before)

    def _on_sigterm(self, number: int, frame: object) -> None:
        self._terminated = True
        signal.signal(number, self._before)
        if self._cutting:
            self._cutting = False
            raise _CutShort
