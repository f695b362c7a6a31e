"""Loader of a main TOML and the dataset TOMLs that it names. All errors of all files are reported at once."""

import contextlib
import datetime
import os
import tomllib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pydantic import ValidationError

from anima_jax.config import unsupported_keys
from anima_jax.config.dataset import SHARED_KEYS, SOURCES, DatasetConfig, apply_shared_keys
from anima_jax.config.errors import Place, TomlFile
from anima_jax.config.main import EVAL_EVERY, MainConfig
from anima_jax.config.optimizer import OptimizerConfig
from anima_jax.config.schema import resolve
from anima_jax.errors import UserError, os_reason


def load_config(
    path: str | os.PathLike[str],
    overrides: Iterable[str] = (),
    *,
    i_know_what_i_am_doing: bool = False,
    check_optimizer: Callable[[OptimizerConfig], None] = lambda _: None,
) -> MainConfig:
    """Load the configuration from the main TOML at `path` and the dataset TOMLs that it names.

    `overrides` are `key.sub=value` as in `--set`; a value that is not valid TOML is a plain string. Relative paths are
    resolved against the current directory, then against the folder of the TOML that names them; input files must exist.
    `i_know_what_i_am_doing` allows any number of resolutions, like the flag of the same name. `check_optimizer` raises
    UserError for arguments that the optimizer does not accept.
    Raises UserError with one line for each error in any of the files.
    """
    main = TomlFile(os.fspath(path), MainConfig, unsupported_keys.MAIN)
    table = read_toml(main.name)
    for override in overrides:
        try:
            main.from_command_line.append(_override(table, override))
        except UserError as error:
            main.errors += error.messages
    main.set_aside(table, unsupported_keys.MAIN)
    model = table.get("model")
    context = {
        "i_know_what_i_am_doing": i_know_what_i_am_doing,
        "cached_text": not (isinstance(model, dict) and model.get("cache_text_embeddings") is False),
    }
    files = [main]

    def dataset_at(named: Any) -> DatasetConfig | None:
        """Load a dataset TOML. Return None if it does not exist (validation reports this) or has errors."""
        candidates = resolve(named, os.path.dirname(main.name)) if isinstance(named, str) and named else ()
        found = next(filter(os.path.isfile, candidates), None)
        if found is None:
            return None
        file, data = _load_dataset(found, context)
        files.append(file)
        return data

    data = dataset_at(table.get("dataset"))
    eval_datasets = table.get("eval_datasets")
    if isinstance(eval_datasets, list):
        eval_datasets[:] = [{"config": entry} if isinstance(entry, str) else entry for entry in eval_datasets]
        for index, entry in enumerate(eval_datasets):
            if isinstance(entry, dict):
                _add_loaded(main, entry, ("eval_datasets", index), {"data": dataset_at(entry.get("config"))})
    if eval_datasets and not any(map(table.get, EVAL_EVERY)):
        main.message(
            ("eval_datasets",), f"used only before the first step: neither {EVAL_EVERY[0]} nor the like is set"
        )
    messages = tuple(dict.fromkeys(message for file in files for message in file.messages))
    _add_loaded(main, table, (), {"data": data, "path": os.path.abspath(main.name), "messages": messages})
    config = main.validate(table, MainConfig, context)
    with contextlib.suppress(ValidationError):  # these errors are already among those of the whole file
        try:
            check_optimizer(OptimizerConfig.model_validate(table.get("optimizer")))
        except UserError as error:
            main.errors += [f"{main.name}: {text}" for text in error.messages]
    errors = dict.fromkeys(error for file in files for error in file.errors)
    if errors or config is None:
        raise UserError(*errors)
    return config


def read_toml(path: str) -> dict[str, Any]:
    """Read a TOML file, UTF-8 with or without byte order mark. Raises UserError; syntax errors name line and column."""
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


def _add_loaded(file: TomlFile, table: dict[str, Any], at: Place, loaded: dict[str, Any]) -> None:
    """Add the values loaded for a table to it. It is an error if the file itself sets one of their keys."""
    for key in loaded:
        if key in table:
            file.error((*at, key), f"unknown key{file.suggestion((*at, key))}")
    table |= loaded


def _load_dataset(name: str, context: dict[str, bool]) -> tuple[TomlFile, DatasetConfig | None]:
    """Load a dataset TOML; the configuration is None if the file has errors. `context` is passed to the validators."""
    table: dict[str, Any] = {}

    def place_in_file(place: Place) -> Place:
        """Return the top-level place of a shared key that a source does not set itself; other places unchanged."""
        match place:
            case (str(kind), int(index), str(key), *rest) if key in SHARED_KEYS:
                return place if key in table[kind][index] else (key, *rest)
        return place

    known = [*unsupported_keys.DATASET, *SHARED_KEYS]
    known += [f"{kind}.{key}" for kind in SOURCES for key in unsupported_keys.DATASET]
    file = TomlFile(name, DatasetConfig, known, place_in_file)
    try:
        table |= read_toml(name)
    except UserError as error:
        file.errors += error.messages
        return file, None
    # Without a [[directory]], top-level keys cannot be meant for one.
    file.set_aside(table, unsupported_keys.DATASET if "directory" in table else unsupported_keys.TFDS)
    for kind in SOURCES:
        rows = unsupported_keys.TFDS if kind == "tfds" else unsupported_keys.DATASET
        entries = table.get(kind)
        for index, entry in enumerate(entries if isinstance(entries, list) else []):
            if isinstance(entry, dict):
                file.set_aside(entry, rows, (kind, index))
    config = file.validate(apply_shared_keys(table), DatasetConfig, context)
    for place, text in _messages(config, place_in_file) if config else ():
        file.message(place, text)
    return file, config


def _messages(config: DatasetConfig, place_in_file: Callable[[Place], Place]) -> Iterator[tuple[Place, str]]:
    """Yield the messages about a key's value that apply to every source that uses the key."""
    found: dict[Place, set[str]] = {}
    for kind in SOURCES:
        for index, source in enumerate(getattr(config, kind)):
            for key in type(source).model_fields:
                if key in source.model_fields_set:
                    found.setdefault(place_in_file((kind, index, key)), set()).add(source.messages.get(key, ""))
    for place, texts in found.items():
        text, *others = texts
        if text and not others:
            yield place, text


def _override(table: dict[str, Any], override: str) -> str:
    """Apply one `key.sub=value` to `table`; return the dotted key of the topmost entry that it creates."""
    key, equals, value = override.partition("=")
    *above, last = parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise UserError(f"--set: found {override!r}, expected key=value, as in optimizer.lr=1e-4")
    created = len(parts)
    for depth, part in enumerate(above, start=1):
        if part not in table:
            created = min(created, depth)
        table = table.setdefault(part, {})
        if not isinstance(table, dict):  # pyright: ignore[reportUnnecessaryIsInstance] - the user's value
            raise UserError(f"--set: {key.strip()}: {'.'.join(parts[:depth])} is not a table")
    table[last] = _toml_value(value.strip())
    return ".".join(parts[:created])


def _toml_value(text: str) -> Any:
    """Return the TOML value of `text`, or `text` itself if it is not one, so that bare words need no quotes."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    value = parsed["value"]
    return text if len(parsed) > 1 or isinstance(value, datetime.date | datetime.time) else value
