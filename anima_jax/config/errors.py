"""From what pydantic found to lines for the user: `file: dotted.key: what was found, what was expected`."""

import dataclasses
import datetime
import json
from collections.abc import Callable, Collection, Iterator
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from anima_jax.config.schema import key_table
from anima_jax.errors import did_you_mean

Place = tuple[str | int, ...]
"""Keys and list positions from the top of a file to a value."""

EXPECTED: dict[str, str] = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a string",
    "model_type": "a table",
    "tuple_type": "a list",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "string_too_short": "at least {min_length} character",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "literal_error": "{expected}",
}
"""What was expected, by pydantic's type of error and its context."""

KINDS: tuple[tuple[type, str], ...] = (
    (bool, "a boolean"),
    (int, "a whole number"),
    (float, "a number"),
    (str, "a string"),
    (dict, "a table"),
    (list, "a list"),
    (datetime.date, "a date"),
    (datetime.time, "a time"),
)
MAX_SHOWN = 60


@dataclasses.dataclass(frozen=True)
class File:
    """A TOML file as messages see it."""

    name: str
    schema: type[BaseModel]
    foreign: Collection[str]
    """Dotted keys that are known although the schema has none of them; wanted for "did you mean" alone."""
    from_command_line: Collection[str] = ()
    """Dotted keys that `--set` gave."""
    rename: Callable[[Place], Place] = lambda place: place
    """From the place where the schema sees a value to the place where the file has it."""

    def line(self, place: Place, message: str) -> str:
        """A fault, or a note, about one key of this file."""
        key = dotted(place)
        given = any(key == given or key.startswith((f"{given}.", f"{given}[")) for given in self.from_command_line)
        return f"{'--set' if given else self.name}: {key}: {message}" if key else f"{self.name}: {message}"

    def lines(self, error: ValidationError) -> Iterator[str]:
        """All faults of a validation, each on one line."""
        for details in error.errors(include_url=False):
            if details["type"] != "default_factory_not_called":  # the value that it follows from is at fault already
                key = details.get("ctx", {}).get("key")
                place = self.rename((*details["loc"], *([key] if key else [])))
                yield self.line(place, self._message(details, place))

    def _message(self, details: ErrorDetails, place: Place) -> str:
        kind, found, context = details["type"], details["input"], details.get("ctx", {})
        if kind == "fault":
            return context["message"]
        if kind == "extra_forbidden":
            return f"unknown key{self.suggestion(place)}"
        if kind == "missing":
            description = key_table(self.schema)[_without_positions(details["loc"])].description
            return f"missing, expected {description}"
        if kind == "literal_error":
            hint = did_you_mean(found, _literals(context["expected"])) if isinstance(found, str) else ""
            return f"found {shown(found)}, expected {context['expected']}{hint}"
        expected = EXPECTED[kind].format(**context) if kind in EXPECTED else details["msg"]
        return f"found {shown(found)}, expected {expected}"

    def suggestion(self, place: Place) -> str:
        """The nearest key of the same table, or the same key of another one."""
        *above, last = _without_positions(place).split(".")
        known = [*key_table(self.schema), *self.foreign]
        prefix = ".".join([*above, ""]) if above else ""
        siblings = [key.removeprefix(prefix) for key in known if key.startswith(prefix)]
        near = did_you_mean(last, [key for key in siblings if "." not in key])
        elsewhere = [key for key in known if key.split(".")[-1] == last]
        return f" (did you mean '{elsewhere[0]}'?)" if elsewhere and not near else near


def dotted(place: Place) -> str:
    """`directory[0].path`, as a user counts: TOML's own dots, list positions in brackets."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".")


def shown(value: Any) -> str:
    """A TOML value and its type, cut short where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, dict) else "{…}"
    short = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
    kind = next((name for kind, name in KINDS if isinstance(value, kind)), "a value")
    return f"{short} ({kind})"


def _without_positions(place: Place) -> str:
    return ".".join(part for part in place if isinstance(part, str))


def _literals(expected: str) -> list[str]:
    return [word.strip(" '") for word in expected.replace(" or ", ",").split(",")]
