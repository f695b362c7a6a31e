"""Generator of `docs/configuration.md` from the descriptions in the schema.

python -m anima_jax.config.reference > docs/configuration.md
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from anima_jax.config import other_trainers, unsupported_keys
from anima_jax.config.dataset import SOURCES, DatasetConfig, Source
from anima_jax.config.main import MainConfig
from anima_jax.config.schema import choices, key_table

INTRO = """# Configuration

Written by `python -m anima_jax.config.reference` from the schema in `anima_jax/config`; change it there.

Training accepts diffusion-pipe's two TOML files unchanged: the main TOML, which `--config` names, and the dataset TOML,
which the main TOML names. Keys that diffusion-pipe does not have are marked **ours**. An unknown key, a value of the
wrong type and a missing file are errors; all of them are listed at once.

`--set key=value` replaces a key of the main TOML: `--set optimizer.lr=1e-5`. Relative paths are looked up from the
current directory first, then from the folder of the TOML that names them; paths of models and data may be addresses
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
"""First key of each part of the main TOML's top level → heading of that part."""

TYPES: Mapping[str, str] = {"boolean": "true or false", "integer": "whole number"}
"""JSON schema type → its name in the page. Other types keep their names."""

BOUNDS: Mapping[str, str] = {
    "minimum": "≥",
    "exclusiveMinimum": ">",
    "maximum": "≤",
    "exclusiveMaximum": "<",
    "multipleOf": "a multiple of",
}

ANY_OPTION = "| any other | | | an argument of the optimizer's own, by its name in its library; an error lists them |"


DIFFERENCES: Mapping[str, str] = {
    "Videos": "16 frames per second are chosen by the file's timestamps, repeated or dropped as needed, and turned "
    "upright; diffusion-pipe takes frames at equal distances from all frames of the file, and counts the frames of "
    "the file, not those at 16 per second, when it picks a frame bucket.",
    "EXIF orientation": "images and masks are turned upright; diffusion-pipe trains them as they are stored.",
    "16-bit grey": "scaled to 8 bits; diffusion-pipe clips it at 255, so that most of it is white.",
    "Transparency": "composited over white in every mode; diffusion-pipe drops it from grey images with alpha, and "
    "from RGB images with a transparent colour.",
    "Encoding of captions": "UTF-8, with or without byte order mark, and any other is an error that names the file; "
    "diffusion-pipe reads them in the encoding of the system, and a byte order mark becomes part of the caption.",
    "Empty captions": "an empty caption file counts as no caption, see `skip_empty_caption`; diffusion-pipe leaves "
    "out images without a file and trains those with an empty one.",
    "Captions' files": "`.txt`, `.caption`, `.json` and `NAME_nl.txt`, inside a tar too, and a `captions.json` with "
    "texts, lists or tables, by name or path, with or without suffix; diffusion-pipe reads `.txt` files, for a tar "
    "none, and a `captions.json` of lists by name.",
    "Tars": "a link, and a member whose name leads out of the tar, is left out and named; diffusion-pipe reads both.",
    "`num_repeats`": "a fraction is rounded down once for each resolution and frame count, over all aspect ratios, "
    "and the images of the part are chosen by their contents; diffusion-pipe rounds down in each size bucket, so that "
    "small buckets vanish below 1, and takes the first of its list.",
    "`size_buckets`": "an example goes to the bucket of the nearest ratio that it is long enough for; "
    "diffusion-pipe sorts the buckets by length and their ratios by size, and then takes one list's position in the "
    "other, so that with several ratios an image may be cropped to another bucket than the nearest.",
    "`subsample_ratio`": "a share of the images and clips, the same ones in every run; diffusion-pipe keeps the "
    "first batches of its order.",
    "`exclude_modules`": "a regular expression that matches a module's name or a part of it between dots; "
    "diffusion-pipe hands it to PEFT, where a text must match the whole name, and an entry of a list its end.",
    "Special tokens in a caption": "`<think>`, `</think>`, `<tool_response>` and `</tool_response>` are text, as in "
    "ComfyUI; diffusion-pipe makes one token of each.",
    "Order and seed": "the order of examples is drawn again in every epoch, from `seed`, and examples that do not "
    "fill a batch begin the next epoch; diffusion-pipe has no seed, repeats its order in every epoch and drops "
    "those examples.",
    "Optimizers": "names in any case; 'Muon', 'AdaMuon' and 'NorMuon' are GenericOptim's, since pytorch_optimizer's do "
    "not accept diffusion-pipe's groups; `momentum_type = 'sm'` works in all matrices instead of the first group's; "
    "'Prodigy' keeps the proportions of the groups' rates; weights are float32, or bfloat16 rounded stochastically "
    "instead of Kahan's sums; SOAP's bases of vectors that no gradient has are arbitrary in both.",
    "`pseudo_huber_c`, `regenerate_cache` and `alpha`": "work in the TOML; diffusion-pipe ignores the first two and "
    "refuses the third.",
}
"""What differs → what is done here, and in diffusion-pipe (its utils/dataset.py and models/base.py)."""


def reference() -> str:
    """Return the whole page, in Markdown."""
    return "\n\n".join([INTRO, *_main(), *_dataset(), *_differences(), *_unsupported()]) + "\n"


def _main() -> Iterator[str]:
    yield "## The main TOML"
    keys = key_table(MainConfig)
    part: list[str] = []
    for key, node in keys.items():
        if key in HEADINGS:
            yield from _table(part)
            yield f"### {HEADINGS[key]}"
            part = []
        if "." not in key and (key == "eval_datasets" or not node["table"]):
            part.append(_row(key, node))
    yield from _table(part)
    for name, node in keys.items():
        if node["table"]:
            yield f"### `[[{name}]]`" if name == "eval_datasets" else f"### `[{name}]`"
            yield _about(node["table"])
            yield from _table([*_rows_of(name, keys), *([ANY_OPTION] if name == "optimizer" else [])])


def _dataset() -> Iterator[str]:
    yield "## The dataset TOML"
    yield (
        "Folders of files, each a `[[directory]]`, and datasets of tensorflow-datasets, each a `[[tfds]]`. Every key "
        "except `path` and those of `[[tfds]]` alone may also be set at the top of the file, where it applies to every "
        "source; the same key in a source overrides it there."
    )
    keys = key_table(DatasetConfig)
    common = {row.split(" | ")[0]: row for row in _rows_of("", key_table(Source))}
    yield "### Every source"
    yield from _table(common.values())
    for name in SOURCES:
        yield f"### `[[{name}]]`"
        yield _about(keys[name]["table"])
        yield from _table(row for row in _rows_of(name, keys) if row.split(" | ")[0] not in common)


def _differences() -> Iterator[str]:
    yield "## Differs from diffusion-pipe"
    yield "The same files train the same way, number for number, except for this:"
    yield "\n".join(f"- **{what}**: {how}" for what, how in DIFFERENCES.items())


def _unsupported() -> Iterator[str]:
    yield "## Keys and flags of diffusion-pipe, its forks and GUIs that are not keys here"
    yield (
        "They are taken as a key of ours that means the same, with a message; accepted with a message that says what "
        "does their job here; or refused with what to write instead. Values that ask for nothing are accepted silently."
    )
    main = {**unsupported_keys.MAIN, **unsupported_keys.CAPTIONS}
    answers = {f"`{key}`": _answer(row) for key, row in main.items()}
    answers |= {f"`{key}` (dataset)": _answer(row) for key, row in unsupported_keys.DATASET.items()}
    answers |= {f"`--{flag}`": f"does nothing here: {message}" for flag, message in unsupported_keys.FLAGS.items()}
    same: dict[str, list[str]] = {}
    for key, answer in answers.items():
        same.setdefault(answer, []).append(key)
    rows = [f"| {', '.join(keys)} | {answer} |" for answer, keys in same.items()]
    yield "\n".join(["| key or flag | answer |", "| --- | --- |", *rows])
    yield "## Keys of sd-scripts, OneTrainer, SimpleTuner and others"
    yield "Other trainers have other files and defaults. Their keys are errors that say what they are called here."
    named = [f"| {ours} | {_quoted(keys)} |" for ours, keys in other_trainers.NAMED.items()]
    absent = [f"| – ({reason}) | {_quoted(keys)} |" for reason, keys in other_trainers.ABSENT.items()]
    yield "\n".join(["| here | there |", "| --- | --- |", *named, *absent])


def _quoted(keys: str) -> str:
    return ", ".join(f"`{key}`" for key in keys.split())


def _answer(row: unsupported_keys.Unsupported) -> str:
    if row.target:
        target = row.target.replace(unsupported_keys.IN_DATASET, "")
        where = " of the dataset TOML" if row.target != target else ""
        values = [f"`{_toml(found)}` is `{_toml(ours)}`" for found, ours in (row.values or {}).items()]
        return f"taken as `{target}`{where}{': ' if values else ''}{', '.join(values)}"
    if row.message:
        return f"does nothing here: {row.message}"
    unless = f", unless it is {', '.join(f'`{_toml(value)}`' for value in row.harmless)}" if row.harmless else ""
    return f"refused{unless}: {row.refusal}"


def _toml(value: Any) -> str:
    return json.dumps(value)


def _rows_of(table: str, keys: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for dotted, node in keys.items():
        above, _, key = dotted.rpartition(".")
        if above == table and not node["table"]:
            yield _row(key, node)


def _table(rows: Iterable[str]) -> Iterator[str]:
    if rows := list(rows):
        yield "\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows])


def _about(table: Mapping[str, Any]) -> str:
    """Return the first paragraph of a table's docstring."""
    return " ".join(table["description"].split("\n\n")[0].split())


def _row(key: str, node: Mapping[str, Any]) -> str:
    meaning = re.sub(r"^ours\b", "**ours**", node["description"]).replace("|", r"\|")
    return f"| `{key}` | {_type(node)} | {_default(node)} | {meaning} |"


def _default(node: Mapping[str, Any]) -> str:
    """Return the default in TOML syntax, or a dash if it is unset or derived from other keys."""
    value = node.get("default")
    if node["required"]:
        return "required"
    if value in (None, [], {}):
        return "–"
    return f"`{str(value).lower() if isinstance(value, bool) else repr(value)}`"


def _type(node: Mapping[str, Any]) -> str:
    """Return the type of a key as a user writes it: `whole number ≥ 1`, `'linear' or 'cosine'`, `[string, …]`."""
    match node:
        case {"anyOf": nodes}:
            return " or ".join(_type(each) for each in nodes if each.get("type") != "null")
        case {"enum": values}:
            return choices(tuple(values))
        case {"const": value}:
            return choices((value,))
        case {"type": "array", "items": items}:
            return f"[{_type(items)}, …]"
        case {"type": kind}:
            bounds = [f"{sign} {node[name]}" for name, sign in BOUNDS.items() if name in node]
            return f"{TYPES.get(kind, kind)} {' and '.join(bounds)}".strip()
    return "table"


if __name__ == "__main__":
    print(reference(), end="")
