"""python -m anima_jax.train --config FILE.toml"""

import argparse
import contextlib
import dataclasses
import datetime
import logging
import pathlib
import shlex
import shutil
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from anima_jax.checkpoints.models import open_text_encoder
from anima_jax.config.load import load_config
from anima_jax.config.main import MainConfig
from anima_jax.data.examples import Example
from anima_jax.data.loader import prefetched
from anima_jax.data.plan import Plan
from anima_jax.data.problems import Problems
from anima_jax.diffusion.objective import Loss, TimeDistribution
from anima_jax.errors import ArgumentParser, command_line
from anima_jax.models.parameters import Params, merge
from anima_jax.pipeline import AnimaPipeline, check_networks
from anima_jax.text.tokenizers import load_tokenizers
from anima_jax.training import optimizers, report
from anima_jax.training.batches import Batches, OnlineText, as_it_is
from anima_jax.training.cache import Encoders
from anima_jax.training.data import TrainingData, read_data
from anima_jax.training.dump import dump_dataset
from anima_jax.training.export import export
from anima_jax.training.samples import Samples
from anima_jax.training.state import Trained, dit_config, prepare
from anima_jax.training.step import StepConfig, TrainState, compile_step, init_state

SWITCHES = {
    "regenerate_cache": "encode everything again",
    "trust_cache": "train what the cache knows, without looking for changed or new files",
    "strict_data": "stop at a file that cannot be used, instead of naming it and going on",
}
"""Flags that set a key of the configuration to true."""


@command_line
def main(argv: Sequence[str] | None = None) -> None:
    """Train as the configuration says: read and encode the data, load, step, sample, save."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("anima_jax").setLevel(logging.INFO)
    arguments = parse_arguments(argv)
    config = load_config(
        arguments.config, overrides(arguments), i_know_what_i_am_doing=arguments.i_know_what_i_am_doing
    )
    for note in config.notes:
        print(note)

    tokenizers = load_tokenizers(config.model.tokenizer_path)
    with open_text_encoder(config.model.llm_path) as text_encoder:
        check_networks(dit_config(config), text_encoder.config, tokenizers)
    problems = Problems(strict=config.strict_data)
    data = read_data(config, problems, keep=not arguments.dry_run)
    if arguments.dry_run:
        print(data.describe(tokenizers))
        return
    encoders = Encoders(config, tokenizers)
    data.encode(encoders, problems)
    if arguments.dump_dataset:
        folder = dump_dataset(arguments.dump_dataset, data.examples, data.cache, encoders.vae, config.compute_dtype)
        print(f"wrote the data set, as the VAE gives it back, to {folder}")
    if arguments.cache_only or arguments.dump_dataset:
        return
    train(arguments, config, data, encoders)


def train(arguments: argparse.Namespace, config: MainConfig, data: TrainingData, encoders: Encoders) -> None:
    """Step through the plan, and draw and save on the way."""
    plan = data.plan
    total_steps = min(plan.steps_for(config.epochs), config.max_steps or sys.maxsize)
    print(data.describe(encoders.tokenizers))
    batches = Batches(config, data, encoders.tokenizers)
    encode_text = as_it_is if config.model.cache_text_embeddings else OnlineText(encoders.text_encoder, config)
    trained = prepare(config)
    print(report.parameter_table(trained, config.learning_rates))
    run = make_run_folder(config)
    optimizer = optimizers.build(optimizer_config(config, plan), trained.tensors)
    settings = step_config(config)
    step = compile_step(trained.graphdef, optimizer, settings)
    state = init_state(trained.params, optimizer, settings)
    trained = dataclasses.replace(trained, params={})  # they are the state's now
    sampler = make_sampler(config, trained, state, encoders, run / "samples")
    encoders.release()  # what nothing uses need not stay on the device

    unconditional = encode_text(batches.unconditional()) if config.uncond_fraction else None
    with (
        open(run / "metrics.jsonl", "w", encoding="utf-8") as log,
        contextlib.closing(prefetched(batches.load, 0, total_steps, threads=config.map_num_proc)) as loaded,
    ):
        progress = report.Progress(total_steps, log, every=config.steps_per_print)
        if sampler:
            sampler.draw(trained.frozen | state.params, 0)
        for done, (host_batch, accumulation) in enumerate(loaded, start=1):
            # This is handed to the device while it is still busy with the step before.
            batch = jax.device_put(host_batch)
            batch = batch._replace(text=encode_text(batch.text))
            state, metrics = step(state, trained.frozen, batch, unconditional, accumulation)
            progress.step(done, metrics._asdict())
            for name in exports_after(config, plan, done, total_steps):
                progress.flush()
                progress.say(f"saved {save_model(config, run / name, trained, state)}")
            if sampler and sampler.due(done, total_steps):
                progress.flush()
                progress.say(f"drew {sampler.draw(trained.frozen | best_params(state), done)}")
        progress.close()
    if isinstance(encode_text, OnlineText):
        print(f"encoding text took {encode_text.share(progress.seconds_a_step):.0%} of a step")
    print(f"sample with: {sample_command(arguments, run, example_prompt(config, data.examples))}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m anima_jax.train", description="Train Anima.")
    parser.add_argument("--config", required=True, metavar="FILE.toml", help="diffusion-pipe's main TOML")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replace a key: --set optimizer.lr=1e-5"
    )
    for key, what in SWITCHES.items():
        parser.add_argument(f"--{key}", action="store_true", help=what)
    parser.add_argument("--cache_only", action="store_true", help="fill the cache and stop")
    parser.add_argument(
        "--dump_dataset", metavar="DIR", help="write the cached clips as the VAE gives them back, and stop"
    )
    parser.add_argument("--dry_run", action="store_true", help="say what would be trained; nothing is written")
    parser.add_argument(
        "--i_know_what_i_am_doing", action="store_true", help="allow more than three resolutions in a data set"
    )
    return parser.parse_args(argv)


def overrides(arguments: argparse.Namespace) -> list[str]:
    """The keys that the command line sets."""
    return arguments.set + [f"{key}=true" for key in SWITCHES if getattr(arguments, key)]


def make_sampler(
    config: MainConfig, trained: Trained, state: TrainState, encoders: Encoders, folder: pathlib.Path
) -> Samples | None:
    """What draws pictures on the way, if the configuration asks for any."""
    if config.sample is None:
        return None
    model = merge(trained.graphdef, trained.frozen | state.params)
    pipeline = AnimaPipeline(
        model, encoders.vae, encoders.text_encoder, encoders.tokenizers, dtype=config.compute_dtype
    )
    return Samples(config.sample, config.sample_size_wh, pipeline, folder)


def step_config(config: MainConfig) -> StepConfig:
    """The part of the configuration that shapes one step."""
    model = config.model
    kind, parameter = config.loss
    return StepConfig(
        compute_dtype=jnp.dtype(config.compute_dtype),
        times=TimeDistribution(model.timestep_sample_method, model.sigmoid_scale, model.shift, model.flux_shift),
        loss=Loss(kind, parameter, model.multiscale_loss_weight or 0.0),
        seed=config.seed,
        uncond_fraction=config.uncond_fraction,
        ema_decay=config.ema_decay,
        remat=config.remat,
    )


def optimizer_config(config: MainConfig, plan: Plan) -> optimizers.OptimizerConfig:
    """The part of the configuration that shapes the optimizer; schedules run over all epochs, whatever `max_steps`."""
    return optimizers.OptimizerConfig(
        learning_rates=config.learning_rates,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        schedule=config.schedule.shape,
        warmup_steps=config.schedule.warmup_steps,
        total_steps=plan.steps_for(config.epochs),
        clip_norm=config.gradient_clipping,
    )


def make_run_folder(config: MainConfig) -> pathlib.Path:
    """A new folder in `output_dir`, named by the time (UTC), with copies of the TOMLs."""
    name = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d_%H-%M-%S")
    run = pathlib.Path(config.output_dir) / name
    run.mkdir(parents=True)
    for path in (config.path, config.dataset):
        shutil.copy(path, run)
    return run


def exports_after(config: MainConfig, plan: Plan, step: int, total_steps: int) -> list[str]:
    """Names of the folders to save the model in after `step` (from 1) steps: `epochN`, `stepN`, none or both."""
    names = []
    before, after = (plan.epochs_finished(n) for n in (step - 1, step))
    if config.save_every_n_epochs and after // config.save_every_n_epochs > before // config.save_every_n_epochs:
        names.append(f"epoch{after}")
    if (config.save_every_steps and step % config.save_every_steps == 0) or (step == total_steps and not names):
        names.append(f"step{step}")
    return names


def best_params(state: TrainState) -> Params:
    """The averaged weights if there are any, else the trained ones."""
    return state.params if state.ema is None else state.ema


def save_model(config: MainConfig, folder: pathlib.Path, trained: Trained, state: TrainState) -> pathlib.Path:
    """Write the best weights in the dtype that the configuration names."""
    scale = config.adapter.scale if config.adapter else 1.0
    return export(folder, trained, best_params(state), config.export_dtype, scale)


def sample_command(arguments: argparse.Namespace, run: pathlib.Path, prompt: str) -> str:
    """The command line that draws `prompt` with what the run saved."""
    words = ["python", "-m", "anima_jax.generate", "--config", arguments.config]
    words += [word for override in arguments.set for word in ("--set", override)]
    words += ["--checkpoint", str(run), "--prompt", prompt, "--seed", "1", "-o", "out.png"]
    return shlex.join(words)


def example_prompt(config: MainConfig, examples: Sequence[Example]) -> str:
    """A prompt that this run should be able to draw."""
    return config.sample.prompts[0] if config.sample else examples[0].captions[0]


if __name__ == "__main__":
    main()
