"""python -m anima_jax.train --config FILE.toml"""

import argparse
import dataclasses
import datetime
import functools
import logging
import pathlib
import shutil
import sys
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from anima_jax import encode
from anima_jax.checkpoints.models import load_text_encoder, load_vae
from anima_jax.config.dataset import DirectorySource
from anima_jax.config.load import load_config
from anima_jax.config.main import MainConfig
from anima_jax.data.examples import Example, directory_examples
from anima_jax.data.plan import BatchPlan
from anima_jax.data.tfds_source import tfds_examples
from anima_jax.diffusion.objective import Loss, TimeDistribution
from anima_jax.diffusion.randomness import split_ids
from anima_jax.errors import ArgumentParser, command_line
from anima_jax.models.dit import PATCH
from anima_jax.models.parameters import compute_copy, merge
from anima_jax.pipeline import PIXELS_PER_LATENT, AnimaPipeline, check_networks
from anima_jax.text.tokenizers import load_tokenizers
from anima_jax.training import optimizers, report
from anima_jax.training.export import export
from anima_jax.training.state import Trained, prepare
from anima_jax.training.step import Batch, StepConfig, TrainState, compile_step, init_state


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
    pipeline = AnimaPipeline(
        merge(trained.graphdef, trained.frozen | state.params), vae, qwen, tokenizers, dtype=config.compute_dtype
    )
    draw = functools.partial(draw_samples, config, pipeline, run, trained)
    save = functools.partial(save_model, config, run, trained)
    with open(run / "metrics.jsonl", "w", encoding="utf-8") as log:
        progress = report.Progress(total_steps, log, every=config.steps_per_print)
        draw(state, 0)
        for done in range(total_steps):
            batch = dataset.batch(*plan.indices(done * config.global_batch))
            state, metrics = step(state, trained.frozen, batch, dataset.unconditional)
            progress.step(done + 1, metrics._asdict())
            for name in exports_after(config, plan, done + 1, total_steps):
                progress.flush()
                path = save(state, name)
                progress.say(f"saved {path}")
            if samples_after(config, done + 1, total_steps):
                progress.flush()
                progress.say(f"drew {draw(state, done + 1)}")
        progress.close()
    print(f"sample with: python -m anima_jax.generate --config {arguments.config} --checkpoint {run} "
          f'--prompt "{example_prompt(config, examples)}" --seed 1 -o out.png')  # fmt: skip


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m anima_jax.train", description="Train Anima.")
    parser.add_argument("--config", required=True, metavar="FILE.toml", help="diffusion-pipe's main TOML")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replace a key: --set optimizer.lr=1e-5"
    )
    return parser.parse_args(argv)


def read_data(config: MainConfig) -> list[Example]:
    """The examples of every source of the dataset TOML, in its order."""
    examples: list[Example] = []
    for source in config.data.sources:
        common = {
            "caption_prefix": source.caption_prefix,
            "num_repeats": source.num_repeats,
            "skip_empty_caption": source.skip_empty_caption,
        }
        if isinstance(source, DirectorySource):
            examples += directory_examples(source.path, source.size_wh, **common)
        else:
            examples += tfds_examples(
                source.name or source.builder_dir or "",
                source.split,
                source.image,
                source.caption,
                source.size_wh,
                data_dir=source.data_dir,
            )
    return examples


class EncodedData:
    """The examples as latent tokens and text states, in host memory; `batch` gives those of one step."""

    def __init__(self, config: MainConfig, examples: Sequence[Example], vae, qwen, tokenizers):
        width, height = config.data.size_wh
        pictures = (example.pixels() for example in examples)
        size = config.caching_batch_size
        encoded = encode.encode_pictures(vae, pictures, batch_size=size, dtype=config.compute_dtype)
        self._latents_nlc = np.stack(list(report.bar(encoded, len(examples), "picture")))
        self._grid_3 = (1, *(side // PIXELS_PER_LATENT // PATCH for side in (height, width)))
        self._ids_n2 = split_ids(np.array([example.id for example in examples], np.uint64))
        self._captions = [example.caption for example in examples]
        self._texts = encode.encode_captions(qwen, tokenizers, ["", *self._captions], dtype=config.compute_dtype)
        self.unconditional = self._texts.rows([""]) if config.uncond_fraction else None

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> Batch:
        """The examples of these indices, in these epochs."""
        return Batch(
            latents_blc=self._latents_nlc[indices],
            grid_b3=np.tile(np.array(self._grid_3, np.int32), (len(indices), 1)),
            ids_b2=self._ids_n2[indices],
            epochs_b=epochs.astype(np.int32),
            text=self._texts.rows([self._captions[index] for index in indices]),
        )


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


def samples_after(config: MainConfig, step: int, total_steps: int) -> bool:
    """Whether samples are drawn after `step` (from 1) steps."""
    return config.sample is not None and (step % config.sample.every_n_steps == 0 or step == total_steps)


def save_model(config: MainConfig, run: pathlib.Path, trained: Trained, state: TrainState, name: str) -> pathlib.Path:
    """Write the averaged weights if there are any, else the trained ones."""
    scale = config.adapter.scale if config.adapter else 1.0
    return export(run / name, trained, state.params if state.ema is None else state.ema, config.export_dtype, scale)


def draw_samples(
    config: MainConfig, pipeline: AnimaPipeline, run: pathlib.Path, trained: Trained, state: TrainState, step: int
) -> pathlib.Path | None:
    """A grid of `[sample]`'s prompts and seeds, drawn with the weights that would be saved."""
    settings = config.sample
    if settings is None:
        return None
    params = trained.frozen | (state.params if state.ema is None else state.ema)
    pipeline.dit_params = compute_copy(params, jnp.dtype(config.compute_dtype))
    width, height = config.sample_size_wh
    images, captions = [], []
    for seed in settings.seeds:
        images += pipeline(
            settings.prompts,
            width=width,
            height=height,
            steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            shift=settings.shift,
            seed=seed,
        )
        captions += settings.prompts
    path = run / "samples" / f"step{step:06d}.png"
    report.save_picture(report.sample_grid(images, captions), path)
    return path


def example_prompt(config: MainConfig, examples: Sequence[Example]) -> str:
    """A prompt that this run should be able to draw."""
    return config.sample.prompts[0] if config.sample else examples[0].caption


if __name__ == "__main__":
    main()
