"""Questions of `anima-start`: asked on a terminal; elsewhere, and with `--yes`, answered by their defaults."""

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from anima_jax.errors import UserError, one_line

T = TypeVar("T")


class Questions:
    """Asks a person, or nobody.

    With `yes`, every question gets its default answer. Without a terminal it does, too, but a question that has no safe
    default raises UserError, which names the flag that answers it. What was assumed is in `assumed`, as flags.
    """

    def __init__(self, *, yes: bool = False):
        self._yes = yes
        self.on_terminal = not yes and sys.stdin.isatty() and sys.stdout.isatty()
        self.assumed: list[str] = []

    def ask(
        self,
        question: str,
        default: T,
        flag: str,
        parse: Callable[[str], T],
        *,
        required: bool = False,
    ) -> T:
        """Return the answer, as `parse` reads it; an empty one is `default`. A UserError of `parse` asks again.

        `required` is for a question whose default only a person (or `--yes`) may take. Raises UserError if nobody can
        be asked, and at the end of the input.
        """
        while self.on_terminal:
            shown = f" [{default}]" if default not in ("", None) else ""
            try:
                text = input(f"{question}{shown}: ").strip()
            except EOFError:
                print()
                raise UserError(f"the input ended at a question; {flag} answers it") from None
            if not text:
                return default
            try:
                return parse(text)
            except UserError as error:
                print(f"  {error}")
        if required and not self._yes:
            raise UserError(f"{flag} is required where nobody can be asked: {one_line(question)}")
        self.assumed.append(f"{flag} {default}" if default != "" else f"{flag} ''")
        return default

    def choose(
        self, question: str, options: Sequence[tuple[str, str]], flag: str, *, default: str, required: bool = False
    ) -> str:
        """Return the name of one of the `options`, (name, description) each, which are asked for by their numbers."""
        names = [name for name, _ in options]

        def parse(text: str) -> str:
            if text.isdecimal() and 1 <= int(text) <= len(names):
                return names[int(text) - 1]
            if text in names:
                return text
            raise UserError(f"expected a number from 1 to {len(names)}")

        if self.on_terminal:
            print(question)
            for number, (_, description) in enumerate(options, start=1):
                print(f"  {number}. {description}")
            question = "Number"
        answer = self.ask(
            question,
            str(names.index(default) + 1) if self.on_terminal else default,
            flag,
            parse,
            required=required,
        )
        return parse(answer)

    def confirm(self, question: str, flag: str) -> bool:
        """Return whether the answer is yes, which is the default. `flag` says so without being asked."""

        def parse(text: str) -> str:
            if text.lower() not in {"y", "yes", "n", "no"}:
                raise UserError("expected y or n")
            return text.lower()[0]

        if not self.on_terminal:
            self.assumed.append(flag)
            return True
        return self.ask(f"{question} (y/n)", "y", flag, parse) == "y"

    def report(self) -> None:
        """Print in one line what was assumed, if anything."""
        if self.assumed:
            why = "because of --yes" if self._yes else "as nobody can be asked here"
            print(f"assumed, {why}: {', '.join(self.assumed)}")


def whole_number(least: int, most: int = 10**7) -> Callable[[str], int]:
    """Return what reads a whole number in a range, and raises UserError for anything else."""

    def parse(text: str) -> int:
        plain = text.replace(",", "").replace("_", "")
        if not plain.isdecimal() or not least <= int(plain[:20]) <= most:
            raise UserError(f"found {text!r}, expected a whole number from {least} to {most:,}")
        return int(plain)

    return parse
