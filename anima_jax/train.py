"""python -m anima_jax.train --config FILE.toml"""

import argparse
import datetime
import itertools
import pathlib
import shlex
import shutil
import textwrap
from collections.abc import Sequence

import jax

from anima_jax.checkpoints.locations import writing_to
from anima_jax.checkpoints.models import open_text_encoder
from anima_jax.config import foreign
from anima_jax.config.load import load_config
from anima_jax.config.main import MainConfig
from anima_jax.config.words import start_up_words
from anima_jax.data.problems import Problems
from anima_jax.errors import ArgumentParser, UserError, command_line
from anima_jax.pipeline import check_networks
from anima_jax.text.tokenizers import Tokenizers, load_tokenizers
from anima_jax.training import estimate, optimizers, report
from anima_jax.training.cache import Encoders
from anima_jax.training.data import TrainingData, read_data
from anima_jax.training.dump import dump_dataset
from anima_jax.training.loop import Training, optimizer_config, step_config
from anima_jax.training.monitor import check_monitoring
from anima_jax.training.profiling import parse_steps, use_compilation_cache
from anima_jax.training.resume import find_run
from anima_jax.training.state import Trained, dit_config

SWITCHES = {
    "regenerate_cache": "encode everything again",
    "trust_cache": "train what the cache knows, without looking for changed or new files",
    "strict_data": "stop at a file that cannot be used, instead of naming it and going on",
    "reset_dataloader": "on resuming, begin the epoch anew",
    "reset_optimizer": "on resuming, begin the optimizer and its learning rates anew",
    "reset_optimizer_params": "on resuming, take the optimizer's settings from the configuration",
}
"""Flags that set a key of the configuration to true."""


@command_line
def main(argv: Sequence[str] | None = None) -> None:
    """Train as the configuration says: read and encode the data, then load and train."""
    report.log_to_console()
    arguments = parse_arguments(argv)
    config = load_config(
        arguments.config, overrides(arguments), i_know_what_i_am_doing=arguments.i_know_what_i_am_doing
    )
    profile = parse_steps(arguments.profile) if arguments.profile else None
    check_monitoring(config)
    use_compilation_cache(config.compilation_cache_dir)
    for line in (*flag_notes(arguments), *config.notes, *start_up_words(config)):
        print(line)

    tokenizers = load_tokenizers(config.model.tokenizer_path)
    with open_text_encoder(config.model.llm_path) as text_encoder:
        check_networks(dit_config(config), text_encoder.config, tokenizers)
    trained = estimate.abstract_trained(config)
    # What does not fit together is to show before hours of encoding.
    optimizers.build(optimizer_config(config), trained.tensors, trained.rates)
    run = None
    if config.resume_from_checkpoint is not None and not arguments.cache_only:
        run = find_run(config.output_dir, config.resume_from_checkpoint)
    problems = Problems(strict=config.strict_data)
    data = read_data(config, problems, keep=not arguments.dry_run)
    if arguments.dry_run:
        dry_run(config, trained, data, tokenizers)
        return
    for folder in filter(None, [config.output_dir, arguments.dump_dataset]):
        with writing_to(folder):
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    evaluated = {each.name: read_data(config, problems, evaluated=each.data) for each in config.eval_datasets}
    encoders = Encoders(config, tokenizers)
    for each in (data, *evaluated.values()):
        each.open_cache(encoders)
    for each in (data, *evaluated.values()):
        each.encode(encoders, problems)
    if arguments.dump_dataset:
        folder = dump_dataset(arguments.dump_dataset, data.examples, data.cache, encoders.vae, config.compute_dtype)
        print(f"wrote the data set, as the VAE gives it back, to {folder}")
    if arguments.cache_only or arguments.dump_dataset:
        return
    run = run_folder(config, run)
    Training(config, data, evaluated, encoders, run, profile).run()
    print(f"sample with: {sample_command(arguments, run, example_prompt(config, data))}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m anima_jax.train", description="Train Anima.")
    parser.add_argument("--config", required=True, metavar="FILE.toml", help="diffusion-pipe's main TOML")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replace a key: --set optimizer.lr=1e-5"
    )
    parser.add_argument(
        "--resume_from_checkpoint",
        nargs="?",
        const="",
        metavar="RUN",
        help="go on with this run of output_dir (without RUN: the newest that has a checkpoint)",
    )
    for key, what in SWITCHES.items():
        parser.add_argument(f"--{key}", action="store_true", help=what)
    parser.add_argument("--cache_only", action="store_true", help="fill the cache and stop")
    parser.add_argument(
        "--dump_dataset", metavar="DIR", help="fill the cache, write its pictures as the VAE gives them back, and stop"
    )
    parser.add_argument("--dry_run", action="store_true", help="say what would be trained; nothing is written")
    parser.add_argument("--profile", metavar="START:STOP", help="write an xprof trace of these steps (from 1)")
    parser.add_argument(
        "--i_know_what_i_am_doing", action="store_true", help="allow more than three resolutions in a data set"
    )
    for flag in foreign.FLAGS:
        parser.add_argument(f"--{flag}", nargs="?", const=True, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def flag_notes(arguments: argparse.Namespace) -> list[str]:
    """A line for each flag of diffusion-pipe that cannot apply."""
    given = (flag for flag in foreign.FLAGS if getattr(arguments, flag) is not None)
    return [f"--{flag}: does nothing here: {foreign.FLAGS[flag]}" for flag in given]


def overrides(arguments: argparse.Namespace) -> list[str]:
    """The keys that the command line sets."""
    keys = arguments.set + [f"{key}=true" for key in SWITCHES if getattr(arguments, key)]
    which = arguments.resume_from_checkpoint
    return keys if which is None else [*keys, f"resume_from_checkpoint={which or 'true'}"]


def dry_run(config: MainConfig, trained: Trained, data: TrainingData, tokenizers: Tokenizers) -> None:
    """Say what the run would be and take; `trained` holds shapes.

    Raises UserError if it does not fit the device's memory.
    """
    print(report.start_up_table(config, trained, data.describe(tokenizers)))
    optimizer = optimizers.build(optimizer_config(config, data.plan), trained.tensors, trained.rates)
    work = estimate.works(data, *data.text_rows(tokenizers))
    found = estimate.estimate(config, step_config(config), trained, optimizer, work, masked=data.masked)
    print(found)
    estimate.check_memory(found.memory.total, jax.devices()[0])


def run_folder(config: MainConfig, resumed: pathlib.Path | None) -> pathlib.Path:
    """The folder of the run that is resumed, or a new one in `output_dir`, named by the time (UTC).

    The TOMLs are copied into it.
    """
    run = resumed or new_folder(pathlib.Path(config.output_dir))
    used: set[str] = set()
    for path in (config.path, config.dataset, *(each.path for each in config.eval_datasets)):
        name = pathlib.Path(path).name
        while name in used:
            name = f"dataset_{name}"
        used.add(name)
        shutil.copy(path, run / name)
    return run


def new_folder(root: pathlib.Path) -> pathlib.Path:
    name = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d_%H-%M-%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        try:
            (root / (name + suffix)).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{root}: cannot be written: {error.strerror or error}") from error
        return root / (name + suffix)
    raise UserError(f"{root}: a hundred runs begin in this second")


def sample_command(arguments: argparse.Namespace, run: pathlib.Path, prompt: str) -> str:
    """The command line that draws `prompt` with what the run saved."""
    words = ["python", "-m", "anima_jax.generate", "--config", arguments.config]
    words += itertools.chain.from_iterable(("--set", override) for override in arguments.set)
    words += ["--checkpoint", str(run), "--prompt", prompt, "--seed", "1", "-o", "out.png"]
    return shlex.join(words)


def example_prompt(config: MainConfig, data: TrainingData) -> str:
    """A prompt that this run should be able to draw."""
    prompt = config.sample.prompts[0] if config.sample else next(filter(None, data.captions), "")
    return textwrap.shorten(prompt, 200, placeholder="")


if __name__ == "__main__":
    main()
