"""Read a main TOML and the dataset TOML that it names; every fault of both in one error."""

import contextlib
import datetime
import os
import tomllib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from anima_jax.config import dataset as dataset_file
from anima_jax.config import unsupported_keys
from anima_jax.config.dataset import DatasetConfig
from anima_jax.config.errors import File, Place
from anima_jax.config.main import EVAL_EVERY, MainConfig, MainFile
from anima_jax.config.optimizer import OptimizerConfig
from anima_jax.config.schema import resolve
from anima_jax.config.sections import EvalDataset
from anima_jax.errors import UserError, os_reason

SectionT = TypeVar("SectionT", bound=BaseModel)


def load_config(
    path: str | os.PathLike[str],
    overrides: Iterable[str] = (),
    *,
    i_know_what_i_am_doing: bool = False,
    check_optimizer: Callable[[OptimizerConfig], None] = lambda _: None,
) -> MainConfig:
    """The configuration in the main TOML at `path` and in the dataset TOML that it names.

    `overrides` are `key.sub=value` as `--set` gives them: the value is TOML, or else a plain string. Relative paths are
    looked up from the current directory, then from the folder of the TOML that names them; input files must exist.
    `i_know_what_i_am_doing` allows any number of resolutions, as the flag of that name does. `check_optimizer` raises
    UserError for what the optimizer itself does not take.
    Raises UserError with one line a fault, all faults of both files at once.
    """
    name = os.fspath(path)
    faults: list[str] = []
    notes: list[str] = []
    table = read_toml(name)
    given = []
    for override in overrides:
        try:
            given.append(_override(table, override))
        except UserError as error:
            faults += error.messages
    main = _main_file(name, table, given, faults, notes)
    with contextlib.suppress(ValidationError):  # whose faults are among those of the whole file
        try:
            check_optimizer(OptimizerConfig.model_validate(table.get("optimizer")))
        except UserError as error:
            faults += [f"{name}: {fault}" for fault in error.messages]
    model = table.get("model")
    settings = {
        "i_know_what_i_am_doing": i_know_what_i_am_doing,
        "cached_text": not (isinstance(model, dict) and model.get("cache_text_embeddings") is False),
    }
    data = _dataset_of(name, table.get("dataset"), settings, faults, notes)
    paths = _eval_paths(table.get("eval_datasets"))
    eval_data = [_dataset_of(name, path, settings, faults, notes) for path in paths]
    if faults or main is None or data is None:
        raise UserError(*dict.fromkeys(faults))
    if main.eval_datasets and not any(getattr(main, key) for key in EVAL_EVERY):
        notes.append(f"{name}: eval_datasets: used before the first step alone: no {EVAL_EVERY[0]} or the like is set")
    keys = {key: getattr(main, key) for key in MainFile.model_fields}
    keys["eval_datasets"] = tuple(
        EvalDataset(file.name, file.config, data)
        for file, data in zip(main.eval_datasets, eval_data, strict=True)
        if data
    )
    return MainConfig.model_construct(
        main.model_fields_set, **keys, data=data, path=os.path.abspath(name), notes=tuple(dict.fromkeys(notes))
    )


def load_dataset(
    path: str | os.PathLike[str], *, i_know_what_i_am_doing: bool = False
) -> tuple[DatasetConfig, tuple[str, ...]]:
    """A dataset TOML alone, and the notes on it. Raises UserError as `load_config` does."""
    faults: list[str] = []
    notes: list[str] = []
    config = _dataset_file(os.fspath(path), {"i_know_what_i_am_doing": i_know_what_i_am_doing}, faults, notes)
    if faults or config is None:
        raise UserError(*dict.fromkeys(faults))
    return config, tuple(notes)


def read_toml(path: str) -> dict[str, Any]:
    """The table in a TOML file, UTF-8 with or without byte order mark. Raises UserError with line and column."""
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder, expected a TOML file")
    try:
        with open(path, "rb") as file:
            text = file.read().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file (looked for {os.path.abspath(path)})") from error
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise UserError(f"{path}: {found}, expected UTF-8 text; save the file as UTF-8") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {os_reason(error)}") from error
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid TOML: {error}") from error


def _main_file(
    name: str, table: dict[str, Any], given: list[str], faults: list[str], notes: list[str]
) -> MainFile | None:
    known = [f"{section}.{key}".lstrip(".") for section, rows in unsupported_keys.SECTIONS.items() for key in rows]
    file = File(name, MainFile, known, given)
    for section, rows in unsupported_keys.SECTIONS.items():
        inner = table.get(section) if section else table
        if isinstance(inner, dict):
            _set_aside(file, inner, rows, (section,) if section else (), faults, notes)
    return _validated(file, table, MainFile, faults)


def _eval_paths(entries: Any) -> list[Any]:
    """The dataset TOML that each of `eval_datasets` names; whatever is no path is the main TOML's fault."""
    entries = entries if isinstance(entries, list) else []
    return [entry.get("config") if isinstance(entry, dict) else entry for entry in entries]


def _dataset_of(
    main: str, path: Any, settings: dict[str, bool], faults: list[str], notes: list[str]
) -> DatasetConfig | None:
    """The dataset TOML that the main TOML names, if it does and it is there; if not, that is the main TOML's fault."""
    candidates = resolve(path, os.path.dirname(main)) if isinstance(path, str) and path else ()
    found = next((candidate for candidate in candidates if os.path.isfile(candidate)), None)
    return _dataset_file(found, settings, faults, notes) if found else None


def _dataset_file(name: str, settings: dict[str, bool], faults: list[str], notes: list[str]) -> DatasetConfig | None:
    """A dataset TOML; `settings` are what its validators ask of the world outside it."""
    try:
        table = read_toml(name)
    except UserError as error:
        faults += error.messages
        return None

    def place_in_file(place: Place) -> Place:
        """A shared key that a source does not set itself stands, or is missing, at the top."""
        match place:
            case (str(kind), int(index), str(key), *rest) if key in dataset_file.SHARED_KEYS:
                return place if key in table[kind][index] else (key, *rest)
        return place

    known = [*unsupported_keys.DATASET, *dataset_file.SHARED_KEYS]
    known += [f"{kind}.{key}" for kind in dataset_file.SOURCES for key in unsupported_keys.DATASET]
    file = File(name, DatasetConfig, known, rename=place_in_file)
    # Without a single [[directory]] nothing at the top can be for one.
    _set_aside(
        file,
        table,
        unsupported_keys.DATASET | ({} if "directory" in table else unsupported_keys.TFDS),
        (),
        faults,
        notes,
    )
    for kind in dataset_file.SOURCES:
        entries = table.get(kind)
        rows = unsupported_keys.DATASET | (unsupported_keys.TFDS if kind == "tfds" else {})
        for index, entry in enumerate(entries if isinstance(entries, list) else []):
            if isinstance(entry, dict):
                _set_aside(file, entry, rows, (kind, index), faults, notes)
    config = _validated(file, dataset_file.hand_down(table), DatasetConfig, faults, **settings)
    if config:
        notes += _remarks(file, config)
    notes[:] = dict.fromkeys(notes)
    return config


def _remarks(file: File, config: DatasetConfig) -> Iterable[str]:
    """What every source that a key is for has to say of it."""
    said: dict[Place, set[str]] = {}
    for kind in dataset_file.SOURCES:
        for index, source in enumerate(getattr(config, kind)):
            messages = source.messages
            for key in type(source).model_fields:
                if key in source.model_fields_set:
                    said.setdefault(file.rename((kind, index, key)), set()).add(messages.get(key, ""))
    for place, texts in said.items():
        text, *others = texts
        if text and not others:
            yield file.line(place, text)


def _set_aside(file: File, table: dict[str, Any], rows: Any, above: Place, faults: list[str], notes: list[str]) -> None:
    for key, answer, is_fault in unsupported_keys.set_aside(table, rows):
        (faults if is_fault else notes).append(file.line((*above, key), answer))


def _validated(
    file: File, table: dict[str, Any], schema: type[SectionT], faults: list[str], **settings: bool
) -> SectionT | None:
    try:
        return schema.model_validate(table, context={"folder": os.path.dirname(file.name), **settings})
    except ValidationError as error:
        faults += file.lines(error)
        return None


def _override(table: dict[str, Any], override: str) -> str:
    """Put one `key.sub=value` into `table`; the dotted key of the topmost thing that was not there before."""
    key, equals, value = override.partition("=")
    *above, last = parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise UserError(f"--set: found {override!r}, expected key=value, as in optimizer.lr=1e-4")
    created = len(parts)
    for depth, part in enumerate(above, start=1):
        if part not in table:
            created = min(created, depth)
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise UserError(f"--set: {key.strip()}: {'.'.join(parts[:depth])} is not a table")
    table[last] = _toml_value(value.strip())
    return ".".join(parts[:created])


def _toml_value(text: str) -> Any:
    """The TOML value that `text` is, or `text` itself: a bare word needs no quotes."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    value = parsed["value"]
    return text if len(parsed) > 1 or isinstance(value, datetime.date | datetime.time) else value
