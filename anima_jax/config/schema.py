"""Base classes and types for the tables of a configuration: strict, frozen, without unknown keys; and types of paths.

Strict means that values have TOML's own types: `"1"` and `true` are not 1. But 1 is accepted where a float is expected,
and 1.0 or 1e6 where a whole number is.
"""

import functools
import math
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from anima_jax.assets import PACKAGE
from anima_jax.checkpoints.locations import check_address
from anima_jax.config.sizes import PIXEL_MULTIPLE, nearest_multiple
from anima_jax.errors import UserError, did_you_mean, show_value

Place = tuple[str | int, ...]
"""Path of a value in a TOML file: keys and list indices from the top."""

Dtype = Literal["bfloat16", "float16", "float32"]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


def whole_number(found: Any) -> Any:
    """Return a float without a fraction, such as 32.0 or 1e6, as the whole number; return other values unchanged."""
    return int(found) if isinstance(found, float) and found.is_integer() and abs(found) <= 2**64 else found


FromFloat = BeforeValidator(whole_number)
"""For whole numbers: 32.0 and 1e6 are whole too."""
Count = Annotated[int, Field(ge=1), FromFloat]
"""A whole number, at least 1."""
Whole = Annotated[int, Field(ge=0), FromFloat]
MOST, LARGEST, SMALLEST = 2**31 - 1, 1e18, 1e-30
"""Ranges of numbers: devices count in int32 and compute in float32, which also represents the square of `LARGEST`."""
Fraction = Annotated[float, Field(ge=0, le=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]


def documented_as(words: str) -> WithJsonSchema:
    """Return metadata that names an annotated type in the reference, where its Python type is not clear enough."""
    return WithJsonSchema({"type": words})


class Section(BaseModel):
    """One table of a TOML file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _representable(cls, value: Any, info: ValidationInfo) -> Any:
        """Return a value whose numbers the devices can represent; seeds have their own range."""
        for number in () if "seed" in (info.field_name or "") else _numbers(value):
            if isinstance(number, int) and abs(number) > MOST:
                raise invalid(f"found {show_value(number)}, expected at most {MOST}")
            if number and not SMALLEST <= abs(number) <= LARGEST:
                expected = f"a number from {SMALLEST:g} to {LARGEST:g} in size, or 0"
                raise invalid(f"found {show_value(number)}, expected {expected}")
        return value


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list | tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _numbers(each)


class TypedSection(Section):
    """A table whose `type` determines the meaning of its other keys. If it is wrong, nothing else is checked."""

    @model_validator(mode="before")
    @classmethod
    def _check_type_first(cls, table: Any) -> Any:
        found = table.get("type") if isinstance(table, Mapping) else None
        if not isinstance(found, str):
            return table
        types = typing.get_args(cls.model_fields["type"].annotation)
        if found.lower() not in types:
            raise invalid(f"found '{found}', expected {choices(types)}{did_you_mean(found, types)}", key="type")
        cls.check_keys(found.lower(), table)
        return {**table, "type": found.lower()}

    @classmethod
    def check_keys(cls, of_type: str, table: Mapping[str, Any]) -> None:
        """Raise an error for a key that this type does not have. By default every type has all keys."""


def invalid(message: str, *, key: str | None = None) -> PydanticCustomError:
    """Return the error to raise in a validator. The validator of a whole table names the wrong key with `key`."""
    return PydanticCustomError("invalid", "{message}", {"message": message, "key": key})


def only_one_of(*keys: str) -> AfterValidator:
    """Return a validator for a key that must not be set together with another of `keys`."""

    def check(value: Any, info: ValidationInfo) -> Any:
        others = [key for key in keys if key != info.field_name and info.data.get(key)]
        if value and others:
            raise invalid(f"{others[0]} is set too, expected at most one of {', '.join(keys)}")
        return value

    return AfterValidator(check)


def expecting(words: str) -> WrapValidator:
    """Return a validator that reports one error for a union, instead of one for each of its types."""

    def check(found: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(found)
        except ValidationError:
            near = did_you_mean(found, re.findall(r"'(\w+)'", words)) if isinstance(found, str) else ""
            raise invalid(f"found {found!r}, expected {words}{near}") from None

    return WrapValidator(check)


def choices(values: tuple[Any, ...]) -> str:
    """Return the values as text: `'a', 'b' or 'c'`."""
    *others, last = [f"'{value}'" if isinstance(value, str) else str(value) for value in values]
    return f"{', '.join(others)} or {last}" if others else last


def multiple_of_16(pixels: int) -> int:
    """Return `pixels`, or raise an error that names the nearest multiple of 16 if it is not one."""
    if pixels % PIXEL_MULTIPLE:
        nearest = nearest_multiple(pixels)
        raise invalid(f"found {pixels}, expected a multiple of {PIXEL_MULTIPLE} (the nearest is {nearest})")
    return pixels


PixelSide = Annotated[
    int,
    Field(ge=PIXEL_MULTIPLE),
    FromFloat,
    AfterValidator(multiple_of_16),
    documented_as("whole number, a multiple of 16"),
]


@functools.cache
def key_table(section: type[BaseModel]) -> Mapping[str, Mapping[str, Any]]:
    """Return dotted key → JSON schema, for a section and the tables in it, in order of declaration.

    Each schema also says whether the key is `required`, and has the JSON schema of its `table` (None if it is not a
    table).
    """
    root = section.model_json_schema()

    def keys_of(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for key, node in table["properties"].items():
            references = [
                part["$ref"] for part in (node, node.get("items", {}), *node.get("anyOf", ())) if "$ref" in part
            ]
            inner = root["$defs"][references[0].split("/")[-1]] if references else None
            yield prefix + key, {**node, "required": key in table.get("required", ()), "table": inner}
            if inner:
                yield from keys_of(inner, f"{prefix}{key}.")

    return dict(keys_of(root, ""))


# Paths: strings, absolute once validated. Addresses (gs://, hf://) stay unchanged.


def is_address(path: str) -> bool:
    """Return whether `path` is a remote address (`hf://…`, `gs://…`). Addresses are not checked here."""
    return "://" in path


def resolve(path: str, folder: str | os.PathLike[str] | None = None) -> tuple[str, ...]:
    """Return the absolute paths that `path` may mean: from the current directory, then from the TOML's `folder`.

    A path that begins with `anima_jax` may also be that of a file in this package, wherever it is installed.
    """
    if is_address(path):
        return (path,)
    roots = [Path.cwd(), *([Path(folder).absolute()] if folder is not None else [])]
    if Path(path).parts[:1] == (PACKAGE.name,):
        roots.append(PACKAGE.parent)
    return tuple(dict.fromkeys(os.path.normpath(root / Path(path).expanduser()) for root in roots))


def check_escapes(path: str) -> None:
    """Raise an error for a path with what a backslash makes in double quotes: `"C:\new"` has a line end."""
    if any(character in "\b\t\n\f\r" for character in path):
        raise invalid(
            f"found {path!r}: a backslash in double quotes begins an escape, expected a path in single quotes, as "
            r"'C:\Users\me'"
        )


def resolver(what: str, exists: Callable[[str], bool]) -> Callable[[str, ValidationInfo], str]:
    """Return a function that returns the first path that a path may mean that passes `exists`, a test for `what`."""

    def check(path: str, info: ValidationInfo) -> str:
        if not path:
            raise invalid(f"found an empty path, expected {what}")
        check_escapes(path)
        try:
            check_address(path, is_file=exists is not os.path.isdir)
        except UserError as error:
            raise invalid(str(error)) from None
        candidates = resolve(path, (info.context or {}).get("folder"))
        for candidate in candidates:
            if is_address(candidate) or exists(candidate):
                return candidate
        for candidate in candidates:
            if os.path.exists(candidate):
                kind = "a folder" if os.path.isdir(candidate) else "a file"
                raise invalid(f"{candidate} is {kind}, expected {what}")
        raise invalid(f"expected {what}, found nothing at {' or at '.join(candidates)}")

    return check


def existing(what: str, exists: Callable[[str], bool]) -> AfterValidator:
    """Return a validator that replaces a path by that of `resolver`."""
    return AfterValidator(resolver(what, exists))


def on_this_machine(path: str | None) -> str | None:
    """Return `path`, or raise an error if it is a remote address."""
    if path and is_address(path):
        raise invalid(f"found {path}, expected a path on this machine")
    return path


def output_folder(path: str) -> str:
    """Return the absolute path of an output folder, which may not exist yet."""
    if not path:
        raise invalid("found an empty path, expected a folder to write to")
    check_escapes(path)
    try:
        check_address(path, is_file=False, is_output=True)
    except UserError as error:
        raise invalid(str(error)) from None
    (folder,) = resolve(path)
    if not is_address(folder) and os.path.lexists(folder) and not os.path.isdir(folder):
        raise invalid(f"{folder} is a file, expected a folder to write to")
    return folder


def file_name(name: str) -> str:
    """Return a name for a file without its ending `.safetensors`, or raise an error if no file can have the name."""
    name = name.removesuffix(".safetensors")
    if not name.strip(" .") or name.startswith(".") or re.search(r'[\x00-\x1f<>:"/\\|?*]', name):
        raise invalid(f"found {name!r}, expected the name of a file, without a folder")
    if len(name.encode()) > 200:
        raise invalid(f"found a name of {len(name.encode())} bytes, expected at most 200")
    return name


FileName = Annotated[str, AfterValidator(file_name), documented_as("text")]
InputFile = Annotated[str, existing("a file", os.path.isfile), documented_as("file")]
InputFolder = Annotated[str, existing("a folder", os.path.isdir), documented_as("folder")]
LocalFile = Annotated[InputFile, AfterValidator(on_this_machine)]
OutputFolder = Annotated[str, AfterValidator(output_folder), documented_as("folder")]

Listed = Field(strict=False)
"""For tuples: a TOML array is a Python list, which strict validation would reject."""


def _not_empty(values: tuple[Any, ...]) -> tuple[Any, ...]:
    # Not `min_length`: pydantic counts only valid values, and would report a list of one invalid value as empty too.
    if not values:
        raise invalid("found an empty list, expected at least one value")
    return values


NotEmpty = AfterValidator(_not_empty)
"""For tuples that need at least one value."""


def shares(names: tuple[str, ...], example: str) -> AfterValidator:
    """Return a validator of a table of weights, each of at least 0: name → float, of all `names`."""

    def check(found: Any) -> dict[str, float] | None:
        if not isinstance(found, dict):
            raise invalid(f"found {found!r}, expected a table, as in {example}")
        for name, weight in found.items():
            if name not in names:
                raise invalid(f"found '{name}', expected {choices(names)}{did_you_mean(str(name), names)}")
            if type(weight) not in {int, float} or not 0 <= weight < math.inf:
                raise invalid(f"found {weight!r} for '{name}', expected a number of at least 0")
        if not 0 < sum(found.values()) < math.inf:
            raise invalid(f"found {found!r}, expected at least one weight above 0")
        return {name: float(found.get(name, 0)) for name in names}

    return AfterValidator(check)
