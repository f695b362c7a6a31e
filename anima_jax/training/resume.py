"""Saving a run so that going on with it equals never having stopped, and saying what changed where it cannot.

A checkpoint is four items (parameters, optimizer, EMA, counters; never frozen parameters) and a page of JSON: the
position in the data, and what the model, the data set and the configuration were. Since every random number and the
order of the data are functions of the seed, the epoch and the step, nothing else is part of a run's state.
"""

import contextlib
import os
import pathlib
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from anima_jax.checkpoints.locations import writing_to
from anima_jax.checkpoints.locks import lock
from anima_jax.checkpoints.orbax import RunCheckpoints, flat
from anima_jax.data.batch_plan import BatchPlan
from anima_jax.errors import UserError, did_you_mean
from anima_jax.models.parameters import Params
from anima_jax.parallel.hosts import is_process_0
from anima_jax.training.fingerprints import changes, data_faults, model_faults, optimizer_faults
from anima_jax.training.intervals import crosses_multiple
from anima_jax.training.step import TrainState

FOLDER = "checkpoints"
"""Where a run's folder keeps them."""

SCHEMA = 2
"""Number of the format of a checkpoint's items and metadata."""

_RUN_NAME = re.compile(r"(\d{8}_\d{2}-\d{2}-\d{2})(.*)")
_HYPER_PARAMETERS = re.compile(r"(^|/)hyperparams/|/b1$")  # of inject_hyperparams, and of schedule-free


class Position(NamedTuple):
    """Where a run is, in finished steps.

    `step` counts the run's, `data_step` the plan's (another number after `--reset_dataloader` or a change of the data),
    `optimizer_step` those since the optimizer's state was fresh, which its learning rate follows.
    """

    step: int
    data_step: int
    optimizer_step: int

    def at(self, step: int) -> "Position":
        """The position of the same run when `step` of its steps are finished."""
        return Position(*(number + step - self.step for number in self))


class Resume:
    """Saves a run into `run/checkpoints` and brings it back. Close it: a program that ends while saving hangs.

    `facts` is what `facts_of` gives. Of checkpoints the newest `keep` stay (None: all).
    """

    def __init__(
        self,
        run: pathlib.Path,
        plan: BatchPlan,
        facts: Mapping[str, Any],
        *,
        keep: int | None = None,
        every_n_epochs: int | None = None,
        every_n_minutes: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._plan, self._facts = plan, facts
        self._epochs, self._minutes, self._clock = every_n_epochs, every_n_minutes, clock
        self._saved_at = clock()
        self.checkpoints = RunCheckpoints(run / FOLDER, keep=keep)
        self.start = Position(0, 0, 0)
        """Where training begins: as it is for a new run, and after `restore` where it goes on."""

    def restore(
        self,
        state: TrainState,
        init_optimizer: Callable[[Params], Any],
        *,
        reset_dataloader: bool = False,
        reset_optimizer: bool = False,
        reset_optimizer_params: bool = False,
    ) -> tuple[TrainState, list[str]]:
        """The newest checkpoint's state, and lines that say what is not as it was; `start` is where it goes on.

        `state` is a fresh one, whose shardings are kept; what the checkpoint replaces is deleted, as if donated. With
        `reset_dataloader` the epoch that was under way begins anew; with `reset_optimizer` the optimizer does, and what
        was not trained before starts from `state`. Hyper-parameters are the configuration's in any case, but for those
        that an optimizer keeps in its state: these only with `reset_optimizer_params`. Raises UserError, a line for
        every reason, if the checkpoint does not fit.
        """
        step = self.checkpoints.latest()
        if step is None:
            raise UserError(f"{self.checkpoints.folder}: holds no checkpoint to resume from")
        old = self.checkpoints.metadata(step)
        if old["schema"] != SCHEMA:
            raise UserError(
                f"{self.checkpoints.folder / str(step)}: is of format {old['schema']}, expected {SCHEMA} "
                "(this version's)"
            )
        layout = self.checkpoints.layout(step)
        faults = [
            *model_faults(old["model"], self._facts["model"], reset_optimizer),
            *([] if reset_optimizer else optimizer_faults(layout["optimizer"], state.opt_state, old, self._facts)),
            *([] if reset_dataloader else data_faults(old, self._facts, self._plan)),
        ]
        if faults:
            raise UserError(*(f"{self.checkpoints.folder / str(step)}: {fault}" for fault in faults))
        notes = changes(old, self._facts)
        data_step = self._plan.steps_for(old["epoch"]) if reset_dataloader else self._plan.step_at(old["position"])
        if reset_dataloader:
            notes.append(f"the data begin anew with epoch {old['epoch'] + 1}")
        if reset_optimizer:
            notes.append("the optimizer and its learning rates begin anew")

        saved = {path: state.params[path] for path in old["model"]}
        wanted = {"params": saved, "counters": _counters(state)}
        if not reset_optimizer:
            wanted["optimizer"] = state.opt_state
        if state.ema is not None and "ema" in layout:
            wanted["ema"] = {path: state.ema[path] for path in old["model"]}
        hyper_parameters = _chosen(state.opt_state, _HYPER_PARAMETERS) if reset_optimizer_params else {}
        found = self.checkpoints.restore(step, _abstract_and_deleted(wanted, set(map(id, hyper_parameters.values()))))

        params = state.params | found["params"]
        ema = state.ema
        if ema is not None and "ema" not in layout:
            ema = jax.tree.map(lambda average, value: jnp.array(value, average.dtype), ema, params)
            notes.append("the average of the weights (EMA) begins here: the checkpoint has none")
        elif ema is not None:
            ema = ema | found["ema"]
        elif "ema" in layout:
            notes.append("the average of the weights (EMA) in the checkpoint is not used: ema_decay is not set")
        opt_state = init_optimizer(params) if reset_optimizer else _replaced(found["optimizer"], hyper_parameters)
        state = state._replace(params=params, ema=ema, opt_state=opt_state, **found["counters"])
        self.start = Position(step, data_step, 0 if reset_optimizer else step - old["optimizer_start"])
        return state, notes

    def due(self, step: int) -> bool:
        """Whether the configuration wants a checkpoint after `step` steps of the run, by the epochs finished then."""
        before, after = (self._plan.epochs_finished(self.start.at(n).data_step) for n in (step - 1, step))
        return crosses_multiple(self._epochs, before, after)

    def overdue(self) -> bool:
        """Whether it wants one because so many minutes are over, by this process's clock."""
        return self._minutes is not None and self._clock() - self._saved_at >= 60 * self._minutes

    def postpone(self) -> None:
        """Begin the minutes anew: a checkpoint is asked for, which the processes agree on a step later."""
        self._saved_at = self._clock()

    def save(self, step: int, state: TrainState, *, wait: bool = False) -> bool:
        """Begin to write a checkpoint of the state after `step` steps; `state` may be donated when this returns.

        With `wait` it returns when the checkpoint is written. False if it could not be, which is logged.
        """
        position = self.start.at(step)
        items = {"params": state.params, "optimizer": state.opt_state, "counters": _counters(state)}
        if state.ema is not None:
            items["ema"] = state.ema
        metadata = {
            "schema": SCHEMA,
            "step": step,
            "position": self._plan.position(position.data_step),
            "epoch": self._plan.epochs_finished(position.data_step),
            "optimizer_start": step - position.optimizer_step,
            **self._facts,
        }
        self._saved_at = self._clock()
        self.checkpoints.save(step, items, metadata)
        if wait:
            self.checkpoints.wait()
        return self.checkpoints.writing or step in self.checkpoints.steps()

    def close(self) -> None:
        """Wait until what is being written is written."""
        self.checkpoints.close()

    def total_steps(self, epochs: int, max_steps: int | None = None) -> int:
        """Steps that the run has when `epochs` epochs of the data, or `max_steps`, are over."""
        steps = self.start.step + max(0, self._plan.steps_for(epochs) - self.start.data_step)
        return steps if max_steps is None else min(steps, max_steps)


def find_run(output_dir: str | os.PathLike[str], which: str) -> pathlib.Path:
    """The folder of the run to resume: "" is the newest in `output_dir` with a checkpoint, else a name there or a path.

    Raises UserError if there is none, or if it has no checkpoint.
    """
    root = pathlib.Path(output_dir)
    names = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    runs = sorted((match for name in names if (match := _RUN_NAME.fullmatch(name))), key=_age)
    if which == "":
        for match in reversed(runs):
            if _has_checkpoint(root / match[0]):
                return root / match[0]
        found = f"the newest of {len(runs)} runs is {runs[-1][0]}" if runs else "there is no run"
        raise UserError(f"resume_from_checkpoint: no run in {root} has a checkpoint ({found})")
    given = pathlib.Path(which)
    given = given.parent if given.name == FOLDER else given
    for folder in (root / given, given):
        if _has_checkpoint(folder):
            return folder
        if (folder / "latest").is_file() or list(folder.glob("global_step*")):
            raise UserError(
                f"resume_from_checkpoint: {folder} has checkpoints of DeepSpeed, which only diffusion-pipe can resume; "
                "to train on, start from the model or adapter that it saved"
            )
        if folder.is_dir():
            raise UserError(f"resume_from_checkpoint: {folder} has no checkpoint (expected {folder / FOLDER}/<step>)")
    near = did_you_mean(which, [match[0] for match in runs])
    raise UserError(f"resume_from_checkpoint: found {which}, expected the name of a run in {root} or its path{near}")


def replicas_of(run: pathlib.Path) -> int:
    """The replicas that a run's batches were made for. Raises UserError if its newest checkpoint cannot be read."""
    checkpoints = RunCheckpoints(run / FOLDER, keep=None)
    step = checkpoints.latest()
    return 1 if step is None else checkpoints.metadata(step).get("replicas", 1)


@contextlib.contextmanager
def alone_in(run: pathlib.Path) -> Iterator[None]:
    """No other run trains in this folder while the block is under way; one that ends in any way lets go.

    Of a run's processes the first one sees to it. Raises UserError if another run is there already. A file system
    without locks lets everyone in.
    """
    if not is_process_0():
        yield
        return
    with writing_to(os.fspath(run)):
        descriptor = os.open(run / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            lock(descriptor, wait=False)
        except BlockingIOError:
            who = os.read(descriptor, 200).decode(errors="replace").strip()
            raise UserError(f"{run}: is being trained by {who or 'another process'}") from None
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def _counters(state: TrainState) -> dict[str, Any]:
    """What counts steps: every field that is no tree of parameters or of the optimizer."""
    return {name: value for name, value in state._asdict().items() if name not in {"params", "opt_state", "ema"}}


def _abstract_and_deleted(tree: Any, spared: set[int]) -> Any:
    """Shapes, dtypes and shardings of `tree`, whose arrays, but for those of the `spared` ids, leave the memory."""

    def abstract(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    tree = jax.tree.map(jnp.asarray, tree)
    found = jax.tree.map(abstract, tree)
    for leaf in jax.tree.leaves(tree):
        if id(leaf) not in spared:
            leaf.delete()
    return found


def _chosen(tree: Any, pattern: re.Pattern[str]) -> dict[str, Any]:
    """Path → leaf of the leaves whose path the pattern finds."""
    return {path: leaf for path, leaf in flat(tree).items() if pattern.search(path)}


def _replaced(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """`tree` with these leaves in the place of its own."""
    return jax.tree.unflatten(jax.tree.structure(tree), {**flat(tree), **leaves}.values())


def _has_checkpoint(run: pathlib.Path) -> bool:
    return RunCheckpoints(run / FOLDER, keep=None).latest() is not None


def _age(run: re.Match[str]) -> tuple[str, int, str]:
    """Sorts names of runs: by time, then by suffix, -2 before -10."""
    return run[1], len(run[2]), run[2]
