"""The training loop: step through the plan from where the run is, and save, evaluate, draw and report on the way."""

import contextlib
import dataclasses
import logging
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import optax

from anima_jax.config.main import MainConfig
from anima_jax.data.batch_plan import BatchPlan
from anima_jax.data.dataset import TrainingData
from anima_jax.data.encoders import Encoders
from anima_jax.data.examples import contents_of
from anima_jax.data.loader import prefetched
from anima_jax.errors import UserError
from anima_jax.models.parameters import Params, merge
from anima_jax.parallel.hosts import Consensus, is_process_0
from anima_jax.parallel.mesh import current_mesh
from anima_jax.sampling.pipeline import AnimaPipeline
from anima_jax.training import estimate, optimizers, report
from anima_jax.training.batches import Batches, OnlineText, as_it_is
from anima_jax.training.evaluate import Evaluation
from anima_jax.training.export import about_adapter, export, rotate
from anima_jax.training.figures import JsonlWriter
from anima_jax.training.fingerprints import facts_of, frozen_fingerprint, settings_of
from anima_jax.training.intervals import crosses_multiple
from anima_jax.training.monitor import Monitor
from anima_jax.training.profiling import Profiler, watch_compilation
from anima_jax.training.resume import Resume
from anima_jax.training.run import Run
from anima_jax.training.samples import Samples
from anima_jax.training.selfcheck import ATTEMPTS, norms_table, self_check
from anima_jax.training.signals import REQUESTS, Request, Signals
from anima_jax.training.state import ParamPartition, prepare
from anima_jax.training.step import Metrics, StepConfig, compile_step, init_state

log = logging.getLogger(__name__)


def learning_rates(config: MainConfig, plan: BatchPlan | None = None) -> optimizers.LearningRates:
    """The learning rates of a run. Schedules run over all epochs, whatever `max_steps` is.

    Without a plan the number of steps is not known: enough to check the optimizer, not to train.
    """
    schedule = config.schedule
    steps = plan.steps_for(config.epochs) if plan else 1
    return optimizers.LearningRates(config.learning_rates, schedule.shape, schedule.warmup_steps, steps)


def build_optimizer(
    config: MainConfig, trained: ParamPartition, plan: BatchPlan | None = None
) -> optax.GradientTransformation:
    """Build the optimizer of a run; without a plan it is only good for checking the configuration."""
    return optimizers.build(
        config.optimizer,
        learning_rates(config, plan),
        trained.tensors,
        clip_norm=config.gradient_clipping,
        global_batch=max(tier.batch_size for tier in plan.tiers) if plan else 1,
        layer_rates=trained.rates,
    )


class Training:
    """One run in its folder: networks, state, and everything that happens between its first step and its last."""

    def __init__(
        self,
        run: Run,
        data: TrainingData,
        evaluated: Mapping[str, TrainingData],
        encoders: Encoders,
        folder: pathlib.Path,
        profile: range | None = None,
    ):
        config = run.config
        self._run, self._config, self._data, self._plan, self._folder = run, config, data, data.plan, folder
        mesh = current_mesh()
        self._agreed = Consensus(mesh)
        encoders = encoders.on(mesh)
        self._batches = Batches(run, data, encoders.tokenizers)
        self._evaluated = {name: Batches(run, each, encoders.tokenizers) for name, each in evaluated.items()}
        # A text encoder that is trained runs inside the step.
        ready = config.model.cache_text_embeddings or config.trains_text_encoder
        self._encode_text = as_it_is if ready else OnlineText(encoders.text_encoder, config)

        self._settings = StepConfig.of(config)
        trained = prepare(config, lambda: encoders.text_encoder)
        print(report.start_up_table(config, trained, data.describe(encoders.tokenizers)))
        optimizer = build_optimizer(config, trained, data.plan)
        self.state = init_state(trained.params, optimizer, self._settings)
        places = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        self._step = compile_step(trained.graphdef, optimizer, self._settings, trained.groups, places)
        self._evaluation = Evaluation(trained.graphdef, self._settings)
        self._trained = dataclasses.replace(trained, params={})  # they are the state's now
        work = estimate.step_workloads(run, data, *data.text_rows(encoders.tokenizers))
        self._flops = [estimate.example_flops(trained, self._settings, each).model * each.batch for each in work]
        facts = facts_of(
            self.state.params,
            trained.groups,
            data.plan,
            data.ids,
            settings_of(config.model_dump(mode="json")),
            contents=contents_of(data.examples),
            files=encoders.fingerprints | frozen_fingerprint(trained.frozen),
            replicas=run.batch_replicas,
        )
        self.resume = Resume(
            folder,
            data.plan,
            facts,
            keep=config.max_checkpoints,
            every_n_epochs=config.checkpoint_every_n_epochs,
            every_n_minutes=config.checkpoint_every_n_minutes,
        )
        if config.resume_from_checkpoint is not None:
            self._go_on(optimizer)
        rates = learning_rates(config, data.plan)
        self._rates = lambda step: rates.at(self.resume.start.at(step).optimizer_step)
        self._profiler = Profiler(profile, folder / "profile")
        self._encoders = encoders
        self._skipped, self._saved, self._unsaved = 0, -1, ""
        self._evaluations: JsonlWriter | None = None

    def _go_on(self, optimizer) -> None:
        config = self._config
        self.state, notes = self.resume.restore(
            self.state,
            lambda params: init_state(params, optimizer, self._settings).opt_state,
            reset_dataloader=config.reset_dataloader,
            reset_optimizer=config.reset_optimizer,
            reset_optimizer_params=config.reset_optimizer_params,
        )
        print(f"resumed {self._folder} after step {self.resume.start.step}")
        for note in notes:
            print(f"  {note}")

    def run(self) -> None:
        """Train to the end, or until someone asks to stop."""
        config, start = self._config, self.resume.start
        total = self.resume.total_steps(config.epochs, config.max_steps)
        resumed = config.resume_from_checkpoint is not None
        position = self._position(start.step)
        epoch_begins = start.step - start.data_step + self._plan.steps_for(self._plan.epochs_finished(start.data_step))
        with (
            contextlib.closing(Signals(self._folder)) as signals,
            contextlib.closing(
                JsonlWriter(self._folder / "metrics.jsonl", start.step, remembered=epoch_begins + 1)
            ) as metrics_log,
            contextlib.closing(self.resume),
            contextlib.closing(
                Monitor(self._folder, config, resumed_after=(start.step, position) if resumed else None)
            ) as self._monitor,
            contextlib.closing(self._profiler),
            contextlib.closing(self._progress_bar(total, metrics_log)) as self._progress,
            contextlib.ExitStack() as opened,
        ):
            if self._evaluated:
                evaluations = contextlib.closing(JsonlWriter(self._folder / "evaluations.jsonl", start.step))
                self._evaluations = opened.enter_context(evaluations)
            samples = self._samples()
            if self._encode_text is as_it_is:
                self._encoders.release()  # what nothing uses need not stay on the device
            if not self._show_and_heed(start.step, total, signals, samples):
                for step, metrics in self._steps(total):
                    self._look_at(step, metrics)
                    if self._after(step, total, signals, samples):
                        break
                else:
                    self._progress.flush()
                    self._stop_if_lost(self._progress.last)
                    if self._unsaved:
                        raise UserError(self._unsaved)
        if isinstance(self._encode_text, OnlineText):
            print(f"encoding text took {self._encode_text.share(self._progress.seconds_a_step):.0%} of a step")

    def _progress_bar(self, total: int, metrics_log: JsonlWriter) -> report.Progress:
        config, start = self._config, self.resume.start
        return report.Progress(
            total,
            metrics_log,
            every=config.steps_per_print,
            logging_steps=config.logging_steps,
            monitor=self._monitor,
            rates=self._rates,
            peak_flops=estimate.peak_flops(jax.devices(), config.compute_dtype),
            start=(start.step, self._position(start.step), self._plan.epochs_finished(start.data_step)),
            epoch_losses=[line["loss"] for line in metrics_log.kept if line.get("loss") is not None],
        )

    def _asked(self, signals: Signals, *, after_step: bool = False) -> Request | None:
        """What any of the run's processes is asked for; after a step also a checkpoint that is overdue."""
        number = REQUESTS.index(signals.requested())
        if after_step and is_process_0() and self.resume.overdue() and self._updated():
            self.resume.postpone()
            number = max(number, REQUESTS.index("save"))
        return REQUESTS[self._agreed(number)]

    def _after(self, step: int, total: int, signals: Signals, samples: Samples | None) -> bool:
        """Save, evaluate and draw what is due after `step`; whether the run is to stop, as it was asked to."""
        for name in exports_after(self._run, self._epochs_at(step), step, total):
            self._save_model(name, step)
        if step == total or (self.resume.due(step) and self._updated()):
            self._save_checkpoint(step)
        asked = self._asked(signals, after_step=True)
        return self._heeded(asked, step) or self._show_and_heed(step, total, signals, samples)

    def _show_and_heed(self, step: int, total: int, signals: Signals, samples: Samples | None) -> bool:
        """Evaluate and draw what is due after `step` until someone asks to stop; whether the run is to."""
        due = self._shown_after(step, total, samples)
        if not due and step > self.resume.start.step:
            return False  # to ask a second time would be to wait for the step

        def show() -> None:
            for one in due:
                one()

        signals.cut_short(show)
        return self._heeded(self._asked(signals), step)

    def _shown_after(self, step: int, total: int, samples: Samples | None) -> list[Callable[[], None]]:
        """The evaluation and pictures due after `step`; where a resumed run goes on, what it was stopped before."""
        goes_on, epochs, due = step == self.resume.start.step, self._epochs_at(step), list[Callable[[], None]]()
        if goes_on and step and self._config.reset_dataloader:
            return due
        evaluations = self._evaluations
        if evaluations and self._evaluation_due(step, epochs) and not (goes_on and evaluations.kept):
            due.append(lambda: self._evaluate(step, evaluations))
        if samples and samples.due(step, total, *epochs) and not (goes_on and step and samples.path(step).exists()):
            due.append(lambda: self._draw(step, samples))
        return due

    def _heeded(self, asked: Request | None, step: int) -> bool:
        """Save if that is asked for; whether the run is to stop. One that cannot be saved is better off going on."""
        kept = bool(asked) and self._save_checkpoint(step, wait=asked == "save_quit")
        if asked != "save_quit" or not kept:
            return False
        self._progress.say(f"stopped after step {step}, as asked; resume with --resume_from_checkpoint {self._folder}")
        return True

    def _steps(self, total: int) -> Iterator[tuple[int, Metrics]]:
        """Number and metrics of each step that is left, as it is handed to the device."""
        unconditional = self._encode_text(self._batches.unconditional()) if self._config.uncond_fraction else None
        first, last = self._data_step(self.resume.start.step), self._data_step(total)
        compiled: set[tuple[int, int]] = set()
        loading = prefetched(self._batches.load, first, last, threads=self._config.map_num_proc)
        with contextlib.closing(loading) as loaded:
            for step in range(self.resume.start.step + 1, total + 1):
                waiting = time.monotonic()
                host_batch, accumulation, tier = next(loaded)
                waited = time.monotonic() - waiting
                # This is handed to the device while it is still busy with the step before.
                batch = self._batches.put(host_batch, tier)
                batch = batch._replace(text=self._encode_text(batch.text))
                arguments = (self.state, self._trained.frozen, batch, unconditional, accumulation)
                program = (self._plan.tiers[tier].tokens, self._plan.tiers[tier].batch_size)
                if program in compiled:
                    self.state, metrics = self._profiler.run(step, self._step, *arguments)
                else:
                    with watch_compilation() as compilation:
                        self.state, metrics = self._profiler.run(step, self._step, *arguments)
                    compiled.add(program)
                    self._progress.say(f"the step of tier {self._plan.tiers[tier].name} was compiled in {compilation}")
                self._progress.step(
                    step,
                    {name: value for name, value in metrics._asdict().items() if name != "norms"},
                    examples=self._position(step),
                    epoch=self._plan.epochs_finished(self._data_step(step)),
                    flops=self._flops[tier],
                    waited=waited,
                )
                yield step, metrics

    # ---- what happens at steps ------------------------------------------------------------------------------------

    def _look_at(self, step: int, metrics: Metrics) -> None:
        """Stop a run that does not learn what it should, or whose losses are not finite any more."""
        attempt = step - self.resume.start.step
        if attempt <= ATTEMPTS and metrics.norms:
            self._progress.flush()
            adapter = self._config.adapter is not None
            rates = self._config.learning_rates
            if adapter:  # which groups it has is the configuration's to choose
                rates = {group: rates[group] for group in self._trained.groups.values()}
            loss = self._progress.last["loss"]
            well = self_check(metrics.norms, rates, step=step, attempt=attempt, loss=loss, adapter=adapter)
            if well and attempt == 1:
                self._progress.say(norms_table(metrics.norms))
        self._stop_if_lost(self._progress.last)

    def _stop_if_lost(self, figures: Mapping[str, float]) -> None:
        skipped = int(figures.get("skipped", 0))
        if skipped > self._skipped:
            self._progress.say(f"the loss or its gradient is not finite: {skipped} updates in a row were left out")
        self._skipped = skipped
        if skipped >= self._config.max_skipped_steps:
            self.resume.checkpoints.wait()
            latest = self.resume.checkpoints.latest()
            good = "there is no checkpoint" if latest is None else f"the last good checkpoint is that of step {latest}"
            raise UserError(f"{self._folder}: {skipped} steps in a row had no finite loss or gradient; {good}")

    def _updated(self) -> bool:
        """Whether the newest step changed the weights: while updates are left out, the checkpoint before them stays."""
        self._progress.flush()
        return not self._progress.last.get("skipped")

    def _save_model(self, name: str, step: int) -> None:
        self._progress.flush()
        config = self._config
        about, ema = about_adapter(config, self._trained, step), self.state.ema
        self._unsaved = f"{self._folder / name}: the model could not be saved"
        with _going_on():
            saved = export(self._folder / name, self._trained, self._weights(), config.export_dtype, about, ema=ema)
            if is_process_0():
                shutil.copy(config.path, self._folder / name)
            self._progress.say(f"saved {saved}")
            self._unsaved = ""
        for old in rotate(self._folder, config.max_checkpoints) if is_process_0() else ():
            self._progress.say(f"deleted {self._folder / old}")

    def _save_checkpoint(self, step: int, *, wait: bool = False) -> bool:
        self._progress.flush()
        kept = self.resume.save(step, self.state, wait=wait)
        if kept and step != self._saved:
            self._saved = step
            done = "wrote" if wait else "writing"
            self._progress.say(f"{done} the checkpoint of step {step} to {self.resume.checkpoints.folder}")
        return kept

    def _evaluation_due(self, step: int, epochs: tuple[int, ...]) -> bool:
        config = self._config
        if step == 0:
            return config.eval_before_first_step
        return crosses_multiple(self._run.eval_every_steps, step - 1, step) or crosses_multiple(
            config.eval_every_n_epochs, *epochs
        )

    def _evaluate(self, step: int, lines: JsonlWriter) -> None:
        """The losses of each data set at the nine times, with the trained weights (averaged ones of schedule-free)."""
        self._progress.flush()
        params, began, figures = self._all(self._weights()), time.monotonic(), {}
        for name, batches in self._evaluated.items():
            encoded = ((batch._replace(text=self._encode_text(batch.text)), w) for batch, w in batches.evaluated())
            figures |= {f"{name}/{key}": loss for key, loss in self._evaluation(params, encoded).items()}
            self._progress.say(f"evaluation after step {step}: {name} {figures[f'{name}/loss']:.4f}")
        figures["eval/eval_time_sec"] = time.monotonic() - began
        self._monitor.scalars(step, self._position(step), figures)
        lines.add(step, figures)

    def _draw(self, step: int, samples: Samples) -> None:
        self._progress.flush()
        with _going_on():
            self._progress.say(f"drew {samples.draw(self._all(self._best()), step, self._position(step))}")

    # ---- weights and positions ------------------------------------------------------------------------------------

    def _weights(self) -> Params:
        """The trained weights; those that a schedule-free optimizer averages, if it is one."""
        averaged = optimizers.averaged(self.state.opt_state, self.state.params)
        return self.state.params if averaged is None else averaged

    def _best(self) -> Params:
        """The moving average if there is one, else the trained weights."""
        return self._weights() if self.state.ema is None else self.state.ema

    def _all(self, params: Params) -> Params:
        return self._trained.frozen | params

    def _data_step(self, step: int) -> int:
        return self.resume.start.at(step).data_step

    def _epochs_at(self, step: int) -> tuple[int, int]:
        """Epochs finished before and after `step`."""
        before, after = (self._plan.epochs_finished(max(0, self._data_step(n))) for n in (step - 1, step))
        return before, after

    def _position(self, step: int) -> int:
        """Examples consumed after `step` steps."""
        return self._plan.position(self._data_step(step))

    def _samples(self) -> Samples | None:
        """What draws pictures on the way, if the configuration asks for any."""
        config, encoders = self._config, self._encoders
        if config.sample is None:
            return None
        model = merge(self._trained.graphdef, self._all(self.state.params))
        text_encoder = encoders.text_encoder if model.text_encoder is None else model.text_encoder
        pipeline = AnimaPipeline(model, encoders.vae, text_encoder, encoders.tokenizers, dtype=config.compute_dtype)
        return Samples(config.sample, config.sample_size_wh, pipeline, self._folder / "samples", self._monitor)


@contextlib.contextmanager
def _going_on() -> Iterator[None]:
    """What cannot be written in the block is said, and the run goes on."""
    try:
        yield
    except (OSError, UserError) as error:
        log.warning(f"{error}; the run goes on")


def exports_after(run: Run, epochs: tuple[int, ...], step: int, total_steps: int) -> list[str]:
    """Names of the folders to save the model in after `step` (from 1) steps: `epochN`, `stepN`, none or both.

    `epochs` are the numbers of finished epochs before and after the step.
    """
    names = [f"epoch{epochs[1]}"] if crosses_multiple(run.config.save_every_n_epochs, *epochs) else []
    if crosses_multiple(run.save_every_steps, step - 1, step) or (step == total_steps and not names):
        names.append(f"step{step}")
    return names
