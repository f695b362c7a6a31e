"""`docs/configuration.md`, from the schema's own descriptions.

python -m anima_jax.config.reference > docs/configuration.md
"""

import json
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from anima_jax.config import unsupported_keys
from anima_jax.config.dataset import DirectorySource, Source, TfdsSource
from anima_jax.config.main import MainFile
from anima_jax.config.model import ModelConfig
from anima_jax.config.network import AdapterSizes, NetworkSizes
from anima_jax.config.optimizer import AdapterConfig, OptimizerConfig
from anima_jax.config.schema import Words, choices, sections_in
from anima_jax.config.sections import EvalFile, MeshConfig, MonitoringConfig, SampleConfig

INTRO = """# Configuration

Written by `python -m anima_jax.config.reference` from the schema in `anima_jax/config`; change it there.

Training takes diffusion-pipe's two TOML files as they are: the main TOML, which `--config` names, and the dataset TOML,
which the main TOML names. Keys that diffusion-pipe does not have are marked **ours**. An unknown key, a value of the
wrong type and a missing file are errors, and all of them are listed at once.

`--set key=value` replaces a key of the main TOML: `--set optimizer.lr=1e-5`. Paths are looked up from the current
directory first, then from the folder of the TOML that names them; those of models and data may be addresses
(`hf://owner/repo/file`, `gs://bucket/file`). `python -m anima_jax.train --help` lists the flags."""

HEADINGS: Mapping[str, str] = {
    "output_dir": "Files and length",
    "micro_batch_size_per_gpu": "Batches",
    "gradient_clipping": "Optimizer steps",
    "param_dtype": "Memory and speed",
    "video_clip_mode": "Data and cache",
    "huber_delta": "Loss (the mean squared error, unless one of these is set)",
    "save_every_n_epochs": "Saving and resuming",
    "eval_every_n_epochs": "Evaluation",
    "steps_per_print": "Reports",
}
"""The first key of each part of the main TOML's top → the part's heading."""

TABLES: Mapping[str, type[BaseModel]] = {
    "eval_datasets": EvalFile,
    "model": ModelConfig,
    "model.config": NetworkSizes,
    "model.config.adapter": AdapterSizes,
    "optimizer": OptimizerConfig,
    "adapter": AdapterConfig,
    "sample": SampleConfig,
    "mesh": MeshConfig,
    "monitoring": MonitoringConfig,
}
"""The main TOML's tables."""

PYTHON_TYPES: Mapping[Any, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "string",
}
BOUNDS: tuple[tuple[type, str, str], ...] = (
    (annotated_types.Ge, "ge", "≥"),
    (annotated_types.Gt, "gt", ">"),
    (annotated_types.Le, "le", "≤"),
    (annotated_types.Lt, "lt", "<"),
    (annotated_types.MultipleOf, "multiple_of", "a multiple of"),
)


def reference() -> str:
    """The whole page, in Markdown."""
    return "\n\n".join([INTRO, *_main(), *_dataset(), *_foreign()]) + "\n"


def _main() -> Iterator[str]:
    yield "## The main TOML"
    part: list[str] = []
    for key, field in MainFile.model_fields.items():
        if key in HEADINGS:
            yield from _table(part)
            yield f"### {HEADINGS[key]}"
            part = []
        if key == "eval_datasets" or not sections_in(field.annotation):
            part.append(_row(key, field))
    yield from _table(part)
    for name, section in TABLES.items():
        yield f"### `[[{name}]]`" if section is EvalFile else f"### `[{name}]`"
        yield _about(section)
        rows = [_row(key, field) for key, field in section.model_fields.items() if not _is_table(name, key)]
        if section is OptimizerConfig:
            rows.append(f"| any other | | | {OptimizerConfig.ANY_KEY} |")
        yield from _table(rows)


def _is_table(name: str, key: str) -> bool:
    return f"{name}.{key}" in TABLES


def _dataset() -> Iterator[str]:
    yield "## The dataset TOML"
    yield (
        "Folders of files, each a `[[directory]]`, and datasets of tensorflow-datasets, each a `[[tfds]]`. Every key "
        "but `path` and those of `[[tfds]]` alone may stand at the top of the file and then holds for every source; "
        "the same key in a source wins there."
    )
    yield "### Every source"
    yield from _table(_row(key, field) for key, field in Source.model_fields.items())
    for name, section in (("directory", DirectorySource), ("tfds", TfdsSource)):
        yield f"### `[[{name}]]`"
        yield _about(section)
        own = {key: field for key, field in section.model_fields.items() if key not in Source.model_fields}
        yield from _table(_row(key, field) for key, field in own.items())


def _foreign() -> Iterator[str]:
    yield "## Keys and flags of diffusion-pipe and its forks with another answer"
    yield "They are accepted with a note that says what does their job here, or refused with the reason."
    tables = {
        **{name or "main": rows for name, rows in unsupported_keys.SECTIONS.items()},
        "dataset": unsupported_keys.DATASET,
    }
    rows = [
        f"| `{key if name in {'main', 'dataset'} else f'{name}.{key}'}` | {_answer(row)} |"
        for name, keys in tables.items()
        for key, row in keys.items()
    ]
    rows += [f"| `--{flag}` | does nothing here: {note} |" for flag, note in unsupported_keys.FLAGS.items()]
    yield "\n".join(["| key or flag | answer |", "| --- | --- |", *rows])


def _answer(row: unsupported_keys.Foreign) -> str:
    if row.renamed:
        return f"another spelling of `{row.renamed}`"
    if row.note:
        return f"does nothing here: {row.note}"
    unless = f", unless it is {', '.join(f'`{json.dumps(value)}`' for value in row.harmless)}" if row.harmless else ""
    return f"refused{unless}: {row.refusal}"


def _table(rows: Iterable[str]) -> Iterator[str]:
    if rows := list(rows):
        yield "\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows])


def _about(section: type[BaseModel]) -> str:
    """The first paragraph of the section's docstring."""
    return " ".join((section.__doc__ or "").split("\n\n")[0].split())


def _row(key: str, field: FieldInfo) -> str:
    meaning = re.sub(r"^ours\b", "**ours**", field.description or "")
    cells = (f"`{key}`", type_words(field.annotation, field.metadata), _default(field), meaning)
    return f"| {' | '.join(cells)} |"


def _default(field: FieldInfo) -> str:
    """The default as TOML has it; a dash where it is unset, or follows from other keys."""
    value = field.default
    if field.is_required():
        return "required"
    if value is PydanticUndefined or value is None or value in ((), {}):
        return "–"
    return f"`{_toml(value)}`"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else repr(value)


def type_words(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A key's type as a user writes it: `whole number ≥ 1`, `'linear' or 'cosine'`, `[string, …]`."""
    metadata = list(metadata)
    for item in metadata:
        if isinstance(item, Words):
            return item.text
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return type_words(arguments[0], [*arguments[1:], *metadata])
    if origin is Literal:
        words = choices(arguments)
    elif origin in {typing.Union, types.UnionType}:
        words = " or ".join(type_words(argument) for argument in arguments if argument is not type(None))
    elif origin is tuple:
        inner = [type_words(argument) for argument in arguments if argument is not ...]
        words = f"[{', '.join(inner)}{', …' if ... in arguments else ''}]"
    elif sections_in(annotation):
        words = "table"
    else:
        words = PYTHON_TYPES[annotation]
    bounds = [
        f"{sign} {getattr(item, name)}" for kind, name, sign in BOUNDS for item in metadata if isinstance(item, kind)
    ]
    return f"{words} {' and '.join(bounds)}".strip()


if __name__ == "__main__":
    print(reference(), end="")
