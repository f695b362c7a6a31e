"""The command line of `python -m anima_jax.train`: flags, logging, and the command that samples from a run."""

import argparse
import contextlib
import io
import json
import logging
import pathlib
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from tqdm import tqdm

from anima_jax.config import unsupported_keys
from anima_jax.config.main import MainConfig
from anima_jax.data.dataset import TrainingData
from anima_jax.errors import ArgumentParser, program, shell_command
from anima_jax.parallel import hosts
from anima_jax.training.resume import shared_settings

SWITCHES = {
    "regenerate_cache": "encode everything again",
    "trust_cache": "train on what the cache contains, without looking for changed or new files",
    "strict_data": "stop at a file that cannot be used, instead of naming it and continuing",
    "allow_unused": "load files without the tensors that belong to no network",
    "reset_dataloader": "when resuming, restart the current epoch",
    "reset_optimizer": "when resuming, restart the optimizer and its learning rates",
    "reset_optimizer_params": "when resuming, use the configuration's settings of the optimizer",
}
"""Flags that set a key of the configuration to true."""

SHARED_FLAGS = (
    "cache_only",
    "dump_dataset",
    "dry_run",
    "devices",
    "device_kind",
    "device_memory",
    "compile",
    "profile",
)
"""Flags that do not set keys and must be equal in all processes of a run."""

LOGGER = logging.getLogger("anima_jax")


class _AboveBars(logging.Handler):
    """Log handler that writes to stderr, above the visible progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # as logging's own handlers do: a run does not end because stderr is on a full disk
            self.handleError(record)


def log_to_console() -> None:
    """Send this package's log to stderr, one line per message, regardless of handlers that other libraries install."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show × or → still shows the rest
    handler = _AboveBars()
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False


class _Unfailing(io.FileIO):
    """An open file to which every write succeeds: what cannot be written is dropped."""

    def write(self, data: Any) -> int:
        """Write `data`, or nothing if that fails."""
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


@contextlib.contextmanager
def output_may_fail() -> Iterator[None]:
    """Drop output of the block that cannot be written: training continues without its terminal, `tee` or log file."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_unfailing, before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _unfailing(stream: Any) -> Any:
    try:
        stream.flush()
        raw = _Unfailing(stream.fileno(), "wb", closefd=False)
    except (OSError, ValueError, AttributeError):  # not a file, or closed
        return stream
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=stream.encoding, errors="replace", line_buffering=True)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line. Raises UserError if it is not valid."""
    parser = ArgumentParser(prog=program("anima_jax.train"), description="Train Anima.")
    parser.add_argument("--config", required=True, metavar="FILE.toml", help="the main TOML, as for diffusion-pipe")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replace a key: --set optimizer.lr=1e-5"
    )
    resuming = parser.add_mutually_exclusive_group()
    resuming.add_argument(
        "--resume_from_checkpoint",
        nargs="?",
        const="",
        metavar="RUN",
        help="resume this run of output_dir (without RUN: the newest that has a checkpoint)",
    )
    resuming.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        choices=["auto"],
        metavar="auto",
        help="resume if there is a checkpoint, else begin: the same command starts, requeues and finishes a run",
    )
    parser.add_argument("--run_name", metavar="NAME", help="name of the run's folder in output_dir")
    for key, description in SWITCHES.items():
        parser.add_argument(f"--{key}", action="store_true", help=description)
    parser.add_argument("--cache_only", action="store_true", help="fill the cache and stop")
    parser.add_argument(
        "--dump_dataset", metavar="DIR", help="fill the cache, write its images as the VAE decodes them, and stop"
    )
    _add_dry_run_flags(parser)
    parser.add_argument("--profile", metavar="START:STOP", help="write an xprof trace of these steps (from 1)")
    parser.add_argument(
        "--i_know_what_i_am_doing", action="store_true", help="allow more than three resolutions in a data set"
    )
    hosts.add_flags(parser)
    for flag in unsupported_keys.FLAGS:
        parser.add_argument(f"--{flag}", nargs="?", const=True, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    _check_dry_run_flags(parser, arguments)
    return arguments


def _add_dry_run_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print what would be trained, and memory, FLOPs and step time; write nothing",
    )
    parser.add_argument("--devices", type=int, metavar="N", help="with --dry_run: for N devices instead of those here")
    parser.add_argument(
        "--device_kind",
        metavar="KIND",
        help="with --dry_run: for this kind, as in 'RTX 3060', 'v5p' or 'a100-40gb'",
    )
    parser.add_argument(
        "--device_memory", metavar="SIZE", help="with --dry_run: for devices with this much memory, as in 12GiB"
    )
    parser.add_argument(
        "--compile",
        metavar="TARGET",
        help="with --dry_run: compile the run's programs for these devices, as in 'v5p:8x8x4', 'H100' or 'RTX 4090:2'",
    )


def _check_dry_run_flags(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Raise UserError for flags of a dry run without one, and for two that contradict each other."""
    for flag in ("devices", "device_kind", "device_memory", "compile"):
        if getattr(arguments, flag) is not None and not arguments.dry_run:
            parser.error(f"--{flag}: is for --dry_run; a run uses the devices of this machine")
    for flag in ("devices", "device_kind"):
        if getattr(arguments, flag) is not None and arguments.compile is not None:
            parser.error(f"--{flag}: --compile {arguments.compile} says for which devices; expected one of the two")
    if arguments.devices is not None and arguments.devices < 1:
        parser.error(f"--devices {arguments.devices}: expected at least 1")


def unsupported_flags(arguments: argparse.Namespace) -> list[str]:
    """Return a message for each given flag of diffusion-pipe that has no effect here."""
    given = (flag for flag in unsupported_keys.FLAGS if getattr(arguments, flag) is not None)
    return [f"--{flag}: does nothing here: {unsupported_keys.FLAGS[flag]}" for flag in given]


def overrides(arguments: argparse.Namespace) -> list[str]:
    """Return the configuration keys that the command line sets, as KEY=VALUE."""
    keys = arguments.set + [f"{key}=true" for key in SWITCHES if getattr(arguments, key)]
    if arguments.resume or arguments.resume_from_checkpoint is not None:
        keys += ["resume=false", "resume_from_checkpoint=false"]  # what the file says
    for key in ("resume", "run_name", "resume_from_checkpoint"):
        if (value := getattr(arguments, key)) is not None:
            keys.append(f"{key}={json.dumps(value) if value or key == 'run_name' else 'true'}")
    return keys


def shared_arguments(config: MainConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the JAX version, flags and settings that must be equal in all processes of a run."""
    flags = {f"--{flag}": getattr(arguments, flag) for flag in SHARED_FLAGS}
    return {"jax": jax.__version__, **flags, **shared_settings(config.model_dump(mode="json"))}


def sample_command(
    config: MainConfig, data: TrainingData, arguments: argparse.Namespace, run_folder: pathlib.Path
) -> str:
    """Return a command line that samples from the saved model, with the first sample prompt or else a caption."""
    prompt = config.sample.prompts[0] if config.sample else next(filter(None, data.captions), "")
    words = ["--config", arguments.config, *_sets(arguments)]
    checkpoint = ["--checkpoint", str(run_folder)]
    if config.trains_control:
        own = (partner.media.name for example in data.examples for partner in example.entry.controls)
        picture = next(iter((*(config.sample.control if config.sample else ()), *own)), "PICTURE")
        checkpoint = ["--control", f"{run_folder}={picture}"]
    words += [*checkpoint, "--prompt", textwrap.shorten(prompt, 200, placeholder="")]
    for path in config.sample.references[0] if config.sample and config.sample.references else ():
        words += ["--reference", path]
    return shell_command("anima_jax.generate", *words, "--seed", "1", "-o", "out.png")


def resume_command(arguments: argparse.Namespace, run_folder: pathlib.Path) -> str:
    """Return a command line that resumes the run."""
    words = ["--config", arguments.config, *_sets(arguments), "--resume_from_checkpoint", str(run_folder)]
    again = ("trust_cache", "strict_data", "allow_unused", "i_know_what_i_am_doing")
    words += (f"--{flag}" for flag in again if getattr(arguments, flag))
    return shell_command("anima_jax.train", *words)


def _sets(arguments: argparse.Namespace) -> Iterator[str]:
    """Yield the given --set flags, without those of [monitoring], which has a secret."""
    for override in arguments.set:
        if not override.lstrip().startswith("monitoring"):
            yield from ("--set", override)
