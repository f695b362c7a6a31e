"""Saving and resuming a run. A resumed run equals one that was never stopped, or messages say what changed.

A checkpoint has up to five items (parameters, optimizer, EMA, counters, loss scale; never frozen parameters) and JSON
metadata: the position in the data, and a description of the model, the data set and the configuration. A run has no
other state, because random numbers and the order of the data are functions of the seed, the epoch and the step.
"""

import pathlib
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from anima_jax.checkpoints.orbax import (
    DamagedError,
    RunCheckpoints,
    abstract_and_deleted,
    layout_differences,
    layout_of,
    matching,
    replaced,
)
from anima_jax.data.batch_plan import BatchPlan, data_fingerprint
from anima_jax.data.examples import CONTENTS
from anima_jax.errors import UserError, plural, shorten, show_value
from anima_jax.models.parameters import Params
from anima_jax.parallel import hosts
from anima_jax.training.intervals import RunPoint
from anima_jax.training.step import TrainState

FOLDER = "checkpoints"
"""Name of the folder of checkpoints in a run's folder."""

SCHEMA = 2
"""Version of a checkpoint's items and metadata."""

MAX_SETTINGS = 12
"""Maximum number of changed keys of the configuration that messages name."""

# Keys of the configuration that do not affect training, or that are compared in another way.
_IRRELEVANT = re.compile(
    r"path|messages|memory|seed|output_dir|dataset|monitoring|sample|(save|checkpoint|eval|reset)_\w+|resume(_\w+)?|run_name"
    r"|max_checkpoints|output_name|cache_dir|cache_local_dir|regenerate_cache|trust_cache|caching_batch_size|compilation_cache_dir"
    r"|map_num_proc|strict_data|allow_unused|steps_per_print|logging_steps|x_axis_examples"
)

# Keys that may differ between processes. Data and encoders at some of these paths are compared by their contents.
_PER_PROCESS = re.compile(
    r"(\w+\.)*(\w*path|dataset|config)|messages|cache_local_dir|compilation_cache_dir|map_num_proc"
    r"|monitoring\.\w+"
)

_HYPER_PARAMETERS = re.compile(r"(^|/)hyperparams/|/b1$")  # names in optax's inject_hyperparams and schedule_free

# ---- describing a run ---------------------------------------------------------------------------------------------


def run_metadata(
    params: Params,
    groups: Mapping[str, str],
    plan: BatchPlan,
    ids: np.ndarray,
    settings: Mapping[str, Any],
    *,
    contents: Mapping[str, np.ndarray] = {},
    files: Mapping[str, str] = {},
    replicas: int = 1,
) -> dict[str, Any]:
    """Return the description of a run that its checkpoints contain.

    `params` (arrays or shapes) are the trained parameters, `groups` their groups by path; `ids` and `contents` are as
    in `data_fingerprint`, `settings` is from `training_settings`. `files` maps the name, for messages, of each encoder
    or set of weights that the run uses but does not train to its fingerprint. `replicas` is `Run.batch_replicas`.
    """
    return {
        "replicas": replicas,
        "model": {path: {"group": groups[path], "array": array} for path, array in layout_of(params).items()},
        "files": dict(files),
        "data": data_fingerprint(plan, ids, contents),
        "settings": dict(settings),
        "versions": {"jax": jax.__version__, "device": jax.devices()[0].device_kind},
    }


def frozen_fingerprint(frozen: Params) -> dict[str, str]:
    """Return a checksum of the bits of the frozen weights, the same on any devices; empty if there are none."""
    return {"the frozen weights": f"{int(_sum_of_bits(frozen)):x}"} if frozen else {}


@jax.jit
def _sum_of_bits(params: Params) -> jax.Array:
    def bits(leaf: jax.Array) -> jax.Array:
        numbers = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
        return jnp.sum(numbers.astype(jnp.uint32), dtype=jnp.uint32)

    return sum(map(bits, jax.tree.leaves(params)), jnp.uint32(0))


def training_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a configuration (`model_dump(mode="json")`) that affect training: dotted key → value."""
    return _dotted({key: value for key, value in config.items() if not _IRRELEVANT.fullmatch(key)})


def shared_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a configuration that must be equal in all processes of a run: dotted key → value."""
    return {key: value for key, value in _dotted(config).items() if not _PER_PROCESS.fullmatch(key)}


def _dotted(table: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested tables and lists of tables into dotted keys, without keys whose value is None."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = dict(enumerate(value))  # noqa: PLW2901 - the same value in another form
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": inner for name, inner in _dotted(value).items()}
        elif value is not None:
            found[key] = value
    return found


# ---- comparing two descriptions -----------------------------------------------------------------------------------


class Difference(NamedTuple):
    """A difference between a run and a checkpoint.

    One with a `remedy` is an error: the run cannot resume, unless the flag `waived_by` is given.
    """

    message: str
    remedy: str = ""
    waived_by: str = ""


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Return the differences between the metadata of two runs: model, data, files, configuration, versions."""
    found = [*_model_differences(old["model"], new["model"]), *_data_differences(old, new)]
    messages = [f"{name} changed" for name, own in new["files"].items() if old["files"].get(name, own) != own]
    before, now = old["settings"], new["settings"]
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    messages += [f"{key} was {show_value(before.get(key))}, now {show_value(now.get(key))}" for key in changed][
        :MAX_SETTINGS
    ]
    if len(changed) > MAX_SETTINGS:
        messages.append(f"{len(changed) - MAX_SETTINGS} more keys of the configuration differ")
    written, this = (f"jax {each['versions']['jax']} on {each['versions']['device']}" for each in (old, new))
    if written != this:
        messages.append(f"the checkpoint was written by {written}, this is {this}: results may differ in the last bits")
    return found + [Difference(message) for message in messages]


def _model_differences(old: Mapping[str, Mapping[str, str]], new: Mapping[str, Mapping[str, str]]) -> list[Difference]:
    new_run = "or start a new run from the model that this one saved"
    removed, added = ([path for path in one if path not in other] for one, other in ((old, new), (new, old)))
    found = []
    if removed:
        were, are = ("was", "is") if len(removed) == 1 else ("were", "are")
        remedy = f"expected a rate above 0, so that what was learned is not lost, {new_run}"
        found.append(Difference(f"{_parameters(old, removed)} {were} trained and now {are} not", remedy))
    if added:
        were, are = ("was", "is") if len(added) == 1 else ("were", "are")
        remedy = "expected a rate of 0, or --reset_optimizer"
        message = f"{_parameters(new, added)} {were} not trained and now {are}"
        found.append(Difference(message, remedy, "reset_optimizer"))
    pairs = {path: (old[path]["array"], new[path]["array"]) for path in new if path in old}
    changed = {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}
    if changed:
        message = _rank_change(changed) or shorten(
            [f"{path} was {before}, now {now}" for path, (before, now) in changed.items()]
        )
        found.append(Difference(message, f"expected the model as it was, {new_run}"))
    return found


def _parameters(table: Mapping[str, Mapping[str, str]], paths: list[str]) -> str:
    groups = sorted({table[path]["group"] for path in paths})
    return f"{', '.join(groups)}: {len(paths)} parameter{'s' if len(paths) > 1 else ''} ({shorten(paths)})"


def _rank_change(changed: Mapping[str, tuple[str, str]]) -> str:
    """Return a message if the only change is the rank of a LoRA, else the empty string."""
    if not all(path.endswith((".lora_a", ".lora_b")) for path in changed):
        return ""
    ranks = {
        tuple(re.findall(r"\d+", array)[-1] for array in pair)
        for path, pair in changed.items()
        if path.endswith(".lora_a")
    }
    pairs = [(before, now) for before, now in ranks if before != now]
    return f"the adapter's rank was {pairs[0][0]}, now {pairs[0][1]}" if len(ranks) == len(pairs) == 1 else ""


def _data_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Return the differences between the seeds and between the tiers."""
    (seed, old_tiers), (new_seed, new_tiers) = ((each["data"]["seed"], each["data"]["tiers"]) for each in (old, new))
    found = [Difference(f"seed was {seed}, now {new_seed}")] if seed != new_seed else []
    for name in dict.fromkeys([*old_tiers, *new_tiers]):
        tier, now = old_tiers.get(name), new_tiers.get(name)
        counts = [each["examples"] if each else 0 for each in (tier, now)]
        if counts[0] != counts[1]:
            found.append(Difference(f"the data set had {plural(counts[0], 'example')} in tier {name}, now {counts[1]}"))
        elif tier["set"] != now["set"]:
            found.append(Difference(f"the {counts[0]} examples of tier {name} are not the same as before"))
        elif tier["order"] != now["order"]:
            found.append(Difference(f"the examples of tier {name} are the same in another order"))
        if tier and now and tier["set"] == now["set"]:
            changed = (content for content in CONTENTS if tier.get(content) != now.get(content))
            found += [Difference(f"{content} of tier {name} changed") for content in changed]
        if tier and now and tier["batch"] != now["batch"]:
            remedy = (
                "expected global_batch_size, or micro_batch_size_per_gpu × gradient_accumulation_steps, = "
                f"{tier['batch']}, {_restart_epoch(old)}"
            )
            message = f"a step of tier {name} took {tier['batch']} examples, now {now['batch']}"
            found.append(Difference(message, remedy, "reset_dataloader"))
    return found


def _restart_epoch(old: Mapping[str, Any]) -> str:
    return f"or --reset_dataloader to restart epoch {old.get('epoch', 0) + 1}"


# ---- checkpoints --------------------------------------------------------------------------------------------------


class Position(NamedTuple):
    """The position of a run, in finished steps.

    `step` counts the steps of the run, `data_step` those of the batch plan (a different number after
    `--reset_dataloader` or a change of the data), `optimizer_step` those since the optimizer was initialised, which
    determine the learning rate.
    """

    step: int
    data_step: int
    optimizer_step: int

    def position_after(self, step: int) -> "Position":
        """Return the position of the same run after `step` steps."""
        return Position(*(number + step - self.step for number in self))


class Checkpointer:
    """Saves a run to `run_folder/checkpoints` and restores it. Close it: a program that ends while saving hangs.

    `metadata` is from `run_metadata`. The newest `keep` checkpoints are kept (None: all).
    """

    def __init__(
        self,
        run_folder: pathlib.Path,
        plan: BatchPlan,
        metadata: Mapping[str, Any],
        *,
        keep: int | None = None,
        every_n_minutes: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._plan, self._metadata = plan, metadata
        self._minutes, self._clock, self._saved_at = every_n_minutes, clock, clock()
        self._announced: int | None = None
        self.checkpoints = RunCheckpoints(run_folder / FOLDER, keep=keep)
        self.start = Position(0, 0, 0)
        """The position at which training starts: 0, or after `restore` the one at which the run resumes."""

    def restore(
        self,
        state: TrainState,
        init_optimizer: Callable[[Params], Any],
        *,
        reset_dataloader: bool = False,
        reset_optimizer: bool = False,
        reset_optimizer_params: bool = False,
    ) -> tuple[TrainState, list[str]]:
        """Return the state of the newest intact checkpoint, and messages about what changed; set `start`.

        Damaged checkpoints that are newer are renamed and logged: those with checksums before anything is loaded, older
        ones when they cannot be loaded.
        `state` is a newly initialised one, whose shardings the result has; its arrays that the checkpoint replaces are
        deleted, as if donated. With `reset_dataloader`, the epoch in progress restarts. With `reset_optimizer`, the
        optimizer restarts, and parameters that were not trained before keep their values in `state`. Hyper-parameters
        in the optimizer's state are the checkpoint's, unless `reset_optimizer_params` or `reset_optimizer` is set; all
        others are the configuration's.
        Raises UserError, with every reason, if the run cannot resume from the checkpoint.
        """
        resets = {"reset_dataloader"} if reset_dataloader else set()
        resets |= {"reset_optimizer"} if reset_optimizer else set()
        while True:
            step, result, error = self.checkpoints.newest_intact(), None, None
            if step is None:
                raise UserError(f"{self.checkpoints.folder}: contains no checkpoint to resume from")
            try:
                result = self._restored(step, state, init_optimizer, resets, keep_params=reset_optimizer_params)
            except DamagedError as caught:
                error = caught
            reasons = hosts.values_of_all(None if error is None else str(error))
            if result is not None and not any(reasons):
                return result
            if step == self.checkpoints.steps()[0]:
                raise error or UserError(next(filter(None, reasons)))
            self.checkpoints.set_aside(step, reasons)

    def _restored(
        self,
        step: int,
        state: TrainState,
        init_optimizer: Callable[[Params], Any],
        resets: set[str],
        *,
        keep_params: bool,
    ) -> tuple[TrainState, list[str]]:
        """Return what `restore` returns, from the checkpoint of `step`. Raises DamagedError if it cannot be loaded."""
        reset_dataloader, reset_optimizer = (f"reset_{what}" in resets for what in ("dataloader", "optimizer"))
        old, layout = self.checkpoints.metadata(step), self.checkpoints.layout(step)
        messages = self._check(step, old, layout, state.opt_state, resets)
        data_step = self._plan.steps_for(old["epoch"]) if reset_dataloader else self._plan.step_at(old["position"])
        if reset_dataloader:
            messages.append(f"the data restart at epoch {old['epoch'] + 1}")
        if reset_optimizer:
            messages.append("the optimizer and its learning rates restart")

        saved = {path: state.params[path] for path in old["model"]}
        wanted = {"params": saved, "counters": _counters(state)}
        if not reset_optimizer:
            wanted["optimizer"] = state.opt_state
        if state.ema is not None and "ema" in layout:
            wanted["ema"] = {path: state.ema[path] for path in old["model"]}
        if state.loss_scale is not None and "loss_scale" in layout:
            wanted["loss_scale"] = state.loss_scale
        kept = matching(state.opt_state, _HYPER_PARAMETERS) if keep_params else {}
        found = self.checkpoints.restore(step, abstract_and_deleted(wanted, set(map(id, kept.values()))))

        params, ema = state.params | found["params"], state.ema
        if ema is not None and "ema" not in layout:
            ema = jax.tree.map(lambda average, value: jnp.array(value, average.dtype), ema, params)
            messages.append("the average of the weights (EMA) starts here: the checkpoint has none")
        elif ema is not None:
            ema = ema | found["ema"]
        elif "ema" in layout:
            messages.append("the average of the weights (EMA) in the checkpoint is not used: ema_decay is not set")
        opt_state = init_optimizer(params) if reset_optimizer else replaced(found["optimizer"], kept)
        scale = found.get("loss_scale", state.loss_scale)
        state = state._replace(params=params, ema=ema, opt_state=opt_state, loss_scale=scale, **found["counters"])
        self.start = Position(step, data_step, 0 if reset_optimizer else step - old["optimizer_start"])
        return state, messages

    def _check(
        self,
        step: int,
        old: Mapping[str, Any],
        layout: Mapping[str, Mapping[str, str]],
        opt_state: Any,
        resets: set[str],
    ) -> list[str]:
        """Return messages about what changed since the checkpoint. Raises UserError if the run cannot resume."""
        path = self.checkpoints.folder / str(step)
        if old["schema"] != SCHEMA:
            raise UserError(f"{path}: has format {old['schema']}, expected {SCHEMA} (this version's)")
        found = differences(old, self._metadata)
        errors = [f"{each.message}; {each.remedy}" for each in found if each.remedy and each.waived_by not in resets]
        if "reset_dataloader" not in resets and not any(each.waived_by == "reset_dataloader" for each in found):
            try:
                self._plan.step_at(old["position"])
            except ValueError as error:
                changed = "; ".join(each.message for each in _data_differences(old, self._metadata))
                errors.append(f"{changed}: {error}; expected the data set as it was, {_restart_epoch(old)}")
        different = [] if "reset_optimizer" in resets else layout_differences(layout["optimizer"], layout_of(opt_state))
        if different:
            types = [show_value(each["settings"].get("optimizer.type")) for each in (old, self._metadata)]
            changed = f" (optimizer.type was {types[0]}, now {types[1]})" if types[0] != types[1] else ""
            errors.append(
                f"the optimizer's state has a different layout{changed}: {shorten(different)}; expected the optimizer "
                "as it was, or --reset_optimizer to restart it"
            )
        if errors:
            raise UserError(*(f"{path}: {error}" for error in errors))
        return [each.message for each in found]

    def save(
        self, step: int, state: TrainState, *, wait: bool = False, announce: Callable[[str], None] = lambda line: None
    ) -> bool:
        """Start writing a checkpoint of the state after `step` steps; `state` may be donated once this returns.

        With `wait`, it returns when the checkpoint is written. `announce` is called with a message, once per step.
        Returns False if the checkpoint could not be saved; the error is logged.
        """
        position = self.start.position_after(step)
        items = {"params": state.params, "optimizer": state.opt_state, "counters": _counters(state)}
        if state.ema is not None:
            items["ema"] = state.ema
        if state.loss_scale is not None:
            items["loss_scale"] = state.loss_scale
        metadata = {
            "schema": SCHEMA,
            "step": step,
            "position": self._plan.position(position.data_step),
            "epoch": self._plan.epochs_finished(position.data_step),
            "optimizer_start": step - position.optimizer_step,
            **self._metadata,
        }
        self._saved_at = self._clock()
        self.checkpoints.save(step, items, metadata)
        if wait:
            self.checkpoints.wait()
        saved = self.checkpoints.writing or self.checkpoints.failure is None
        if saved and step != self._announced:
            self._announced = step
            announce(f"{'wrote' if wait else 'writing'} the checkpoint of step {step} to {self.checkpoints.folder}")
        return saved

    def overdue(self) -> bool:
        """Return whether the last checkpoint is at least `every_n_minutes` old by the clock of this process."""
        return self._minutes is not None and self._clock() - self._saved_at >= 60 * self._minutes

    def postpone(self) -> None:
        """Restart the interval after a request for a checkpoint, on which the processes agree one step later."""
        self._saved_at = self._clock()

    def close(self) -> None:
        """Wait until the checkpoint that is being saved is written."""
        self.checkpoints.close()

    def total_steps(self, epochs: int, max_steps: int | None = None) -> int:
        """Return the number of steps of the run after `epochs` epochs of the data, at most `max_steps`."""
        steps = self.start.step + max(0, self._plan.steps_for(epochs) - self.start.data_step)
        return steps if max_steps is None else min(steps, max_steps)

    @property
    def epoch_start(self) -> int:
        """The step of the run after which the epoch in progress at `start` began."""
        epochs = self._plan.epochs_finished(self.start.data_step)
        return self.start.step - self.start.data_step + self._plan.steps_for(epochs)

    def point_after(self, step: int, total_steps: int) -> RunPoint:
        """Return the point after `step` steps."""
        before, after = (max(0, self.start.position_after(number).data_step) for number in (step - 1, step))
        epochs = self._plan.epochs_finished(before), self._plan.epochs_finished(after)
        return RunPoint(step, total_steps, epochs, self._plan.position(after))


def _counters(state: TrainState) -> dict[str, Any]:
    """Return the fields of the state that count steps, by name."""
    return {name: getattr(state, name) for name in ("step", "skipped", "total_skipped")}
