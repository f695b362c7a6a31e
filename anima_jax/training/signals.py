"""How a person or a cluster asks a run to save, or to save and end: diffusion-pipe's signal files, and SIGTERM."""

import contextlib
import pathlib
import signal
from collections.abc import Callable
from typing import Literal

from anima_jax.parallel.hosts import is_process_0, is_single_process

Request = Literal["save", "save_quit"]

REQUESTS: tuple[Request | None, ...] = (None, "save", "save_quit")
"""By their numbers, of which the largest of several counts."""

FILES: tuple[Request, ...] = ("save_quit", "save")
"""Empty files of these names in the run's folder are requests; the first that is there counts."""


class _CutShort(BaseException):
    """Ends what `Signals.cut_short` runs. No Exception: libraries take those for their own."""


class Signals:
    """Requests to the run in `run_folder`. Until `close`, the first SIGTERM is a request to save and quit.

    The second one ends the process at once, as it would without this class; so does an interrupt from the keyboard.
    Make it in the main thread.
    """

    def __init__(self, run_folder: pathlib.Path):
        self._folder = run_folder
        self._terminated = self._cutting = False
        self._before = signal.signal(signal.SIGTERM, self._on_sigterm)

    def requested(self) -> Request | None:
        """What is asked of this process since the last call, None if nothing is.

        Of a run's processes the first looks for files; the one that asked for something is removed.
        """
        if self._terminated:
            self._terminated = False
            return "save_quit"
        for name in FILES if is_process_0() else ():
            path = self._folder / name
            if path.is_file():
                # Another program's file, or a folder that became read-only, asks again and again but stops nothing.
                with contextlib.suppress(OSError):
                    path.unlink()
                return name
        return None

    def cut_short(self, action: Callable[[], None]) -> None:
        """Do what may take long and can be made up for later: SIGTERM ends it on the spot, or it does not begin.

        Where several processes do it together it goes on to its end: one alone cannot leave.
        """
        if self._terminated and is_single_process():
            return
        try:
            self._cutting = is_single_process()
            action()
            self._cutting = False  # here, where a signal until now is still caught
        except _CutShort:
            pass
        finally:
            self._cutting = False

    def close(self) -> None:
        """SIGTERM means again what it did before."""
        signal.signal(signal.SIGTERM, self._before)

    def _on_sigterm(self, number: int, frame: object) -> None:
        self._terminated = True
        signal.signal(number, self._before)
        if self._cutting:
            self._cutting = False
            raise _CutShort
