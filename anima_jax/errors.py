"""Reporting of user errors: one line per error and exit code 2, never a traceback."""

import _thread
import argparse
import atexit
import contextlib
import difflib
import functools
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, ParamSpec, TypeVar

from anima_jax.exit_codes import CLOSED_PIPE, FAULT, INTERRUPTED

P = ParamSpec("P")
T = TypeVar("T")


MOST_MESSAGES, MOST_CHARACTERS = 100, 4000
"""Limits of what is printed about hostile input: errors, and characters of each."""


class UserError(Exception):
    """One or more user errors, one message per argument: the file or key, what was found and what was expected."""

    exit_code = 2

    @property
    def messages(self) -> tuple[str, ...]:
        """The messages, each on one line; of very many, the first ones and the number of the others."""
        more = len(self.args) - MOST_MESSAGES
        return (*map(one_line, self.args[:MOST_MESSAGES]), *([f"and {plural(more, 'more error')}"] if more > 0 else []))

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class NotFiniteError(UserError, RuntimeError):
    """NaN or infinite values in a file or in what was computed from it: the file and tensors, or where they arose."""

    exit_code = 1


class UnknownNameError(UserError, TypeError):
    """A keyword argument that does not exist, with the nearest one that does."""


def one_line(text: object) -> str:
    """Return a message as one line of printable characters. What it quotes from files and prompts may have others.

    If the line is longer than `MOST_CHARACTERS`, its middle is left out.
    """
    line = _shortened(" ".join(str(text).split()))
    return _shortened("".join(each if each.isprintable() else ascii(each)[1:-1] for each in line))


def _shortened(line: str) -> str:
    return line if len(line) <= MOST_CHARACTERS else f"{line[: MOST_CHARACTERS - 1000]} … {line[-900:]}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'optimizer'?)"` with the name in `known` closest to `word`, in any case, or ""."""
    names = list(known)
    lower = {name.lower(): name for name in reversed(names)}
    near = difflib.get_close_matches(word[:200], names, n=1, cutoff=0.6)
    near = near or [lower[name] for name in difflib.get_close_matches(word[:200].lower(), lower, n=1, cutoff=0.6)]
    return f" (did you mean '{near[0]}'?)" if near else ""


def check_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise UnknownNameError, with the nearest known name, for the first of `given` that is not in `known`."""
    known = list(known)
    for name in given:
        if name not in known:
            raise UnknownNameError(f"{what} has no setting '{name}'{did_you_mean(name, known)}")


def suggests_names(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a public function so that an unknown keyword argument is reported with the nearest known one."""
    parameters = inspect.signature(function).parameters

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        check_names(function.__qualname__, kwargs, parameters)
        return function(*args, **kwargs)

    return wrapped


def shorten(items: Sequence[str], limit: int = 4) -> str:
    """Join the first `limit` items with commas and say how many more there are.

    Items come from files, so each is escaped to printable ASCII and cut to 200 characters.
    """
    shown = ", ".join(ascii(item)[1:-1][:200] for item in items[:limit])
    return shown + (f" and {len(items) - limit} more" if len(items) > limit else "")


def plural(count: int, noun: str) -> str:
    """Return `count` and the noun in the right number: "1 tensor", "2 tensors", "2 tensors of a file"."""
    head, *rest = re.split(r"(?= (?:of|in|without|ignored)\b)", noun, maxsplit=1)
    return f"{count} {head}{'' if count == 1 else 's'}{''.join(rest)}"


def counted(counts: Mapping[str, int]) -> str:
    """Return what there is how often: "F32 × 3, BF16 × 1"."""
    return ", ".join(f"{name} × {count}" for name, count in counts.items())


def size_text(count: int) -> str:
    """Format a number of bytes in decimal units."""
    size, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}" if units[0] != "bytes" else f"{count} bytes"


def show_value(value: Any) -> str:
    """Format a setting's value for a message: "not set" for None, at most 80 characters."""
    if value is None:
        return "not set"
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message, or the error's type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()


def shell_command(module: str, *arguments: str) -> str:
    """Return a command line that runs a module with this Python, to be pasted into a shell in the current folder."""
    words = [sys.executable or "python", "-m", module, *arguments]
    with contextlib.suppress(OSError, ValueError):  # a folder that was deleted, or another drive
        relative = os.path.relpath(words[0])
        if not relative.startswith(os.pardir):
            words[0] = relative if os.path.dirname(relative) else os.path.join(os.curdir, relative)
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


_DISK_ERRORS = (
    (r"No space left|ENOSPC", "the disk is full"),
    (r"[Qq]uota exceeded|EDQUOT", "the disk quota is used up"),
    (r"File too large|EFBIG", "the file would be larger than this process may write (ulimit -f)"),
)


def os_reason(error: BaseException) -> str:
    """Return the reason for a failed read or write on one line, without the error's number and file name.

    A full disk, an exhausted quota and a file size limit are recognised by the text of the error, whichever library
    raises it.
    """
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    known = (words for pattern, words in _DISK_ERRORS if re.search(pattern, text))
    return next(known, " ".join(text.split())[:200])


def program(module: str) -> str:
    """Return how this program was called, for its usage: `anima-train`, or else `python -m` and its module."""
    name = os.path.basename(sys.argv[0])
    return name if name.startswith("anima-") else f"python -m {module}"


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that reports a wrong command line as a `UserError`: one line, with the nearest flag."""

    def parse_args(  # pyright: ignore[reportIncompatibleMethodOverride] - argparse's has four overloads
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse as argparse does. Raises UserError for an unknown flag, with the nearest known one."""
        words = sys.argv[1:] if args is None else list(args)
        for word in words:
            if found := re.search("[\ud800-\udfff]", word):
                byte = f" (byte 0x{ord(found[0]) - 0xDC00:02x})" if "\udc80" <= found[0] <= "\udcff" else ""
                self.error(f"{word!a}: is not UTF-8 text{byte}")
        parsed, unknown = self.parse_known_args(words, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            near = did_you_mean(flag, [name for action in self._actions for name in action.option_strings])
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


_MISTAKES = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
"""Errors of the system that are a user's mistakes."""


def command_line(main: Callable[P, None]) -> Callable[P, None]:
    """Decorate a program's `main` so that user errors, errors of the system and interrupts end it without a traceback.

    A `UserError` is printed on stderr as one `error: …` line per message, with its exit code (2, or 1 for values that
    are not finite), and so are errors of files and memory (`system_error`). A keyboard interrupt prints one line, with
    exit code 130. If nobody reads stdout any more, nothing is printed, with exit code 141.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        # Registered before everything that `main` registers, so it runs last.
        atexit.register(_exit_without_teardown)
        code, lines = 0, []
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without "‖" is no reason to stop
        try:
            with _interrupts_raised_again():
                main(*args, **kwargs)
                sys.stdout.flush()
        except UserError as error:
            code, lines = error.exit_code, [f"error: {message}" for message in error.messages]
        except KeyboardInterrupt:
            code, lines = INTERRUPTED, ["interrupted"]
        except Exception as error:
            found = _stdout_error(error) or system_error(error)
            if found is None:
                raise
            code, lines = found[0], [f"error: {found[1]}"] if found[1] else []
        finally:
            if code != INTERRUPTED:
                atexit.unregister(_exit_without_teardown)
        with contextlib.suppress(OSError):  # stderr, too, may be a full disk
            for line in lines:
                print(line, file=sys.stderr)
        if code:
            sys.exit(code)

    return wrapped


def system_error(error: BaseException) -> tuple[int, str] | None:
    """Return the exit code and the message of an error of files or memory; None for any other error.

    What main did not expect here names the line of the code, for a report.
    """
    text = first_line(error)
    if isinstance(error, MemoryError):
        code, text = FAULT, "out of memory" + ("" if text == type(error).__name__ else f": {text}")
    elif type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in text:
        code, text = FAULT, f"out of memory: {text}"
    elif isinstance(error, OSError):
        code, text = (2 if isinstance(error, _MISTAKES) else FAULT), os_reason(error)
        if error.filename is not None:
            text = f"{os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename}: {text}"
        elif not in_a_folder():
            code, text = 2, NO_FOLDER
    else:
        return None
    found = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in found if "anima_jax" in frame.filename and frame.filename != __file__]
    return code, one_line(text) + (f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else "")


NO_FOLDER = "the current folder has been deleted; change to another one"


def in_a_folder() -> bool:
    """Return whether the current folder still exists."""
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _stdout_error(error: Exception) -> tuple[int, str] | None:
    """Return the exit code and a message if the error is stdout's; if so, the rest of the output goes nowhere."""
    if not isinstance(error, OSError) or isinstance(error, _MISTAKES) or error.filename is not None:
        return None
    try:
        sys.stdout.write("\n")  # Without a buffer there may be nothing left to flush.
        sys.stdout.flush()
    except OSError as again:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return (CLOSED_PIPE, "") if isinstance(again, BrokenPipeError) else (FAULT, f"stdout: {os_reason(again)}")
    return None


def _exit_without_teardown() -> None:
    """Exit without interpreter teardown, in which jaxlib can crash after an interrupted compilation."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def _interrupts_raised_again() -> Iterator[None]:
    """Re-raise a keyboard interrupt that Python has dropped.

    Python drops exceptions raised in callbacks from C code. JAX registers such a callback for garbage collection, and
    an interrupt during a compilation, which itself runs in C code, often arrives there.
    """
    before = sys.unraisablehook

    def raise_again(unraisable: "sys.UnraisableHookArgs") -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, _thread.interrupt_main).start()  # raised in here, it would be dropped too
        else:
            before(unraisable)

    sys.unraisablehook = raise_again
    try:
        yield
    finally:
        sys.unraisablehook = before
