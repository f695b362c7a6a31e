"""Requests to a run to save, or to save and stop, by diffusion-pipe's signal files or by signals."""

import contextlib
import os
import pathlib
import signal
from collections.abc import Callable
from typing import Literal

from anima_jax.launch import STOP_SIGNALS
from anima_jax.parallel.hosts import Consensus, is_process_0, is_single_process

Request = Literal["save", "save_quit"]

REQUESTS: tuple[Request | None, ...] = (None, "save", "save_quit")
"""Requests in order of priority: of several requests, the last in this list counts."""

FILES: tuple[Request, ...] = ("save_quit", "save")
"""Names of (empty) files in the run's folder that are requests; the first one found counts."""


SIGNALS = ("SIGINT", *STOP_SIGNALS)
"""Signals that are requests to save and quit: schedulers' (SIGTERM, SIGUSR1), Ctrl-C, and a terminal that closes.

After the first SIGTERM or SIGINT, the next one kills the process, even if it is compiling. The others are requests
every time: a terminal that closes may send several, and SLURM sends SIGTERM after its warning. Native Windows has only
the first two.
"""

_AT_ONCE = (signal.SIGTERM, signal.SIGINT)

_INTERRUPTED = b"\nsaving a checkpoint after the current step; press Ctrl-C again to end at once\n"


class _CutShort(BaseException):
    """Ends the action of `Signals.cut_short`. It is not an Exception, because libraries may catch those."""


class Signals:
    """Requests to the run in `run_folder`. Until `close`, `SIGNALS` that were not ignored ask to save and quit.

    With a `consensus`, the processes of a run agree on requests. Create the object in the main thread.
    """

    def __init__(self, run_folder: pathlib.Path, consensus: Consensus | None = None):
        self._folder, self._consensus = run_folder, consensus
        self._terminated = self._cutting = False
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        # nohup ignores SIGHUP, and a shell without job control SIGINT for what runs in the background.
        listened = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._on_signal) for number in listened}

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
        """Run an action that may take long and can be repeated later. A signal ends it at once, or prevents its start.

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
        """Restore the previous handlers of the signals."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        self._terminated = True
        for again in _AT_ONCE if number in _AT_ONCE else ():
            if again in self._before:
                signal.signal(again, signal.SIG_DFL)
        if number == signal.SIGINT:
            with contextlib.suppress(OSError):
                os.write(2, _INTERRUPTED)  # `print` may be what the signal interrupted
        if self._cutting:
            self._cutting = False
            raise _CutShort
