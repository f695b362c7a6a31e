"""The quick start's model: trained once, then used like a downloaded one."""

import argparse
import pathlib
import re

from anima_jax.errors import UserError
from anima_jax.serving.starting import commands, run_toml
from anima_jax.serving.starting.choices import StartModel, small_networks
from anima_jax.training.export import find_export
from anima_jax.training.run_folder import newest_run

CONFIG = "shapes"
STEPS = 3600
"""Steps of configs/shapes.toml."""


def run_of(arguments: argparse.Namespace) -> pathlib.Path | None:
    """Return the folder of the newest run of the quick start, None if there is none."""
    root = pathlib.Path(arguments.output, "shapes")
    return newest_run(root) if root.is_dir() else None


def train_flags(arguments: argparse.Namespace) -> list[str]:
    """Return the flags of `anima_jax.train` for the quick start."""
    root = commands.short_path(pathlib.Path(arguments.output, "shapes"))
    steps = ["--set", f"max_steps={arguments.steps}"] if arguments.steps else []
    return ["--config", CONFIG, "--set", f"output_dir={root}", *steps, "--resume", "auto"]


def trained(arguments: argparse.Namespace) -> tuple[StartModel, int]:
    """Train the quick start's model, or what is left of it; return it and training's exit code.

    Raises UserError if it is not trained and --no_train forbids it.
    """
    code, done = 0, _steps_done(arguments)
    if arguments.no_train and not done:
        raise UserError("--no_train: the quick start's model is not trained yet")
    if not arguments.no_train and done < (arguments.steps or STEPS):
        steps = [f"max_steps={arguments.steps}"] if arguments.steps else []
        print(f"\n{run_toml.device_line(commands.plan(CONFIG, *steps))}")
        print("the quick start's model learns to draw coloured shapes: eight minutes on two idle processor cores")
        code = commands.run("anima_jax.train", *train_flags(arguments))
    run = run_of(arguments)
    paths = small_networks()
    if code == 0:
        if run is None:
            raise UserError(f"{arguments.output}: training left no run there")
        paths["transformer"] = str(find_export(run))
    return StartModel("shapes", paths), code


def _steps_done(arguments: argparse.Namespace) -> int:
    """Return the steps of the newest model that a finished quick start has saved, 0 if there is none."""
    run = run_of(arguments)
    try:
        path = str(find_export(run)) if run else ""
    except UserError:
        path = ""
    found = re.findall(r"step(\d+)|(epoch)\d+", path)
    return max([int(step) if step else STEPS for step, _ in found], default=0)
