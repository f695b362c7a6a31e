"""The TOMLs of a run that `anima-start` writes: plain keys, each with its reason, as `anima_jax.train` reads them.

No file is ever overwritten: a TOML belongs to the user as soon as it is there. Its first lines keep the answers it was
made from, so that the same answers go on with the same file, edited or not, and other answers get a file of their own.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from anima_jax.assets import ASSETS, docs_page
from anima_jax.checkpoints.locations import replacing, writing_to
from anima_jax.errors import UserError, shell_command
from anima_jax.serving.starting.planning import RunPlan

ANSWERS = "# answers: "
"""Begins the line of a TOML with the answers that it was made from, as JSON."""


@dataclasses.dataclass(frozen=True)
class RunRecipe:
    """The answers that a run's TOML is made of.

    `base` is "anima" or "shapes", the quick start's model; `folders` are the folders of pictures and how often an epoch
    passes over each. `steps` and `rank` are those of the LoRA, `resolution` is a side in pixels. `trigger` is put in
    front of every caption; `prompt` is a caption with it.
    """

    base: str
    transformer: str
    vae: str
    text_encoder: str
    folders: tuple[tuple[str, int], ...]
    steps: int
    rank: int
    resolution: int
    trigger: str = ""
    prompt: str = "a picture"
    captions_file: str | None = None


@dataclasses.dataclass(frozen=True)
class TomlRow:
    """A key of a TOML, its value and why it has that value. `table` is "" for the keys at the top."""

    table: str
    key: str
    value: Any
    why: str


def find(folder: pathlib.Path, recipe: RunRecipe | None = None) -> tuple[pathlib.Path, dict[str, Any]] | None:
    """Return the newest TOML in a run's folder that was made from these answers (None: any), and its answers."""
    found = []
    for path in folder.glob("lora*.toml") if folder.is_dir() else ():
        answers = answers_in(path)
        if answers is not None and (recipe is None or _alike(answers, as_json(recipe))):
            number = re.fullmatch(r"lora(?:-(\d+))?", path.stem)
            found += [(int(number[1] or 1), path, answers)] if number else []
    return max(found, key=lambda each: each[0])[1:] if found else None


def _alike(answers: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return whether answers are those of a recipe; a resolution of 0 is any, and captions may have changed."""
    left_out = {"captions_file", "prompt", *(["resolution"] if not wanted["resolution"] else [])}
    return {key: answers.get(key) for key in wanted if key not in left_out} == {
        key: value for key, value in wanted.items() if key not in left_out
    }


def answers_in(path: pathlib.Path) -> dict[str, Any] | None:
    """Return the answers that a TOML was made from, None if it does not say."""
    try:
        with path.open(encoding="utf-8") as file:
            line = next((line for line in file if line.startswith(ANSWERS)), "")
        found = json.loads(line.removeprefix(ANSWERS)) if line else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def as_json(recipe: RunRecipe) -> dict[str, Any]:
    """Return the answers as a TOML keeps them."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def free_name(folder: pathlib.Path) -> pathlib.Path:
    """Return the path of the next TOML of a run's folder: lora.toml, lora-2.toml, … Its data set's, captions and runs
    have names that begin with the same stem.
    """
    names = ("lora", *(f"lora-{number}" for number in range(2, 10**6)))
    return next(
        path for name in names if not (path := folder / f"{name}.toml").exists() and not (folder / name).exists()
    )


def write(path: pathlib.Path, recipe: RunRecipe, plan: RunPlan | None = None) -> pathlib.Path:
    """Write the data set's TOML and then, at `path`, that of the run with the keys of a plan; return `path`.

    Without a plan the keys are those from which a plan starts. Raises UserError if they cannot be written.
    """
    data = dataset_of(path)
    with writing_to(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(data) as file:
        file.write(_dataset_text(recipe).encode())
    with replacing(path) as file:
        file.write("".join(_run_lines(path, data, recipe, plan)).encode())
    return path


def prompt_of(path: pathlib.Path) -> str:
    """Return the prompt with which the LoRA of a TOML is tried first: a caption, with what calls it."""
    return str((answers_in(path) or {}).get("prompt") or "a picture")


def dataset_of(path: pathlib.Path) -> pathlib.Path:
    """Return the path of the data set's TOML of a run's TOML."""
    return path.with_name(f"{path.stem}_dataset.toml")


def _run_lines(path: pathlib.Path, data: pathlib.Path, recipe: RunRecipe, plan: RunPlan | None) -> Iterator[str]:
    yield "# Written by anima-start, which does not change it again: edit it as you like.\n"
    yield f"# Every key is listed in {docs_page('configuration.md')}.\n"
    yield f"#     {shell_command('anima_jax.train', '--config', str(path), '--resume', 'auto')}\n"
    if plan:
        yield f"# {device_line(plan)}\n"
    yield f"{ANSWERS}{json.dumps(as_json(recipe), ensure_ascii=False)}\n"
    rows = {(row.table, row.key): row for row in _rows(path, data, recipe)}
    for key, value in ((plan.keys if plan else None) or {}).items():
        table, _, name = key.rpartition(".")
        why = (
            next((line.partition(": ")[2] for line in plan.reasons if line.startswith(f"{key} = ")), "") if plan else ""
        )
        rows[table, name] = TomlRow(table, name, value, f"so that it fits this device{f': {why}' if why else ''}")
    for table in dict.fromkeys(table for table, _ in rows):
        yield f"\n[{table}]\n" if table else "\n"
        for row in rows.values():
            if row.table == table:
                yield f"# {row.why}\n" if row.why else ""
                yield f"{row.key} = {toml_text(row.value)}\n"


def device_line(plan: RunPlan) -> str:
    """Return the devices of a plan, what the run needs of their memory, and how long it takes."""
    count = f"{plan.devices} × " if plan.devices > 1 else ""
    memory = f" with {plan.memory / 2**30:.1f} GiB of memory" if plan.memory else ""
    needed = f"the run needs about {plan.needed / 2**30:.1f} GiB"
    steps = f"{duration(plan.seconds)} for {plan.steps} steps, after a minute or two to begin"
    return f"{count}{plan.device}{memory}: {needed} and takes {steps}"


def duration(seconds: Sequence[float]) -> str:
    """Return a range of time for people: "about 5 to 9 minutes"."""
    unit, name = next((unit, name) for unit, name in _UNITS if seconds[1] >= 1.5 * unit or unit == 1)
    low, high = (f"{value / unit:.2g}" if value < 100 * unit else f"{value / unit:.0f}" for value in seconds)
    return f"about {low if low == high else f'{low} to {high}'} {name}"


_UNITS = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))


def _rows(path: pathlib.Path, data: pathlib.Path, recipe: RunRecipe) -> Iterator[TomlRow]:
    """Yield the keys of a run before a plan changes some of them."""
    small = recipe.base == "shapes"
    saves = max(1, recipe.steps // 5)
    top: dict[str, tuple[Any, str]] = {
        "output_dir": (str(path.with_suffix("")), "every run creates its own folder in here"),
        "dataset": (str(data), "the pictures"),
        "seed": (0, "noise, times and order follow from it: the same seed repeats the same run"),
        "max_steps": (recipe.steps, "the run ends here; --resume auto with more steps continues it"),
        "epochs": (64 * recipe.steps, "more than max_steps needs, however few the pictures are"),
        "micro_batch_size_per_gpu": (16 if small else 4, "examples that a device processes at once"),
        "gradient_clipping": (1.0, "no single picture moves the weights far"),
        "warmup_steps": (min(20, recipe.steps), "the first steps know little about the gradients' size"),
        "uncond_fraction": (0.1 if small else 0.0, "guidance compares with the empty caption, which is trained too"),
        "save_every_n_steps": (saves, "LoRAs to draw with, on the page too"),
        "checkpoint_every_n_minutes": (10, "what a run resumes from; Ctrl-C saves one as well"),
        "output_name": (path.parent.name, "name of the saved LoRAs"),
        "max_checkpoints": (5, "only the newest are kept"),
        "steps_per_print": (10, ""),
        "caching_batch_size": (16 if small else 1, "pictures that are encoded at once, before training"),
    }
    if not _can_keep_cache(recipe):
        top["cache_dir"] = (str(path.with_name(f"{path.stem}_cache")), "nothing can be written beside the pictures")
    yield from (TomlRow("", key, value, why) for key, (value, why) in top.items())
    yield TomlRow("model", "type", "anima", "")
    yield TomlRow("model", "transformer_path", recipe.transformer, "")
    yield TomlRow("model", "vae_path", recipe.vae, "")
    yield TomlRow("model", "llm_path", recipe.text_encoder, "")
    if small:
        yield TomlRow(
            "model", "tokenizer_path", str(ASSETS / "tokenizers"), "those of the quick start's small text encoder"
        )
    dtype = "float32" if small else "bfloat16"
    yield TomlRow(
        "model", "dtype", dtype, "of the computation and of the frozen weights; the LoRA is trained in float32"
    )
    yield TomlRow("model", "timestep_sample_method", "logit_normal", "noise levels as Anima was trained")
    yield TomlRow("model", "shift", 3.0, "more of the high noise levels, which decide what is drawn")
    if not small:
        yield TomlRow("model", "llm_adapter_lr", 0, "a small data set teaches it nothing and soon damages other words")
    yield TomlRow("adapter", "type", "lora", "the rest of the model stays as it is")
    yield TomlRow("adapter", "rank", recipe.rank, "how much the LoRA can hold; its file grows with it")
    yield TomlRow("adapter", "dtype", "float32" if small else "bfloat16", "of the saved file")
    yield TomlRow("optimizer", "type", "adamw" if small else "adamw_optimi", "")
    rate, why = (
        (1.5e-3, "high, as the network is small") if small else (5e-5, "alpha is the rank: it is not scaled down")
    )
    yield TomlRow("optimizer", "lr", rate, why)
    yield TomlRow("optimizer", "betas", [0.9, 0.99], "an average over about 100 steps: the run is short")
    yield TomlRow("optimizer", "weight_decay", 0.01, "")
    yield from _sample_rows(recipe, saves)


def _sample_rows(recipe: RunRecipe, saves: int) -> Iterator[TomlRow]:
    yield TomlRow("sample", "prompts", [recipe.prompt], "images drawn while training")
    yield TomlRow("sample", "every_n_steps", saves, "at each saved LoRA")
    yield TomlRow("sample", "seeds", [0], "")
    yield TomlRow("sample", "steps", 30, "")
    yield TomlRow("sample", "guidance_scale", 3.0 if recipe.base == "shapes" else 4.0, "")
    if recipe.base == "shapes":
        yield TomlRow("sample", "sampler", "euler_ancestral", "as in the quick start")
        yield TomlRow("sample", "guidance_interval", [0.0, 0.4], "")
    yield TomlRow("sample", "shift", 1.0 if recipe.base == "shapes" else 3.0, "")


def _can_keep_cache(recipe: RunRecipe) -> bool:
    return all(os.access(path, os.W_OK) for path, _ in recipe.folders)


def _dataset_text(recipe: RunRecipe) -> str:
    lines = [
        "# The pictures of the TOML of the same name. docs/configuration.md has every key.",
        "# Pictures get the area of a square of this side, and keep about their shape.",
        f"resolutions = [{recipe.resolution}]",
        "enable_ar_bucket = true",
        "min_ar = 0.5",
        "max_ar = 2.0",
        "num_ar_buckets = 9",
    ]
    if recipe.trigger:
        lines.append(
            f"caption_prefix = {toml_text(recipe.trigger + ', ')}          # the word that calls what is learnt"
        )
    for path, repeats in recipe.folders:
        lines += ["", "[[directory]]", f"path = {toml_text(path)}"]
        lines += [f"num_repeats = {repeats}"] if repeats != 1 else []
        lines += [f"captions_file = {toml_text(recipe.captions_file)}"] if recipe.captions_file else []
    return "\n".join(lines) + "\n"


def toml_text(value: Any) -> str:
    """Return a value as TOML writes it. Raises UserError for text that no TOML can hold."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {toml_text(each)}" for key, each in value.items()) + " }"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(toml_text, value))}]"
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{value!a}: is not UTF-8 text, which a TOML needs; rename it") from None
    return text
