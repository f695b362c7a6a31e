"""Loader of a main TOML and the dataset TOMLs that it names. All errors of all files are reported at once."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from anima_jax.adapters.kinds import TRAINABLE
from anima_jax.assets import shipped
from anima_jax.checkpoints.names.control import LLLITE
from anima_jax.config import unsupported_keys
from anima_jax.config.dataset import SHARED_KEYS, SOURCES, DatasetConfig, DirectorySource, apply_shared_keys
from anima_jax.config.errors import BELONGS_ABOVE, TomlFile
from anima_jax.config.main import EVAL_EVERY, MainConfig
from anima_jax.config.optimizer import OptimizerConfig
from anima_jax.config.pairs import Pairs, pairs_of
from anima_jax.config.schema import Place, is_address, resolve
from anima_jax.config.sizes import Size
from anima_jax.config.syntax import read_toml, toml_value
from anima_jax.errors import UserError


def load_config(
    path: str | os.PathLike[str],
    overrides: Iterable[str] = (),
    *,
    i_know_what_i_am_doing: bool = False,
    check_optimizer: Callable[[OptimizerConfig], None] = lambda _: None,
) -> MainConfig:
    """Load the configuration from the main TOML at `path` and the dataset TOMLs that it names.

    If there is no such file, `path` may name one that comes with the package: `shapes`, `configs/shapes.toml`.
    `overrides` are `key.sub=value` as in `--set`; a value that is not valid TOML is a plain string. Relative paths are
    resolved against the current directory, then against the folder of the TOML that names them; input files must exist.
    `i_know_what_i_am_doing` allows any number of resolutions, like the flag of the same name. `check_optimizer` raises
    UserError for arguments that the optimizer does not accept.
    Raises UserError with one line for each error in any of the files.
    """
    path, note = _shipped_unless_there(os.fspath(path))
    main = TomlFile(
        path,
        MainConfig,
        unsupported_keys.MAIN,
        other_file=("the dataset TOML", DirectorySource.model_fields),
    )
    table = read_toml(main.name)
    for override in overrides:
        try:
            main.from_command_line.append(_override(table, override))
        except UserError as error:
            main.errors += error.messages
    model = table.get("model")
    cached_text = not (isinstance(model, dict) and model.get("cache_text_embeddings") is False)
    captions = _answer_other_keys(main, table, cached_text=cached_text)
    context = {
        "i_know_what_i_am_doing": i_know_what_i_am_doing,
        "cached_text": cached_text,
        "pairs": _pairs_in(table),
    }
    files = [main]

    def dataset_at(named: Any, defaults: Mapping[str, Any]) -> DatasetConfig | None:
        """Load a dataset TOML. Return None if it does not exist (validation reports this) or has errors."""
        found = _file_at(named, main)
        if found is None:
            return None
        file, data = _load_dataset(found, context, defaults)
        files.append(file)
        return data

    data = dataset_at(table.get("dataset"), captions)
    eval_datasets = table.get("eval_datasets")
    if isinstance(eval_datasets, list):
        eval_datasets[:] = [{"config": entry} if isinstance(entry, str) else entry for entry in eval_datasets]
        for index, entry in enumerate(eval_datasets):
            if isinstance(entry, dict):
                _add_loaded(main, entry, ("eval_datasets", index), {"data": dataset_at(entry.get("config"), {})})
    if eval_datasets and not any(map(table.get, EVAL_EVERY)):
        main.message(
            ("eval_datasets",), f"used only before the first step: neither {EVAL_EVERY[0]} nor the like is set"
        )
    messages = tuple(dict.fromkeys([*note, *(message for file in files for message in file.messages)]))
    _add_loaded(main, table, (), {"data": data, "path": os.path.abspath(main.name), "messages": messages})
    wrong_optimizer = _optimizer_errors(table, check_optimizer)
    config = main.validate(table, MainConfig, context)
    main.errors += [f"{main.name}: {text}" for text in wrong_optimizer]
    errors = dict.fromkeys(error for file in files for error in file.errors)
    if errors or config is None:
        raise UserError(*errors)
    return config


def load_dataset(path: str | os.PathLike[str]) -> tuple[DatasetConfig, tuple[str, ...]]:
    """Load a dataset TOML alone; return it and the messages about it. Raises UserError with a line for each error."""
    context = {"i_know_what_i_am_doing": True, "cached_text": False, "pairs": None}
    file, config = _load_dataset(os.fspath(path), context, {})
    if file.errors or config is None:
        raise UserError(*dict.fromkeys(file.errors))
    return config, tuple(dict.fromkeys(file.messages))


def _pairs_in(table: Mapping[str, Any]) -> Pairs | None:
    """Return the pairs that a main TOML asks for, before it is validated. None: unknown, because a value is wrong."""
    adapter, edit = table.get("adapter", {"type": TRAINABLE[0]}), table.get("edit", False)
    kind = str(adapter.get("type")).lower() if isinstance(adapter, dict) else ""
    channels = adapter.get("cond_in_channels", 3) if kind == LLLITE else 3
    if kind not in {*TRAINABLE, LLLITE} or channels not in (3, 4) or not isinstance(edit, bool):
        return None
    return pairs_of(channels if kind == LLLITE else 0, edit)


def _shipped_unless_there(path: str) -> tuple[str, list[str]]:
    """Return the path of a main TOML, and a message if it is one that comes with the package.

    Raises UserError, with the names of those, if there is no file and `path` is a single word.
    """
    if is_address(path):
        raise UserError(f"{path}: is an address, expected a TOML file on this machine")
    folder, name = os.path.split(path)
    configs = shipped("configs")
    found = configs / (name if name.endswith(".toml") else f"{name}.toml")
    if os.path.lexists(path) or folder not in {"", configs.name}:
        return path, []
    if os.path.isfile(found):
        return os.fspath(found), [f"--config {path}: no such file here, so the one that comes with anima_jax: {found}"]
    if folder or name.endswith(".toml"):
        return path, []
    names = sorted(each.stem for each in configs.glob("*.toml") if "dataset" not in each.stem)
    raise UserError(f"{path}: no such file; those that come with anima_jax: {', '.join(names)}")


def _file_at(named: Any, main: TomlFile) -> str | None:
    """Return the absolute path of the file that the main TOML names, or None if there is none."""
    candidates = resolve(named, os.path.dirname(main.name)) if isinstance(named, str) and named else ()
    return next(filter(os.path.isfile, candidates), None)


def _answer_other_keys(main: TomlFile, table: dict[str, Any], *, cached_text: bool) -> dict[str, Any]:
    """Answer the main TOML's keys of forks and other trainers. Return keys that they mean in the dataset TOML."""
    captions: dict[str, Any] = {}
    _load_samples(main, table)
    main.tell(unsupported_keys.alias_values(table))
    rows = unsupported_keys.CACHED_CAPTIONS if cached_text else unsupported_keys.CAPTIONS
    main.set_aside(table, {**unsupported_keys.MAIN, **rows}, elsewhere=captions)
    main.refuse_other_trainers(table)
    return captions


def _load_samples(main: TomlFile, table: dict[str, Any]) -> None:
    """Replace `sample = 'prompts.toml'` or a `[preview]`, as forks have them, by a `[sample]` with their contents."""
    named, preview = table.get("sample"), table.get("preview")
    if named is False or named == "":
        del table["sample"]
    elif isinstance(named, str):
        found = _file_at(named, main)
        if found is None:
            main.error(("sample",), f"expected a [sample] table, or the file of one; found nothing at {named}")
            del table["sample"]
            return
        try:
            table["sample"] = read_toml(found)
        except UserError as error:
            main.errors += error.messages
            table["sample"] = {}
        main.message(("sample",), f"is taken as a [sample] table with the contents of {found}")
    elif isinstance(preview, dict) and named is None:
        del table["preview"]
        if preview.pop("enabled", True):
            table["sample"] = preview
            main.message(("preview",), "is taken as [sample]")
    sample = table.get("sample")
    if not isinstance(sample, dict) or sample is named:
        return
    main.set_aside(sample, unsupported_keys.SAMPLE_FILE, ("sample",))
    prompts = sample.get("prompts")
    if isinstance(prompts, list):
        own = [one if isinstance(one, dict) else {"prompt": one} for one in prompts]
        sample["prompts"] = [one.get("prompt") for one in own]
        if any("negative_prompt" in one for one in own):
            for_all = sample.get("negative_prompt", "")
            sample["negative_prompt"] = [one.get("negative_prompt", for_all) for one in own]
        if any("references" in one for one in own):
            sample["references"] = [one.get("references", []) for one in own]
        unused = {key for one in own for key in one} - {"prompt", "negative_prompt", "references", "name"}
        if unused:
            main.message(("sample", "prompts"), f"{', '.join(sorted(unused))} of one prompt alone does nothing here")
    if "seed" in sample:
        sample["seeds"] = [sample.pop("seed")]


def _optimizer_errors(table: dict[str, Any], check: Callable[[OptimizerConfig], None]) -> Sequence[str]:
    """Return what `check` says of the optimizer's name, or if it is known, of its arguments.

    If the name is wrong, the other keys mean nothing, and `table` gets an optimizer without errors.
    """
    found = table.get("optimizer")
    named = {"type": found.get("type"), "lr": 1.0} if isinstance(found, dict) else None
    for section in (named, found):
        with contextlib.suppress(ValidationError):  # these errors are among those of the whole file
            try:
                check(OptimizerConfig.model_validate(section))
            except UserError as error:
                if section is named:
                    table["optimizer"] = {"type": "adamw", "lr": 1.0}
                return [_misplaced(line) for line in error.messages]
    return ()


def _misplaced(line: str) -> str:
    """Return an error about an argument of the optimizer, or where it belongs if it is a key of the whole file."""
    key, unknown, _ = line.partition(": not an argument")
    belongs = unknown and key.removeprefix("[optimizer] ") in MainConfig.model_fields
    return f"{key}: unknown key; {BELONGS_ABOVE}" if belongs else line


def _add_loaded(file: TomlFile, table: dict[str, Any], at: Place, loaded: dict[str, Any]) -> None:
    """Add the values loaded for a table to it. It is an error if the file itself sets one of their keys."""
    for key in loaded:
        if key in table:
            file.error((*at, key), f"unknown key{file.suggestion((*at, key))}")
    table |= loaded


def _load_dataset(
    name: str, context: dict[str, Any], defaults: Mapping[str, Any]
) -> tuple[TomlFile, DatasetConfig | None]:
    """Load a dataset TOML; the configuration is None if the file has errors.

    `context` is passed to the validators; `defaults` are shared keys to use unless the file sets them.
    """
    table: dict[str, Any] = {}

    def place_in_file(place: Place) -> Place:
        """Return the top-level place of a shared key that a source does not set itself; other places unchanged."""
        match place:
            case (str(kind), int(index), str(key), *rest) if key in SHARED_KEYS:
                return place if key in table[kind][index] else (key, *rest)
            case ("tfds", "control_path"):  # of all sources
                return ("control_path",)
        return place

    known = [*unsupported_keys.DATASET, *SHARED_KEYS]
    known += [f"{kind}.{key}" for kind in SOURCES for key in unsupported_keys.DATASET]
    file = TomlFile(name, DatasetConfig, known, place_in_file, ("the main TOML", MainConfig.model_fields))
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
    file.refuse_other_trainers(table)
    for key, value in defaults.items():
        table.setdefault(key, value)
    shared = apply_shared_keys(table)
    config = file.validate(shared, DatasetConfig, context)
    for place, text in _messages(shared, config, place_in_file) if config else ():
        file.message(place, text)
    return file, config


def _messages(
    table: dict[str, Any], config: DatasetConfig, place_in_file: Callable[[Place], Place]
) -> Iterator[tuple[Place, str]]:
    """Yield the messages about a key's value that apply to every source that uses the key."""
    found: dict[Place, set[str]] = {}
    for kind in SOURCES:
        for index, source in enumerate(getattr(config, kind)):
            messages = {**source.messages, **_rounded(table[kind][index], source.size_buckets)}
            for key in type(source).model_fields:
                if key in source.model_fields_set:
                    found.setdefault(place_in_file((kind, index, key)), set()).add(messages.get(key, ""))
    for place, texts in found.items():
        text, *others = texts
        if text and not others:
            yield place, text


def _rounded(table: dict[str, Any], sizes: tuple[Size, ...]) -> dict[str, str]:
    """Return the message about size buckets whose sides were rounded, by key."""
    rounded = [
        f"{found[0]:g}×{found[1]:g} is rounded to {size.width}×{size.height}"
        for found, size in zip(table.get("size_buckets", ()), sizes, strict=True)
        if (found[0], found[1]) != (size.width, size.height)
    ]
    return {"size_buckets": f"sides are multiples of 16: {', '.join(rounded)}"} if rounded else {}


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
    table[last] = toml_value(value.strip())
    return ".".join(parts[:created])
