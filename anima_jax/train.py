"""python -m anima_jax.train --config FILE.toml"""

import argparse
import contextlib
import datetime
import itertools
import json
import pathlib
import shlex
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

import jax

from anima_jax.checkpoints.locations import writing_to
from anima_jax.checkpoints.models import open_text_encoder
from anima_jax.checkpoints.orbax import errors_reported_once
from anima_jax.config import unsupported_keys
from anima_jax.config.load import load_config
from anima_jax.config.main import MainConfig
from anima_jax.config.summary import summary
from anima_jax.data.dataset import TrainingData, read_data
from anima_jax.data.dump import dump_dataset
from anima_jax.data.encoders import Encoders
from anima_jax.data.problems import Problems
from anima_jax.errors import ArgumentParser, UserError, command_line, did_you_mean, os_reason
from anima_jax.models.dit import DiTConfig
from anima_jax.parallel import hosts
from anima_jax.parallel.devices import DEVICE_SPECS, DeviceSpec, find_device_spec, local_device_spec
from anima_jax.parallel.mesh import check_mesh, current_mesh, make_mesh, replicas, resolve_sizes
from anima_jax.parallel.rules import AXES
from anima_jax.sampling.pipeline import check_networks
from anima_jax.text.tokenizers import Tokenizers, load_tokenizers
from anima_jax.training import estimate, optimizers, report
from anima_jax.training.export import find_export
from anima_jax.training.fingerprints import shared_settings
from anima_jax.training.loop import Training, build_optimizer
from anima_jax.training.monitor import check_monitoring
from anima_jax.training.profiling import parse_steps, use_compilation_cache
from anima_jax.training.resume import alone_in, find_run, replicas_of
from anima_jax.training.run import Run
from anima_jax.training.state import ParamPartition, dit_config
from anima_jax.training.step import StepConfig

SWITCHES = {
    "regenerate_cache": "encode everything again",
    "trust_cache": "train what the cache knows, without looking for changed or new files",
    "strict_data": "stop at a file that cannot be used, instead of naming it and going on",
    "reset_dataloader": "on resuming, begin the epoch anew",
    "reset_optimizer": "on resuming, begin the optimizer and its learning rates anew",
    "reset_optimizer_params": "on resuming, take the optimizer's settings from the configuration",
}
"""Flags that set a key of the configuration to true."""

FLAGS_IN_COMMON = ("cache_only", "dump_dataset", "dry_run", "devices", "device_kind", "profile")
"""Flags besides those that set keys, which all processes of a run must have alike."""


@command_line
def main(argv: Sequence[str] | None = None) -> None:
    """Train as the configuration says: read and encode the data, then load and train."""
    report.log_to_console()
    arguments = parse_arguments(argv)
    hosts.join(arguments.coordinator_address, arguments.num_processes, arguments.process_id)
    with hosts.abort_all_on_error(), errors_reported_once():
        config = load_config(
            arguments.config,
            overrides(arguments),
            i_know_what_i_am_doing=arguments.i_know_what_i_am_doing,
            check_optimizer=optimizers.check,
        )
        hosts.assert_same_on_all_processes(lambda: in_common(config, arguments))
        # A dry run for other devices needs none of them.
        mesh = (
            make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1]) if arguments.devices else make_mesh(config.mesh.sizes)
        )
        sizes = resolve_sizes(config.mesh.sizes, arguments.devices) if arguments.devices else mesh.shape
        network = dit_config(config)
        check_mesh(sizes, network.width, network.heads)
        with jax.set_mesh(mesh):
            train(config, replicas(sizes), network, arguments)


def train(config: MainConfig, replicas: int, network: DiTConfig, arguments: argparse.Namespace) -> None:
    """Train a transformer of these sizes, on the mesh that is set."""
    profile = parse_steps(arguments.profile) if arguments.profile else None
    check_monitoring(config)
    use_compilation_cache(config.compilation_cache_dir)
    for line in (*flag_notes(arguments), *config.messages, *summary(config)):
        print(line)

    tokenizers = load_tokenizers(config.model.tokenizer_path)
    with open_text_encoder(config.model.llm_path) as text_encoder:
        check_networks(network, text_encoder.config, tokenizers)
    trained = estimate.abstract_partition(config)
    # What does not fit together is to show before hours of encoding.
    build_optimizer(config, trained)
    folder, run = None, Run(config, replicas)
    if config.resume_from_checkpoint is not None and not arguments.cache_only:
        folder = find_run(config.output_dir, config.resume_from_checkpoint)
        run = Run(config, replicas, restored_replicas=replicas_of(folder))
    problems = Problems(strict=config.strict_data)
    with hosts.process_0_first():
        keep = hosts.is_process_0() and not arguments.dry_run
        data = read_data(config, problems, batch_size_of=run.global_batch, keep=keep)
    hosts.assert_same_on_all_processes(data.described_fingerprint)
    if arguments.dry_run:
        if problems.count:
            print(problems.summary())
        dry_run(run, trained, data, tokenizers, arguments)
        return
    for wanted in filter(None, [config.output_dir, arguments.dump_dataset]):
        with writing_to(wanted):
            pathlib.Path(wanted).mkdir(parents=True, exist_ok=True)
    with hosts.process_0_first():
        evaluated = {
            each.name: read_data(config, problems, batch_size_of=run.eval_batch, evaluated=each.data, keep=keep)
            for each in config.eval_datasets
        }
    for each in evaluated.values():
        hosts.assert_same_on_all_processes(each.described_fingerprint)
    encoders = Encoders(config, tokenizers)
    hosts.assert_same_on_all_processes(lambda: encoders.fingerprints)
    for each in (data, *evaluated.values()):
        each.open_cache(encoders)
    for each in (data, *evaluated.values()):
        each.encode(encoders, problems)
        hosts.assert_same_on_all_processes(each.described_fingerprint)
    if arguments.dump_dataset and hosts.is_process_0():
        dumped = dump_dataset(arguments.dump_dataset, data.examples, data.cache, encoders.vae, config.compute_dtype)
        print(f"wrote the data set, as the VAE gives it back, to {dumped}")
    hosts.barrier("the data are encoded")
    if arguments.cache_only or arguments.dump_dataset:
        return
    folder = hosts.from_process_0(lambda: folder or new_folder(pathlib.Path(config.output_dir)))
    with alone_in(folder):
        copy_configuration(config, folder)
        Training(run, data, evaluated, encoders, folder, profile).run()
    with contextlib.suppress(UserError):  # a run that was stopped early has saved no model yet
        find_export(folder)
        print(f"sample with: {sample_command(arguments, folder, example_prompt(config, data))}")


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
    parser.add_argument("--devices", type=int, metavar="N", help="with --dry_run: on N devices, whatever is here")
    parser.add_argument("--device_kind", metavar="KIND", help="with --dry_run: of this kind, as in 'TPU v5p' or 'H100'")
    parser.add_argument("--profile", metavar="START:STOP", help="write an xprof trace of these steps (from 1)")
    parser.add_argument(
        "--i_know_what_i_am_doing", action="store_true", help="allow more than three resolutions in a data set"
    )
    hosts.add_flags(parser)
    for flag in unsupported_keys.FLAGS:
        parser.add_argument(f"--{flag}", nargs="?", const=True, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    for flag in ("devices", "device_kind"):
        if getattr(arguments, flag) is not None and not arguments.dry_run:
            parser.error(f"--{flag}: is for --dry_run; a run takes the devices that are here")
    if arguments.devices is not None and arguments.devices < 1:
        parser.error(f"--devices {arguments.devices}: expected at least 1")
    return arguments


def flag_notes(arguments: argparse.Namespace) -> list[str]:
    """A line for each flag of diffusion-pipe that cannot apply."""
    given = (flag for flag in unsupported_keys.FLAGS if getattr(arguments, flag) is not None)
    return [f"--{flag}: does nothing here: {unsupported_keys.FLAGS[flag]}" for flag in given]


def overrides(arguments: argparse.Namespace) -> list[str]:
    """The keys that the command line sets."""
    keys = arguments.set + [f"{key}=true" for key in SWITCHES if getattr(arguments, key)]
    which = arguments.resume_from_checkpoint
    return keys if which is None else [*keys, f"resume_from_checkpoint={json.dumps(which) if which else 'true'}"]


def in_common(config: MainConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """What all processes of a run must have been given."""
    flags = {f"--{flag}": getattr(arguments, flag) for flag in FLAGS_IN_COMMON}
    return {"jax": jax.__version__, **flags, **shared_settings(config.model_dump(mode="json"))}


def dry_run(
    run: Run,
    trained: ParamPartition,
    data: TrainingData,
    tokenizers: Tokenizers,
    arguments: argparse.Namespace,
) -> None:
    """Say what the run would be and take; `trained` holds shapes.

    Raises UserError if it does not fit the devices' memory.
    """
    config = run.config
    print(report.start_up_table(config, trained, data.describe(tokenizers)))
    optimizer = build_optimizer(config, trained, data.plan)
    work = estimate.step_workloads(run, data, *data.text_rows(tokenizers))
    device_specs, limit, device_name = devices_of(arguments)
    sizes = resolve_sizes(config.mesh.sizes, arguments.devices) if arguments.devices else None
    found = estimate.estimate(
        config,
        StepConfig.of(config),
        trained,
        optimizer,
        work,
        sizes=sizes,
        device_specs=device_specs,
        masked=data.masked,
    )
    print(report.mesh_table(sizes or current_mesh().shape, trained, config.learning_rates, device_name))
    print(found)
    estimate.check_memory(found.memory.total, limit, device_name)


def devices_of(arguments: argparse.Namespace) -> tuple[Sequence[DeviceSpec], float | None, str]:
    """The kind of the devices that a dry run is for, what memory each has, and what they are called.

    Devices that are not here and of which no kind is given may be of every kind.
    """
    if arguments.device_kind:
        kind = find_device_spec(arguments.device_kind)
        if kind is None:
            known = [kind.name for kind in DEVICE_SPECS]
            near = did_you_mean(arguments.device_kind, known)
            raise UserError(f"--device_kind {arguments.device_kind}: expected one of {', '.join(known)}{near}")
        return [kind], kind.memory, kind.name
    device = jax.local_devices()[0]
    if arguments.devices and device.platform == "cpu":
        return DEVICE_SPECS, None, "of any kind; --device_kind names one"
    kind = local_device_spec(device)
    return [kind] if kind else [], estimate.device_bytes(device), device.device_kind


def copy_configuration(config: MainConfig, run: pathlib.Path) -> None:
    """Put copies of the TOMLs into the run's folder."""
    used: set[str] = set()
    for path in (config.path, config.dataset, *(each.config for each in config.eval_datasets)):
        name = pathlib.Path(path).name
        while name in used:
            name = f"dataset_{name}"
        used.add(name)
        with writing_to(str(run / name)):
            shutil.copy(path, run / name)


def new_folder(root: pathlib.Path) -> pathlib.Path:
    """A new run's folder in `root`, named by the time (UTC)."""
    name = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d_%H-%M-%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        try:
            (root / (name + suffix)).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{root}: cannot be written: {os_reason(error)}") from error
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
