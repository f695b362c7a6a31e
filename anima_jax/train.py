"""python -m anima_jax.train --config FILE.toml"""

import argparse
import dataclasses
import datetime
import logging
import pathlib
import shlex
import shutil
import sys
from collections.abc import Sequence

import jax.numpy as jnp

from anima_jax.checkpoints.models import load_text_encoder, load_vae
from anima_jax.config.load import load_config
from anima_jax.config.main import MainConfig
from anima_jax.data.examples import Example
from anima_jax.data.plan import BatchPlan
from anima_jax.diffusion.objective import Loss, TimeDistribution
from anima_jax.errors import ArgumentParser, command_line
from anima_jax.models.parameters import Params, merge
from anima_jax.pipeline import AnimaPipeline, check_networks
from anima_jax.text.tokenizers import load_tokenizers
from anima_jax.training import optimizers, report
from anima_jax.training.encoded import EncodedData, read_data
from anima_jax.training.export import export
from anima_jax.training.samples import Samples
from anima_jax.training.state import Trained, prepare
from anima_jax.training.step import StepConfig, TrainState, compile_step, init_state


@command_line
def main(argv: Sequence[str] | None = None) -> None:
    """Train as the configuration says: load, encode the data once, step, sample, save."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("anima_jax").setLevel(logging.INFO)
    arguments = parse_arguments(argv)
    config = load_config(arguments.config, arguments.set)
    for note in config.notes:
        print(note)

    tokenizers = load_tokenizers(config.model.tokenizer_path)
    trained = prepare(config)
    qwen = load_text_encoder(config.model.llm_path, config.compute_dtype)
    check_networks(trained.config, qwen.config, tokenizers)
    vae = load_vae(config.model.vae_path, config.compute_dtype)
    print(report.parameter_table(trained, config.learning_rates))

    examples = read_data(config)
    plan = BatchPlan(len(examples), config.global_batch, config.seed)
    total_steps = min(plan.steps_for(config.epochs), config.max_steps or sys.maxsize)
    print(f"{len(examples)} examples, {total_steps} steps of {config.global_batch}; encoding")
    dataset = EncodedData(config, examples, vae, qwen, tokenizers)

    optimizer = optimizers.build(optimizer_config(config, plan), trained.tensors)
    settings = step_config(config)
    step = compile_step(trained.graphdef, optimizer, settings)
    state = init_state(trained.params, optimizer, settings)
    trained = dataclasses.replace(trained, params={})  # they are the state's now

    run = make_run_folder(config)
    sampler = None
    if config.sample is not None:
        model = merge(trained.graphdef, trained.frozen | state.params)
        pipeline = AnimaPipeline(model, vae, qwen, tokenizers, dtype=config.compute_dtype)
        sampler = Samples(config.sample, config.sample_size_wh, pipeline, run / "samples")
    del vae, qwen  # without samples they need not stay on the device
    with open(run / "metrics.jsonl", "w", encoding="utf-8") as log:
        progress = report.Progress(total_steps, log, every=config.steps_per_print)
        if sampler:
            sampler.draw(trained.frozen | state.params, 0)
        for done in range(total_steps):
            batch = dataset.batch(*plan.indices(done * config.global_batch))
            state, metrics = step(state, trained.frozen, batch, dataset.unconditional)
            progress.step(done + 1, metrics._asdict())
            for name in exports_after(config, plan, done + 1, total_steps):
                progress.flush()
                progress.say(f"saved {save_model(config, run / name, trained, state)}")
            if sampler and sampler.due(done + 1, total_steps):
                progress.flush()
                progress.say(f"drew {sampler.draw(trained.frozen | best_params(state), done + 1)}")
        progress.close()
    print(f"sample with: {sample_command(arguments, run, example_prompt(config, examples))}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m anima_jax.train", description="Train Anima.")
    parser.add_argument("--config", required=True, metavar="FILE.toml", help="diffusion-pipe's main TOML")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replace a key: --set optimizer.lr=1e-5"
    )
    return parser.parse_args(argv)


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
        accumulation=config.accumulation,
        remat=config.remat,
    )


def optimizer_config(config: MainConfig, plan: BatchPlan) -> optimizers.OptimizerConfig:
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


def exports_after(config: MainConfig, plan: BatchPlan, step: int, total_steps: int) -> list[str]:
    """Names of the folders to save the model in after `step` (from 1) steps: `epochN`, `stepN`, none or both."""
    names = []
    before, after = (plan.epochs_finished(n * config.global_batch) for n in (step - 1, step))
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
    return config.sample.prompts[0] if config.sample else examples[0].caption


if __name__ == "__main__":
    main()
