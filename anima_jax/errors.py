"""What a user sees of a mistake: one line a fault and exit code 2, never a traceback."""

import _thread
import argparse
import atexit
import contextlib
import difflib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn


class UserError(Exception):
    """A user's mistake, or several: one argument and one line each (file or key, what was found, what was expected)."""

    @property
    def faults(self) -> tuple[str, ...]:
        """Each mistake on one line."""
        return tuple(" ".join(str(fault).split()) for fault in self.args)

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'optimizer'?)"` for the nearest of `known`, or the empty string if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


class ArgumentParser(argparse.ArgumentParser):
    """argparse, whose complaints are a `UserError` too: one line, without the usage, with the nearest flag."""

    def parse_args(self, args=None, namespace=None):
        """As argparse does, but an unknown flag is answered with the one that may be meant."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            near = did_you_mean(flag, [name for action in self._actions for name in action.option_strings])
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


_INTERRUPTED = 130
_interrupted = threading.Event()


@atexit.register
def _end_interrupted() -> None:
    """Leave the interpreter as it is: after an interrupted compilation jaxlib crashes when it is taken down."""
    if _interrupted.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_INTERRUPTED)


def command_line(main: Callable[..., None]) -> Callable[..., None]:
    """Turn a `UserError` that leaves `main` into its lines on stderr, `error: …` each, and exit code 2.

    An interrupt from the keyboard ends in one line too, with the shell's code for it, 130.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> None:
        try:
            with _no_interrupt_lost():
                main(*args, **kwargs)
        except UserError as error:
            for fault in error.faults:
                print(f"error: {fault}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            _interrupted.set()
            sys.exit(_INTERRUPTED)

    return wrapped


@contextlib.contextmanager
def _no_interrupt_lost() -> Iterator[None]:
    """Raise an interrupt from the keyboard again where Python has dropped it.

    It drops what comes out of a callback of C code, as jax has one for each collection of garbage: an interrupt during
    a compilation, which is C code itself, often ends there.
    """
    before = sys.unraisablehook

    def again(unraisable: "sys.UnraisableHookArgs") -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, _thread.interrupt_main).start()  # from here it would be dropped too
        else:
            before(unraisable)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = before
