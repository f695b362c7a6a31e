"""Events at some steps of a run: exports, evaluations, and checks of a step's metrics."""

import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from anima_jax.data.dataset import TrainingData
from anima_jax.errors import NotFiniteError
from anima_jax.models.llm_adapter import Text
from anima_jax.parallel.hosts import is_process_0
from anima_jax.training.batches import Batches
from anima_jax.training.evaluate import Evaluation
from anima_jax.training.export import about_adapter, export, rotate
from anima_jax.training.export_metadata import export_metadata
from anima_jax.training.intervals import Every, RunPoint, crosses_multiple
from anima_jax.training.resume import Checkpointer
from anima_jax.training.run import Run
from anima_jax.training.selfcheck import ATTEMPTS, GroupNorms, norms_table, self_check
from anima_jax.training.state import ParamPartition
from anima_jax.training.step import StepConfig, TrainState, trained_weights
from anima_jax.training.writer import Writer, warn_and_continue


class Interruptible(Protocol):
    """An event that a request to stop may cut short; a resumed run repeats it."""

    def due(self, point: RunPoint) -> bool:
        """Return whether the event happens at this point."""
        ...

    def done(self, point: RunPoint) -> bool:
        """Return whether an earlier attempt completed the event at this point, from which the run resumes."""
        ...

    def perform(self, point: RunPoint, state: TrainState) -> None:
        """Perform the event with the weights of this state."""
        ...


class Export:
    """Exports the model to the run's folder after some epochs and steps, and at the end.

    `toml_files` is from `configuration_files`; each export has a copy of the main one. `data` is described in its
    metadata.
    """

    def __init__(
        self,
        run: Run,
        partition: ParamPartition,
        run_folder: pathlib.Path,
        writer: Writer,
        toml_files: Mapping[str, bytes],
        data: TrainingData,
    ):
        self._run, self._partition, self._run_folder, self._writer = run, partition, run_folder, writer
        self._data = data
        main = pathlib.Path(run.config.path).name
        self._files = {main: toml_files[main]}
        self.error = ""
        """Why the last export failed; empty if it succeeded."""

    def due(self, point: RunPoint) -> list[str]:
        """Return the names of the folders in which to save the model at this point; empty if none is due."""
        return export_names(self._run, point)

    def missing(self, point: RunPoint) -> list[str]:
        """Return those folders of `due` that have no model, as when an earlier attempt had a full disk."""
        return [name for name in self.due(point) if not any((self._run_folder / name).glob("*.safetensors"))]

    def perform(self, point: RunPoint, state: TrainState, names: Sequence[str] | None = None) -> None:
        """Save the model in every folder that is due, or those of `names`, and delete the oldest exports."""
        for name in self.due(point) if names is None else names:
            self._writer.flush()
            config, folder = self._run.config, self._run_folder / name
            self.error = f"{folder}: the model could not be saved"
            with warn_and_continue():
                about = about_adapter(config, self._partition, point.step)
                base = about and about.metadata.get("base_model_sha256")
                metadata = export_metadata(self._run, self._data, point, base)
                weights, dtype = trained_weights(state), config.export_dtype
                path = export(
                    folder,
                    self._partition,
                    weights,
                    dtype,
                    about,
                    ema=state.ema,
                    files=self._files,
                    metadata=metadata,
                    name=config.output_name,
                )
                self._writer.print(f"saved {path}")
                self.error = ""
                # Only now: if the export failed, the older ones are all there is.
                for old in rotate(self._run_folder, config.max_checkpoints) if is_process_0() else ():
                    self._writer.print(f"deleted {self._run_folder / old}")


def export_names(run: Run, point: RunPoint) -> list[str]:
    """Return the names of the folders in which to save the model at this point: `epochN`, `stepN`, both or none."""
    names = [f"epoch{point.epochs[1]}"] if crosses_multiple(run.config.save_every_n_epochs, *point.epochs) else []
    if crosses_multiple(run.save_every_steps, point.step - 1, point.step) or (
        point.step == point.total_steps and not names
    ):
        names.append(f"step{point.step}")
    return names


class Evaluate:
    """Evaluates the trained weights on every evaluation data set."""

    def __init__(
        self,
        run: Run,
        data_sets: Mapping[str, Batches],
        partition: ParamPartition,
        step_config: StepConfig,
        encode_text: Callable[[Text], Text],
        writer: Writer,
    ):
        config = run.config
        self._every = Every(run.eval_every_steps, config.eval_every_n_epochs, at_start=config.eval_before_first_step)
        self._data_sets, self._frozen = data_sets, partition.frozen
        self._evaluation = Evaluation(partition.graphdef, step_config)
        self._encode_text, self._writer = encode_text, writer

    def due(self, point: RunPoint) -> bool:
        return bool(self._data_sets) and self._every.due(point)

    def done(self, point: RunPoint) -> bool:
        return self._writer.evaluation_done

    def perform(self, point: RunPoint, state: TrainState) -> None:
        self._writer.flush()
        params, began, figures = self._frozen | trained_weights(state), time.monotonic(), {}
        for name, batches in self._data_sets.items():
            encoded = (
                (batch._replace(text=self._encode_text(batch.text)), weights_b)
                for batch, weights_b in batches.for_evaluation()
            )
            figures |= {f"{name}/{key}": loss for key, loss in self._evaluation(params, encoded).items()}
            self._writer.print(f"evaluation after step {point.step}: {name} {figures[f'{name}/loss']:.4f}")
        figures["eval/eval_time_sec"] = time.monotonic() - began
        self._writer.evaluation(point, figures)


class SelfCheck:
    """Checks in the first steps of a run that trained parameter groups have gradients and frozen ones do not move."""

    def __init__(self, run: Run, partition: ParamPartition, writer: Writer):
        rates, self._adapter = run.config.learning_rates, run.config.adapter is not None
        # The configuration chooses which groups have an adapter; the others have nothing to learn.
        self._rates = {group: rates[group] for group in partition.groups.values()} if self._adapter else rates
        self._attempts, self._writer = 0, writer

    @property
    def due(self) -> bool:
        """Whether too few steps have been checked. Steps whose loss or gradient is not finite do not count."""
        return self._attempts < ATTEMPTS

    def perform(self, point: RunPoint, norms: GroupNorms | None) -> None:
        """Check the norms that the step measured (None: skip the check). Raises UserError as `self_check` does."""
        self._writer.flush()
        if norms is None or not self._writer.last["finite"]:
            return
        self._attempts += 1
        loss, attempt = self._writer.last["loss"], self._attempts
        passed = self_check(norms, self._rates, step=point.step, attempt=attempt, loss=loss, adapter=self._adapter)
        if passed and attempt == 1:
            self._writer.print(norms_table(norms))


class SkippedUpdates:
    """Reports updates skipped because loss or gradient was not finite, and stops a run with too many in a row.

    `examples` maps a step of the run to the names of its examples.
    """

    def __init__(
        self,
        run: Run,
        run_folder: pathlib.Path,
        checkpointer: Checkpointer,
        writer: Writer,
        examples: Callable[[int], Sequence[str]],
    ):
        self._limit, self._run_folder, self._checkpoints = (
            run.config.max_skipped_steps,
            run_folder,
            checkpointer.checkpoints,
        )
        self._writer, self._examples, self._reported = writer, examples, 0

    def check(self) -> None:
        """Check the newest metrics, once a step.

        Raises NotFiniteError, naming the last good checkpoint, if too many updates in a row were skipped.
        """
        last, step = self._writer.last, self._writer.last_step
        if step == self._reported or last.get("finite", 1.0):
            return
        self._reported, skipped = step, int(last["skipped"])
        if not skipped:
            scale = f"the loss scale falls from {last['loss_scale']:g} to {last['loss_scale'] / 2:g}"
            self._writer.print(f"step {step}: the gradient exceeded float16, so the update was skipped; {scale}")
            return
        name, in_a_row = "gradient" if math.isfinite(last["loss"]) else "loss", f" ({skipped} in a row)"
        self._writer.print(
            f"step {step}: the {name} is not finite, so the update was skipped{in_a_row if skipped > 1 else ''}; "
            f"its examples: {_listed(self._examples(step))}"
        )
        if skipped >= self._limit:
            self._checkpoints.wait()
            latest = self._checkpoints.latest()
            good = "there is no checkpoint" if latest is None else f"the last good checkpoint is that of step {latest}"
            steps = "1 step" if skipped == 1 else f"{skipped} steps in a row"
            raise NotFiniteError(f"{self._run_folder}: {steps} had no finite loss or gradient; {good}")


def _listed(names: Sequence[str], limit: int = 16) -> str:
    """Return the first `limit` different names, and how many more there are."""
    different = list(dict.fromkeys(names))
    more = f" and {len(different) - limit} more" if len(different) > limit else ""
    return ", ".join(different[:limit]) + more
