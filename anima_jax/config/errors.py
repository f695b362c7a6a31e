"""Pydantic's errors as lines for the user: `file: dotted.key: what was found, what was expected`."""

import datetime
import difflib
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from anima_jax.config import other_trainers
from anima_jax.config.schema import Place, key_table
from anima_jax.config.unsupported_keys import Answer, Unsupported, set_aside
from anima_jax.errors import did_you_mean

SectionT = TypeVar("SectionT", bound=BaseModel)

EXPECTED: Mapping[str, str] = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a string",
    "model_type": "a table",
    "dict_type": "a table",
    "tuple_type": "a list",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "string_too_short": "at least {min_length} character",
    "literal_error": "{expected}",
}
"""Pydantic error type → what was expected, formatted with the error's context."""

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

BELONGS_ABOVE = "it belongs at the top of the file, above every [table]"


IN_DIRECTORY = "it belongs at the top of the file, for all folders, or in a [[directory]]"


class TomlFile:
    """A TOML file during validation, with its errors and messages.

    `other_keys` are dotted keys outside the schema that "did you mean" also suggests. `place_in_file` maps a value's
    place in the schema to its place in the file. `other_file` has the keys of the other TOML of a configuration, and
    what it is called.
    """

    def __init__(
        self,
        name: str,
        schema: type[BaseModel],
        other_keys: Collection[str],
        place_in_file: Callable[[Place], Place] = lambda place: place,
        other_file: tuple[str, Collection[str]] = ("", ()),
    ):
        self.name, self.place_in_file, self._other_file = name, place_in_file, other_file
        self._keys = key_table(schema)
        self._known = [*self._keys, *(key for key in other_keys if "*" not in key)]
        self._taken: dict[str, Place] = {}
        """Dotted key → the place of the key of a fork that was taken as it."""
        self.from_command_line: list[str] = []
        """Dotted keys that were set with `--set`."""
        self.errors: list[str] = []
        self.messages: list[str] = []

    def error(self, place: Place, text: str) -> None:
        self.errors.append(self._line(place, text))

    def message(self, place: Place, text: str) -> None:
        self.messages.append(self._line(place, text))

    def set_aside(
        self,
        table: dict[str, Any],
        rows: Mapping[str, Unsupported],
        at: Place = (),
        elsewhere: dict[str, Any] | None = None,
    ) -> None:
        """Answer the keys of forks in `table`, which is at place `at`: see `unsupported_keys.set_aside`."""
        self.tell(set_aside(table, rows, elsewhere), at)

    def tell(self, answers: Iterable[Answer], at: Place = ()) -> None:
        """Record an error or a message for each answer. Errors in the key that it set will name the key of the file."""
        for answer in answers:
            (self.error if answer.is_error else self.message)((*at, *answer.path), answer.text)
            if answer.target:
                self._taken[dotted((*at, *answer.target.split(".")))] = (*at, *answer.path)

    def refuse_other_trainers(self, table: dict[str, Any]) -> None:
        """Answer the keys of sd-scripts and the like with ours, as errors, and remove them from `table`."""
        own: dict[str, Any] = {}
        for key in [*self._keys, *(key for key in self._known if "." not in key)]:
            inner = own
            for part in key.split("."):
                inner = inner.setdefault(part, {})
        own_name = "the main TOML" if "dataset" in self._other_file[0] else "the dataset TOML"
        for place, text in other_trainers.answers(table, own):
            here = f"; {text.replace(f' in {own_name}', '')}" if text else self.suggestion(place)
            self.error(place, f"unknown key{here}")

    def validate(self, table: Mapping[str, Any], schema: type[SectionT], context: Mapping[str, Any]) -> SectionT | None:
        """Return the validated table, or record its errors and return None. Paths may be relative to the file."""
        try:
            return schema.model_validate(table, context={**context, "folder": os.path.dirname(self.name)})
        except ValidationError as error:
            for details in error.errors(include_url=False):
                # This error is only a consequence: the value that a default is derived from is invalid.
                if details["type"] != "default_factory_not_called":
                    key = details.get("ctx", {}).get("key")
                    place = self.place_in_file((*_written(details["loc"], table), *([key] if key else [])))
                    self.error(place, self._text(details, place))
            return None

    def suggestion(self, place: Place) -> str:
        """Return where the key belongs, or ` (did you mean '…'?)` with the nearest key of the table, or ""."""
        *above, last = _without_positions(place).split(".")
        prefix = ".".join([*above, ""]) if above else ""
        siblings = [key.removeprefix(prefix) for key in self._known if key.startswith(prefix)]
        elsewhere = [key for key in self._known if key.split(".")[-1] == last]
        twins = difflib.get_close_matches(last, siblings, n=1, cutoff=0.87)  # seed in [sample] means its seeds
        if last in self._known and above and not twins:
            return f"; {IN_DIRECTORY if f'directory.{last}' in elsewhere else BELONGS_ABOVE}"
        name, keys = self._other_file
        if last in keys and not elsewhere:
            return f"; it belongs in {name}"
        near = did_you_mean(last, [key for key in siblings if "." not in key])
        return f" (did you mean '{elsewhere[0]}'?)" if elsewhere and not (near and twins) else near

    def _line(self, place: Place, text: str) -> str:
        key = dotted(place)
        taken = next((of for of in self._taken if _is_in(key, of)), None)
        if taken is not None and self._taken[taken] != place:
            text, key = f"as {key}: {text}", dotted(self._taken[taken])
        overridden = any(_is_in(key, one) for one in self.from_command_line)
        return f"{'--set' if overridden else self.name}: {key}: {text}" if key else f"{self.name}: {text}"

    def _text(self, details: ErrorDetails, place: Place) -> str:
        kind, found, context = details["type"], details["input"], details.get("ctx", {})
        if kind == "invalid":
            return context["message"]
        if kind == "extra_forbidden":
            return f"unknown key{self.suggestion(place)}"
        if kind == "missing":
            meaning = self._keys[_without_positions(details["loc"])]["description"]
            return f"missing, expected {meaning.partition('. ')[0]}"
        expected = EXPECTED[kind].format(**context) if kind in EXPECTED else details["msg"]
        if kind == "tuple_type" and isinstance(found, dict):
            expected += f": write [[{place[-1]}]], with two brackets"
        if kind == "model_type" and isinstance(found, str):
            expected += f", [{dotted(place)}]" + (
                f", with type = {found!r} in it" if f"{dotted(place)}.type" in self._keys else ""
            )
        literals = [word.strip(" '") for word in context.get("expected", "").replace(" or ", ",").split(",")]
        near = did_you_mean(found, literals) if isinstance(found, str) else ""
        return f"found {shown(found)}, expected {expected}{near}"


def _written(place: Place, table: Any) -> Place:
    """Return the part of a place that the table has: one text may stand for a list with an item for each of many."""
    for depth, part in enumerate(place):
        if isinstance(table, str):
            return place[:depth]
        if isinstance(table, list):
            table = dict(enumerate(table))
        table = table.get(part) if isinstance(table, Mapping) else None
    return place


def _is_in(key: str, table: str) -> bool:
    """Return whether a dotted key is `table` or stands in it."""
    return key == table or key.startswith((f"{table}.", f"{table}["))


def dotted(place: Place) -> str:
    """Return a place as text, such as `directory[0].path`: keys joined by dots, list indices in brackets."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def shown(value: Any) -> str:
    """Return a TOML value and its type as text, truncated if it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, dict) else "{…}"
    short = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
    return f"{short} ({next((name for kind, name in KINDS if isinstance(value, kind)), 'a value')})"


def _without_positions(place: Place) -> str:
    return ".".join(part for part in place if isinstance(part, str))
