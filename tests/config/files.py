"""A small valid configuration on disk, for tests to break."""

import json
from pathlib import Path
from typing import Any

MAIN: dict[str, Any] = {
    "output_dir": "runs",
    "dataset": "dataset.toml",
    "epochs": 3,
    "model": {
        "type": "anima",
        "transformer_path": "dit.safetensors",
        "vae_path": "vae.safetensors",
        "llm_path": "llm.safetensors",
    },
    "optimizer": {"type": "adamw_optimi", "lr": 2e-5},
}
DATASET: dict[str, Any] = {"resolutions": [512], "directory": [{"path": "pictures"}]}
REMOVE = object()

MODEL = """
[model]
type = 'anima'
transformer_path = 'dit.safetensors'
vae_path = 'vae.safetensors'
llm_path = 'llm.safetensors'
dtype = 'bfloat16'
"""
"""A [model] table as users write it, of the files that `write` makes."""


def write(folder: Path, changes: dict[str, Any] | None = None, dataset: dict[str, Any] | None = None) -> Path:
    """The main TOML in `folder`, with everything that it names; `changes` go by dotted key, `REMOVE` takes one out."""
    for name in ("dit", "vae", "llm"):
        (folder / f"{name}.safetensors").touch()
    (folder / "pictures").mkdir(exist_ok=True)
    (folder / "dataset.toml").write_text(toml(changed(DATASET, dataset or {})), encoding="utf-8")
    path = folder / "main.toml"
    path.write_text(toml(changed(MAIN, changes or {})), encoding="utf-8")
    return path


def changed(table: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of `table` with the dotted keys of `changes` set."""
    copy = {key: dict(value) if isinstance(value, dict) else value for key, value in table.items()}
    for dotted, value in changes.items():
        *above, last = dotted.split(".")
        inner = copy
        for key in above:
            inner = inner.setdefault(key, {})
        if value is REMOVE:
            del inner[last]
        else:
            inner[last] = value
    return copy


def toml(table: dict[str, Any]) -> str:
    """TOML of plain values: every nested table inline."""
    return "".join(f"{key} = {_value(value)}\n" for key, value in table.items())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value)  # TOML's strings, numbers and booleans are JSON's
