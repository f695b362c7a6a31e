"""What a user sees of a mistake: one line and exit code 2, never a traceback."""

import difflib
import functools
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """A mistake of the user's. The message is one line: the file or key, what was found, what was expected."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'optimizer'?)"` for the nearest of `known`, or the empty string if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


def command_line(main: Callable[..., None]) -> Callable[..., None]:
    """Turn a `UserError` that leaves `main` into its line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            sys.exit(_report(str(error)))

    return wrapped


def _report(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2
