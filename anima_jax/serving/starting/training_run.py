"""The LoRA of `anima-start`: questions about the pictures, the TOML of a run that fits this machine, training."""

import argparse
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from anima_jax.errors import UserError, shell_command
from anima_jax.serving.starting import choices, commands, run_toml
from anima_jax.serving.starting.choices import StartModel
from anima_jax.serving.starting.pictures import Pictures, caption_of_name, read_pictures, write_captions
from anima_jax.serving.starting.planning import RunPlan
from anima_jax.serving.starting.questions import Questions, whole_number
from anima_jax.serving.starting.run_toml import RunRecipe
from anima_jax.training.export import find_export
from anima_jax.training.run_folder import newest_run

RESOLUTIONS = {"anima": (1024, 768, 512), "shapes": (64,)}
"""Sides that are tried, the largest first."""

RANKS = {"anima": 32, "shapes": 8}


@dataclasses.dataclass(frozen=True)
class Answers:
    """What is to be trained: the pictures, how their captions are completed, and the settings of the run.

    `caption` is the caption of pictures without one, as a function of the picture; None leaves them out. `folder` is
    where the TOMLs and runs go; `resolution` is None for the largest that fits. `given` is what --pictures would be.
    """

    given: str
    pictures: Pictures
    folder: pathlib.Path
    caption: Callable[[Any], str] | None
    caption_flags: tuple[str, ...]
    trigger: str
    steps: int
    rank: int
    resolution: int | None


def ask(arguments: argparse.Namespace, questions: Questions, path: str, model: StartModel) -> Answers | None:
    """Report what is in the folder of pictures, and return the answers about it; None if nothing is to be trained.

    Answers of an earlier start for the same pictures are the defaults. Raises UserError if nothing in it is usable.
    """
    folder = choices.run_folder(arguments, path, model)
    there = choices.folder_of_pictures(path, folder, model)
    if there is None:
        print("no pictures: nothing is trained on")
        return None
    pictures = read_pictures(there)
    print(f"\n{pictures.report()}")
    before = _earlier(folder, pictures, model)
    caption, flags = _captions(arguments, questions, pictures)
    trigger = arguments.trigger
    if trigger is None and path == choices.DEMO:
        trigger = ""
    if trigger is None:
        question = "A word that calls what is learnt, in front of every caption (empty: none)"
        trigger = questions.ask(question, str(before.get("trigger", "")), "--trigger", str.strip)
    steps = arguments.steps or int(before.get("steps") or _default_steps(model, len(pictures.entries)))
    if arguments.steps is None:
        steps = questions.ask("Training steps", steps, "--steps", whole_number(1))
    rank = arguments.rank or int(before.get("rank") or RANKS[model.base])
    trigger = "" if pictures.captions and all(trigger in text for text in pictures.captions) else trigger
    given = path if path == choices.DEMO else commands.short_path(path)
    return Answers(given, pictures, folder, caption, flags, trigger.strip(" ,"), steps, rank, arguments.resolution)


def _default_steps(model: StartModel, count: int) -> int:
    return 400 if model.base == "shapes" else max(500, min(3000, 100 * round(count / 4)))


def _earlier(folder: pathlib.Path, pictures: Pictures, model: StartModel) -> dict[str, Any]:
    """Return the answers of the newest TOML for the same pictures and kind of model, {} if there is none."""
    _, found = run_toml.find(folder) or (None, {})
    same = found.get("folders") == [[each.path, each.repeats] for each in pictures.folders]
    return found if same and found.get("base") == model.base else {}


def _captions(
    arguments: argparse.Namespace, questions: Questions, pictures: Pictures
) -> tuple[Callable[[Any], str] | None, tuple[str, ...]]:
    """Return the caption of a picture without one, and the flags that say so."""
    if not pictures.bare:
        return None, ()
    how, text = arguments.captions, arguments.caption
    some = bool(pictures.captions)
    if how is None and text is None:
        own = arguments.trigger or pathlib.PurePath(pictures.path).name.replace("_", " ")
        options = [
            ("one", f'one caption for all of them, such as "{own}"'),
            ("names", f"their file names, such as {caption_of_name(pictures.bare[0])!r}"),
            *([("leave_out", "leave them out")] if some else []),
            ("stop", "stop, to write captions first: a text file beside each picture, cat.txt for cat.jpg"),
        ]
        question = f"{len(pictures.bare)} of {len(pictures.entries)} pictures have no caption. Use"
        default = "leave_out" if some else "one"
        how = questions.choose(question, options, "--captions", default=default, required=True)
        if how == "stop":
            raise UserError("stopped: captions are text files beside the pictures, cat.txt for cat.jpg")
        if how == "one":
            text = questions.ask("Their caption", own, "--caption", str.strip)
    if text is not None:
        caption = text.strip()
        return lambda _: caption, (f"--caption={caption}",)
    if how == "leave_out" and not some:
        raise UserError(f"{pictures.path}: no picture has a caption: --captions leave_out leaves nothing to train on")
    return (caption_of_name if how == "names" else None), ("--captions", str(how))


def flags_of(arguments: argparse.Namespace, model: StartModel, answers: Answers | None) -> list[str]:
    """Return the flags with which the same command asks nothing."""
    output = commands.short_path(arguments.output)
    words = ["--pictures", choices.NONE if answers is None else answers.given]
    own = arguments.model if arguments.model not in ("auto", "anima", "shapes") else model.base
    words += ["--model", own]
    for flag in ("vae", "text_encoder"):
        words += [f"--{flag}", value] if (value := getattr(arguments, flag)) else []
    for folder in arguments.models:
        words += ["--models", folder]
    if answers is not None:
        words += [*answers.caption_flags, f"--trigger={answers.trigger}", "--steps", str(answers.steps)]
        words += ["--rank", str(answers.rank)]
        words += ["--resolution", str(answers.resolution)] if answers.resolution else []
    elif arguments.steps:
        words += ["--steps", str(arguments.steps)]
    words += ["--output", output, "--port", str(arguments.port), "--yes"]
    return words + [f"--{flag}" for flag in ("no_train", "no_page", "no_browser") if getattr(arguments, flag)]


def prepare(answers: Answers, model: StartModel) -> pathlib.Path:
    """Write captions and the TOML of a run that fits this machine, unless they are there; return the TOML.

    Raises UserError if no setting fits, or if they cannot be written.
    """
    pictures = answers.pictures
    recipe = RunRecipe(
        base=model.base,
        transformer=model.paths["transformer"],
        vae=model.paths["vae"],
        text_encoder=model.paths["text_encoder"],
        folders=tuple((each.path, each.repeats) for each in pictures.folders),
        steps=answers.steps,
        rank=answers.rank,
        resolution=answers.resolution or 0,
        trigger=answers.trigger,
        prompt=_prompt(answers),
    )
    if answers.caption and pictures.bare:
        captions = {entry.media.name: answers.caption(entry) for entry in pictures.bare}
        table = write_captions(pictures, captions, answers.folder / "captions.json")
        where = f"in {table}" if table else "as text files beside the pictures"
        print(f"wrote {len(captions)} captions {where}")
        recipe = dataclasses.replace(recipe, captions_file=str(table) if table else None)
    found = run_toml.find(answers.folder, recipe)
    if found is not None:
        print(f"\ngoing on with {commands.short_path(found[0])}, which is not changed")
        return found[0]
    plan, recipe = _fitting_plan(answers.folder, recipe)
    path = run_toml.write(run_toml.free_name(answers.folder), recipe, plan)
    print(f"{run_toml.device_line(plan)}\n{plan.data}\nwrote {commands.short_path(path)}, with the reason of each key")
    print(f"  look at it again: {shell_command('anima_jax.train', '--config', commands.short_path(path), '--dry_run')}")
    return path


def _prompt(answers: Answers) -> str:
    """Return a caption of the pictures with the trigger in front of it, as training uses it."""
    pictures = answers.pictures
    written = [answers.caption(entry) for entry in pictures.bare[:1]] if answers.caption else []
    words = [answers.trigger, *[*pictures.captions, *written][:1]]
    return " ".join(", ".join(filter(None, words)).split())[:300] or "a picture"


def _fitting_plan(folder: pathlib.Path, recipe: RunRecipe) -> tuple[RunPlan, RunRecipe]:
    """Return the plan of the largest resolution with which the run fits, and its answers."""
    sizes = (recipe.resolution,) if recipe.resolution else RESOLUTIONS[recipe.base]
    plan = None
    for size in sizes:
        recipe = dataclasses.replace(recipe, resolution=size)
        draft = run_toml.write(folder / "draft" / "lora.toml", recipe)
        plan = commands.plan(commands.short_path(draft))
        if plan.keys is not None:
            return plan, recipe
        print(f"resolution {size} does not fit: {run_toml.device_line(plan)}")
    assert plan is not None
    raise UserError(
        f"no setting fits {plan.device}: the run needs {plan.needed / 2**30:.1f} GiB of its "
        f"{(plan.memory or 0) / 2**30:.1f} GiB; --model shapes fits every machine"
    )


def train(path: pathlib.Path) -> int:
    """Train the run of a TOML, or what is left of it; return training's exit code."""
    return commands.run("anima_jax.train", "--config", commands.short_path(path), "--resume", "auto")


def run_of(path: pathlib.Path) -> pathlib.Path | None:
    """Return the folder of the newest run of a TOML, None if there is none."""
    root = path.with_suffix("")
    return newest_run(root) if root.is_dir() else None


def lora_of(run: pathlib.Path) -> pathlib.Path | None:
    """Return the newest LoRA of a run, None if it has saved none."""
    try:
        return find_export(run)
    except UserError:
        return None
