"""What every table of a configuration has in common: strict, frozen, no key unknown; and the kinds of path.

Strict means TOML's own types: `"1"` and `true` are not 1, but 1 is a float where a float is wanted.
"""

import dataclasses
import os
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import annotated_types
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from anima_jax.config.sizes import PIXEL_MULTIPLE, nearest_multiple
from anima_jax.errors import did_you_mean

Dtype = Literal["bfloat16", "float16", "float32"]
Positive = Annotated[float, annotated_types.Gt(0)]
NotNegative = Annotated[float, annotated_types.Ge(0)]
Count = Annotated[int, annotated_types.Ge(1)]
"""A whole number, at least 1."""
Whole = Annotated[int, annotated_types.Ge(0)]


@dataclasses.dataclass(frozen=True)
class Words:
    """Metadata of an annotated type: how the reference names it, where its Python type does not say it."""

    text: str


class Section(BaseModel):
    """One table of a TOML file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TypedSection(Section):
    """A table whose `type` decides what its other keys mean: with a wrong one nothing else is looked at."""

    TYPES: ClassVar[tuple[str, ...]]

    @model_validator(mode="before")
    @classmethod
    def _type_first(cls, table: Any) -> Any:
        found = table.get("type") if isinstance(table, Mapping) else None
        if not isinstance(found, str):
            return table
        if found.lower() not in cls.TYPES:
            hint = did_you_mean(found, cls.TYPES)
            raise fault(f"found '{found}', expected {choices(cls.TYPES)}{hint}", key="type")
        return {**table, "type": found.lower()}


def fault(message: str, *, key: str | None = None) -> PydanticCustomError:
    """A fault to raise in a validator; `key` names the key inside the table where the validator is the table's."""
    return PydanticCustomError("fault", "{message}", {"message": message, "key": key})


def not_yet(what: str, hint: str = "") -> str:
    """The answer to what diffusion-pipe does and this version does not."""
    return f"{what} is not carried out yet by this version{f'; {hint}' if hint else ''}"


def choices(values: tuple[Any, ...]) -> str:
    """`'a', 'b' or 'c'`."""
    *others, last = [f"'{value}'" if isinstance(value, str) else str(value) for value in values]
    return f"{', '.join(others)} or {last}" if others else last


def multiple_of_16(pixels: int) -> int:
    """A side in pixels, or a fault that names the nearest side that will do."""
    if pixels % PIXEL_MULTIPLE:
        nearest = nearest_multiple(pixels)
        raise fault(f"found {pixels}, expected a multiple of {PIXEL_MULTIPLE} (the nearest is {nearest})")
    return pixels


PixelSide = Annotated[
    int, annotated_types.Ge(PIXEL_MULTIPLE), AfterValidator(multiple_of_16), Words("whole number, a multiple of 16")
]


def key_table(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """Dotted key → field of a section and the sections in it, in order of declaration: what the reference lists."""
    table: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        table[name] = field
        for inner in sections_in(field.annotation):
            table |= {f"{name}.{key}": value for key, value in key_table(inner).items()}
    return table


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field of this type holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in typing.get_args(annotation) for found in sections_in(argument)]


# ---- paths: strings, absolute once validated; addresses (gs://, hf://) stay as they are --------------------------


def is_address(path: str) -> bool:
    """Whether `path` is an address (`hf://…`, `gs://…`), which nothing here looks into."""
    return "://" in path


def resolve(path: str, folder: str | os.PathLike[str] | None = None) -> tuple[str, ...]:
    """The absolute paths that `path` may mean: from the current directory, then from `folder` (the TOML's own)."""
    if is_address(path):
        return (path,)
    roots = [Path.cwd(), *([Path(folder).absolute()] if folder is not None else [])]
    return tuple(dict.fromkeys(os.path.normpath(root / Path(path).expanduser()) for root in roots))


def existing(path: str, info: ValidationInfo, is_there: Callable[[str], bool], what: str) -> str:
    """The first of the paths that `path` may mean at which there is what is wanted, or a fault that names them all."""
    if not path:
        raise fault(f"found an empty path, expected {what}")
    candidates = resolve(path, (info.context or {}).get("folder"))
    for candidate in candidates:
        if is_address(candidate) or is_there(candidate):
            return candidate
    for candidate in candidates:
        if os.path.exists(candidate):
            kind = "a folder" if os.path.isdir(candidate) else "a file"
            raise fault(f"{candidate} is {kind}, expected {what}")
    raise fault(f"{what} is expected, but none is at {' nor at '.join(candidates)}")


def _input_file(path: str, info: ValidationInfo) -> str:
    return existing(path, info, os.path.isfile, "a file")


def _input_folder(path: str, info: ValidationInfo) -> str:
    return existing(path, info, os.path.isdir, "a folder")


def _not_an_address(path: str) -> str:
    if is_address(path):
        raise fault(f"found {path}, expected a file on this machine")
    return path


def output_folder(path: str) -> str:
    """The absolute path of a folder to write to, which need not be there yet."""
    if not path:
        raise fault("found an empty path, expected a folder to write to")
    if path.startswith("hf://"):
        raise fault(f"found {path}, expected a local folder or gs://, which can be written to")
    (folder,) = resolve(path)
    if not is_address(folder) and os.path.lexists(folder) and not os.path.isdir(folder):
        raise fault(f"{folder} is a file, expected a folder to write to")
    return folder


InputFile = Annotated[str, AfterValidator(_input_file), Words("file")]
InputFolder = Annotated[str, AfterValidator(_input_folder), Words("folder")]
LocalFile = Annotated[InputFile, AfterValidator(_not_an_address)]
OutputFolder = Annotated[str, AfterValidator(output_folder), Words("folder")]

Listed = Field(strict=False)
"""For tuples: a TOML array is a Python list, which strict validation would refuse."""


def _some(values: tuple[Any, ...]) -> tuple[Any, ...]:
    # Not `min_length`: pydantic counts only the valid ones, and would call a list of one fault empty too.
    if not values:
        raise fault("found an empty list, expected at least one value")
    return values


NotEmpty = AfterValidator(_some)
"""For tuples of at least one value."""
