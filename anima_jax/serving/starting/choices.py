"""The first answers of `anima-start`: which pictures, and which model."""

import argparse
import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence

from anima_jax.assets import ASSETS
from anima_jax.checkpoints.folders import beside
from anima_jax.errors import UserError
from anima_jax.serving.starting import anima_files, commands, pictures
from anima_jax.serving.starting.questions import Questions

DEMO, NONE = "demo", "none"
"""Values of --pictures that are no folder."""

SMALL_WIDTH = 64
"""Width of the text encoder that comes with the package, for which the quick start's model is made."""


@dataclasses.dataclass(frozen=True)
class StartModel:
    """The model that is trained or drawn with: `base` is "anima", or "shapes" for the quick start's.

    `paths` are the files of its networks by flag; empty for the quick start's model that is still to be trained.
    """

    base: str
    paths: dict[str, str]


def pictures_path(arguments: argparse.Namespace, questions: Questions) -> str:
    """Return the folder or .zip of pictures, or `DEMO` or `NONE`. Raises UserError if it is not there."""

    def checked(text: str) -> str:
        if text in (DEMO, NONE):
            return text
        path = os.path.abspath(os.path.expanduser(text.strip("'\"")))
        if not os.path.exists(path):
            raise UserError(f"{path}: no such folder")
        if not (os.path.isdir(path) or path.lower().endswith(".zip")):
            raise UserError(f"{path}: is a file, expected a folder of pictures or a .zip of them")
        return path

    if arguments.pictures is not None:
        return checked(arguments.pictures)
    if questions.on_terminal:
        print("anima-start: pictures → LoRA → page. Enter takes the answer in brackets; Ctrl-C stops at any time.\n")
    elif arguments.model not in ("auto", "shapes"):
        raise UserError("--pictures DIR is required where nobody can be asked ('none': nothing is trained)")
    question = "A folder (or .zip) with your pictures; 'demo': some that are drawn here; 'none': train nothing"
    return questions.ask(question, DEMO, "--pictures", checked)


def folder_of_pictures(path: str, folder: pathlib.Path, model: StartModel) -> str | None:
    """Return the folder to train on, made in the run's folder from a .zip or for `DEMO`; None for nothing.

    The demonstration is for the quick start's model alone: Anima knows its colour.
    """
    if path == DEMO and model.base == "shapes":
        return pictures.drawn(folder / "pictures")
    if path in (DEMO, NONE):
        return None
    return pictures.unpacked(path, folder / "pictures") if path.lower().endswith(".zip") else path


def choose_model(arguments: argparse.Namespace, questions: Questions) -> StartModel:
    """Return the model: given, found on this machine, downloaded, or else the quick start's.

    Raises UserError if a given file is no such network, or if Anima was asked for and cannot be had.
    """
    if arguments.model == "shapes":
        return StartModel("shapes", {})
    given = {flag: value for flag in ("vae", "text_encoder") if (value := getattr(arguments, flag))}
    if arguments.model not in ("auto", "anima"):
        return _given_model(arguments.model, given, arguments.models)
    found = anima_files.find(given, arguments.models)
    for line in found.messages:
        print(line)
    if not found.missing:
        print("Anima's files are on this machine:")
        for flag, path in found.paths.items():
            print(f"  {flag}: {path}")
        return StartModel("anima", found.paths)
    if got := _downloaded(found, arguments, questions):
        return StartModel("anima", got)
    print("\n".join(anima_files.where_files_go(found.missing)))
    if arguments.model == "anima" and not arguments.yes and not questions.on_terminal:
        raise UserError("--model anima: its files cannot be had now, as said above; --model shapes starts without them")
    print(
        "until then, the quick start's model: a small Anima that draws coloured shapes, trained here without a download"
    )
    if not questions.confirm("Go on with the quick start's model", "--model shapes"):
        raise UserError("stopped: Anima's files are not here")
    return StartModel("shapes", {})


def _downloaded(found: anima_files.Found, arguments: argparse.Namespace, questions: Questions) -> dict[str, str] | None:
    """Return all paths after a download, None if it is not wanted or not possible, for a reason that is printed."""
    print(f"not on this machine: {', '.join(file.name for file in found.missing)}")
    try:
        _, table = anima_files.download_size(found.missing)
    except UserError as error:
        print(f"they cannot be downloaded now: {error}")
        return None
    print(f"{table}\n  Anima's weights have a licence of their own, which does not permit commercial use")
    if arguments.model == "auto" and not arguments.yes and not questions.on_terminal:
        questions.assumed.append("--model shapes")
        print("nobody can be asked about this download: --model anima starts it")
        return None
    if arguments.model != "anima" and not questions.confirm("Download them now", "--model anima"):
        return None
    commands.show("anima_jax.start", "--fetch")
    try:
        return found.paths | anima_files.fetch(found.missing)
    except UserError as error:
        print(f"{error}")
        return None


def fetch_anima(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the paths of Anima's files, after downloading what is missing. Raises UserError if that fails."""
    found = anima_files.find({}, arguments.models)
    try:
        if found.missing:
            print(anima_files.download_size(found.missing)[1])
        return found.paths | anima_files.fetch(found.missing)
    except UserError:
        print("\n".join(anima_files.where_files_go(found.missing)))
        raise


def _given_model(path: str, given: dict[str, str], folders: Sequence[str]) -> StartModel:
    """Return the model with a given transformer. One of the quick start's size has the package's other networks."""
    transformer, *_ = anima_files.FILES
    given = {name: other for name, other in beside(path).items() if name != "tokenizers"} | given
    if path.startswith("hf://"):
        found = anima_files.find({"transformer": path, **given}, folders)
    else:
        with transformer.open(path) as checkpoint:
            adapter = checkpoint.config.adapter
            if adapter is not None and adapter.source_width == SMALL_WIDTH:
                return StartModel("shapes", small_networks() | given | {"transformer": os.path.abspath(path)})
        found = anima_files.find({"transformer": path, **given}, [*folders, os.path.dirname(os.path.abspath(path))])
    if found.missing:
        names = ", ".join(f"--{file.flag} FILE ({file.name})" for file in found.missing)
        raise UserError(f"--model {path}: also needed: {names}; 'anima-start --fetch' downloads Anima's")
    return StartModel("anima", found.paths)


def small_networks() -> dict[str, str]:
    """Return the VAE and the text encoder of the quick start."""
    return {"vae": str(ASSETS / "tiny_vae.safetensors"), "text_encoder": str(ASSETS / "tiny_qwen3.safetensors")}


def run_folder(arguments: argparse.Namespace, path: str, model: StartModel) -> pathlib.Path:
    """Return the folder for the TOMLs and runs of these pictures, named like them."""
    name = pathlib.PurePath(path).stem if path.lower().endswith(".zip") else pathlib.PurePath(path).name
    plain = re.sub(r"[^\w.-]+", "_", name)[:100].strip("._- ") or "pictures"
    return pathlib.Path(arguments.output, f"{plain}{'_on_shapes' if model.base == 'shapes' else ''}")
