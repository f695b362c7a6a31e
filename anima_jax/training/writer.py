"""A run's figures: its progress bar, metrics.jsonl, evaluations.jsonl, TensorBoard and Weights & Biases.

TensorBoard's tags are diffusion-pipe's (train.py): `train/loss`, `train/grad_norm`, `train/epoch_loss`,
`<eval>/loss_quantile_0.10`…, `<eval>/loss`, `eval/eval_time_sec`; there are more of ours. A full disk stops neither the
files nor the run.
"""

import contextlib
import dataclasses
import importlib.util
import json
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from anima_jax.checkpoints.locations import writing_to
from anima_jax.config.main import MainConfig
from anima_jax.errors import UserError, os_reason
from anima_jax.parallel.hosts import is_process_0
from anima_jax.training.intervals import Moment

log = logging.getLogger(__name__)

_RETRYING = "retrying"
"""tensorboardX opens files whose path begins with this and a colon with `_RetryingFiles`."""


class RetryingFile:
    """A file to write to. What the disk has no room for stays in memory for the next `flush`; the log says so once."""

    def __init__(self, path: str | os.PathLike[str], mode: str = "wb"):
        self._path, self._waiting, self._warned = os.fspath(path), bytearray(), False
        self._file = open(path, mode, buffering=0)  # noqa: SIM115 - `close` closes it

    def write(self, data: bytes) -> None:
        """Append `data` to what the next `flush` writes."""
        self._waiting += data

    def flush(self) -> None:
        """Write what is waiting, or as much of it as there is room for."""
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
            self._warned = False
        except OSError as error:
            if not self._warned:
                log.warning(f"{self._path}: cannot be written: {os_reason(error)}; the run continues without")
            self._warned = True

    def close(self) -> None:
        """Flush and close the file."""
        self.flush()
        with contextlib.suppress(OSError):
            self._file.close()


class JsonlWriter(RetryingFile):
    """A file of JSON lines, `{"step": …}` and the figures of that step, continued after `after_step`.

    Lines that an earlier attempt wrote beyond that step are dropped, and so is a line that a kill cut off. `kept` are
    the remaining lines from the step `remembered` (by default `after_step`) on. Only process 0 writes, but `kept` is
    known to all processes. Raises UserError if the file cannot be written.
    """

    def __init__(self, path: pathlib.Path, after_step: int, *, remembered: int | None = None):
        self.kept: list[dict[str, Any]] = []
        with writing_to(os.fspath(path)):
            if path.exists():
                temporary = path.with_name(path.name + ".partial") if is_process_0() else pathlib.Path(os.devnull)
                with open(path, "rb") as old, open(temporary, "wb") as new:
                    for line in old:
                        found = _parsed(line)
                        if found and found["step"] <= after_step:
                            new.write(line)
                            if found["step"] >= (after_step if remembered is None else remembered):
                                self.kept.append(found)
                if is_process_0():
                    temporary.replace(path)
            super().__init__(path if is_process_0() else os.devnull, "ab")

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Write a line. Figures that are not finite, which JSON does not have, become null."""
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        self.write((json.dumps({"step": step, **finite}) + "\n").encode())
        self.flush()


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return a line's content; None if the line is not complete."""
    with contextlib.suppress(ValueError):
        found = json.loads(line)
        if isinstance(found, dict) and isinstance(found.get("step"), int) and line.endswith(b"\n"):
            return found
    return None


class _RetryingFiles:
    """How tensorboardX opens files."""

    @staticmethod
    def directory_check(path: str) -> None:
        os.makedirs(path.removeprefix(f"{_RETRYING}:"), exist_ok=True)

    @staticmethod
    def open(path: str) -> RetryingFile:
        return RetryingFile(path.removeprefix(f"{_RETRYING}:"), "ab")


def check_monitoring(config: MainConfig) -> None:
    """Raise UserError if wandb is enabled but not installed; nothing is loaded or written."""
    if config.monitoring.enable_wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"{config.path}: [monitoring] enable_wandb = true, but wandb is not installed "
            "(pip install wandb, or set it to false)"
        )


class Dashboards:
    """TensorBoard and Weights & Biases, as far as the configuration enables them. Only process 0 writes.

    `resumed_at` is the moment at which a resumed run starts: TensorBoard hides what an earlier attempt wrote beyond it.
    Raises UserError if wandb cannot be used.
    """

    def __init__(self, folder: pathlib.Path, config: MainConfig, *, resumed_at: Moment | None = None):
        self._by_examples = config.x_axis_examples
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not is_process_0():
            return
        if config.monitoring.enable_tensorboard:
            from tensorboardX import SummaryWriter, record_writer

            # Its warnings of values that are not finite: the run itself reports those.
            logging.getLogger("tensorboardX").setLevel(logging.ERROR)
            record_writer.register_writer_factory(_RETRYING, _RetryingFiles)
            purged = None if resumed_at is None else self._x(resumed_at) + 1
            self._tensorboard = SummaryWriter(f"{_RETRYING}:{folder}", purge_step=purged, flush_secs=10)
        if config.monitoring.enable_wandb:
            self._wandb = _start_wandb(folder, config)

    def scalars(self, at: Moment, values: Mapping[str, float], *, x: int | None = None) -> None:
        """Write figures of this moment; `x` is another point to plot them at.

        W&B gets only the finite ones.
        """
        if self._tensorboard:
            for tag, value in values.items():
                self._tensorboard.add_scalar(tag, value, self._x(at) if x is None else x)
        if self._wandb and values:
            finite = {tag: value for tag, value in values.items() if math.isfinite(value)}
            self._wandb.log({**finite, "step": at.step})

    def image(self, at: Moment, tag: str, image: Image.Image) -> None:
        """Write an image of this moment."""
        if self._tensorboard:
            pixels = np.asarray(image.convert("RGB"))
            self._tensorboard.add_image(tag, pixels, self._x(at), dataformats="HWC")
        if self._wandb:
            self._wandb.log({tag: self._wandb.Image(image), "step": at.step})

    def close(self) -> None:
        """Write what is buffered and close."""
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def _x(self, at: Moment) -> int:
        return at.examples if self._by_examples else at.step


def _start_wandb(folder: pathlib.Path, config: MainConfig) -> Any:
    check_monitoring(config)
    import wandb  # pyright: ignore[reportMissingImports] - optional

    settings = config.monitoring
    try:
        if settings.wandb_api_key:
            wandb.login(key=settings.wandb_api_key)
        wandb.init(
            project=settings.wandb_tracker_name or None,
            name=settings.wandb_run_name or None,
            config=config.model_dump(mode="json", exclude={"monitoring": {"wandb_api_key"}}),
            dir=str(folder),
        )
    except Exception as error:  # whatever wandb or its network raises, the user sees the same line
        raise UserError(f"{config.path}: [monitoring] enable_wandb: wandb does not start: {error}") from error
    return wandb


class _Pending(NamedTuple):
    """A step that the device may still be computing."""

    at: Moment
    metrics: Mapping[str, Any]
    flops: float
    waited: float


@dataclasses.dataclass
class _Window:
    """Sums over the steps since figures were last logged."""

    steps: int = 0
    seconds: float = 0.0
    images: int = 0
    flops: float = 0.0
    waited: float = 0.0

    def add(self, seconds: float, images: int, flops: float, waited: float) -> None:
        self.steps += 1
        self.seconds += seconds
        self.images += images
        self.flops += flops
        self.waited += waited

    def speeds(self, peak_flops: float | None) -> dict[str, float]:
        """Return steps and images per second, seconds per step spent waiting for data, and MFU if the peak is known."""
        seconds = max(self.seconds, 1e-9)
        figures = {
            "steps_per_second": self.steps / seconds,
            "images_per_second": self.images / seconds,
            "data_wait_seconds": self.waited / max(self.steps, 1),
        }
        if peak_flops and self.flops:
            figures["mfu"] = self.flops / seconds / peak_flops
        return figures


class Writer:
    """Where a run's figures go: a progress bar, `metrics.jsonl`, `evaluations.jsonl` and dashboards.

    Metrics are fetched from the device one step late, so that the host never waits for a step. `start` is where the run
    starts, and `epoch_losses` are the losses of the epoch under way there.
    `rates` maps a step (from 0) to each group's learning rate; `peak_flops` is what all devices can compute per second,
    if known. Every `steps_per_print` steps the bar shows new figures, or a line of them is printed where there is no
    terminal; every `logging_steps` steps the dashboards get them.
    """

    def __init__(
        self,
        start: Moment,
        metrics: JsonlWriter,
        *,
        dashboards: Dashboards | None = None,
        evaluations: JsonlWriter | None = None,
        steps_per_print: int = 1,
        logging_steps: int = 1,
        rates: Callable[[int], Mapping[str, float]] = lambda _: {},
        peak_flops: float | None = None,
        epoch_losses: Iterable[float] = (),
    ):
        self._metrics, self._dashboards, self._evaluations = metrics, dashboards, evaluations
        self._steps_per_print, self._logging_steps = steps_per_print, logging_steps
        self._rates, self._peak = rates, peak_flops
        self._examples, self._epoch = start.examples, start.epochs[1]
        silent = not is_process_0() or not sys.stderr.isatty()
        self._silence = open(os.devnull, "w") if silent else None  # noqa: SIM115 - `close` closes it
        bar = {"unit": "step", "dynamic_ncols": True, "smoothing": 0.05}
        self._bar = tqdm(total=start.total_steps, initial=start.step, file=self._silence, **bar)
        self._pending: _Pending | None = None
        self._clock = 0.0  # when the device was known to begin the pending step
        self._spans: list[float] = []  # seconds of each step; the first may include other waits
        self._window = _Window()
        self._epoch_losses = list(epoch_losses)
        self._average: float | None = None
        self._speed = ""
        self.last: dict[str, float] = {}
        """The newest metrics that were fetched."""

    @property
    def evaluated(self) -> bool:
        """Whether an earlier attempt made the evaluation of the step at which the run starts."""
        return bool(self._evaluations and self._evaluations.kept)

    @property
    def seconds_a_step(self) -> float:
        """Mean time of the steps after the first, without what happens between steps."""
        return sum(self._spans[1:]) / max(1, len(self._spans) - 1)

    def step(self, at: Moment, metrics: Mapping[str, Any], *, flops: float = 0.0, waited: float = 0.0) -> None:
        """Record that step `at.step` was started; its `metrics` may still be computed. Writes those of the one before.

        The step takes `flops`, and its data were there after `waited` seconds.
        """
        if self._pending is None:
            # The device was idle until now: samples, exports and evaluations do not count as a step's time.
            self._clock = time.monotonic() - waited
        self.flush()
        self._pending = _Pending(at, metrics, flops, waited)

    def flush(self) -> None:
        """Wait for the pending step and write its metrics."""
        if self._pending is None:
            return
        (at, pending, flops, waited), self._pending = self._pending, None
        metrics = {name: float(value) for name, value in jax.device_get(dict(pending)).items()}
        now = time.monotonic()
        span, self._clock = now - self._clock, now
        self._spans.append(span)
        self._window.add(span, at.examples - self._examples, flops, waited)
        self._examples, self.last, loss = at.examples, metrics, metrics["loss"]
        if math.isfinite(loss):
            self._epoch_losses.append(loss)
            self._average = loss if self._average is None else 0.98 * self._average + 0.02 * loss
        rates, speeds = self._rates(at.step - 1), {}
        if at.step % self._logging_steps == 0:
            speeds, self._window = self._window.speeds(self._peak), _Window()
            self._write_dashboards(at, metrics, rates, speeds)
        if at.epochs[1] > self._epoch:
            self._write_epoch(at)
        self._metrics.add(at.step, {**metrics, **speeds})
        if len(self._spans) == 1:
            self._bar.unpause()  # compilation and samples before the first step do not count
        self._bar.update()
        if at.step % self._steps_per_print == 0:
            self._bar.set_postfix_str(self._postfix(rates, speeds), refresh=False)
            if self._silence:
                print(self._bar, file=sys.stderr)

    def _write_dashboards(self, at: Moment, metrics: dict, rates: Mapping[str, float], speeds: dict) -> None:
        if self._dashboards:
            figures = {f"train/{name}": value for name, value in metrics.items()}
            figures |= {f"learning_rate/{group}": rate for group, rate in rates.items()}
            figures |= {f"speed/{name}": value for name, value in speeds.items()}
            self._dashboards.scalars(at, figures | device_memory())

    def _write_epoch(self, at: Moment) -> None:
        """Write the mean loss of the epoch that ended, at the epoch's number as in diffusion-pipe."""
        if self._dashboards and self._epoch_losses:
            mean = sum(self._epoch_losses) / len(self._epoch_losses)
            self._dashboards.scalars(at, {"train/epoch_loss": mean}, x=at.epochs[1])
        self._epoch, self._epoch_losses = at.epochs[1], []

    def _postfix(self, rates: Mapping[str, float], speeds: dict) -> str:
        """Return loss, learning rate (the highest of all groups) and images per second; tqdm adds steps and ETA."""
        parts = [] if self._average is None else [f"loss {self._average:.4f}"]
        if rates:
            parts.append(f"lr {max(rates.values()):.3g}")
        if speeds.get("images_per_second"):
            speed = speeds["images_per_second"]
            self._speed = f"{speed:,.{0 if speed >= 100 else 2}f} images/s"
        return ", ".join([*parts, *([self._speed] if self._speed else [])])

    def evaluation(self, at: Moment, figures: Mapping[str, float]) -> None:
        """Write an evaluation's figures."""
        if self._dashboards:
            self._dashboards.scalars(at, figures)
        if self._evaluations:
            self._evaluations.add(at.step, figures)

    def image(self, at: Moment, tag: str, image: Image.Image) -> None:
        """Show an image on the dashboards."""
        if self._dashboards:
            self._dashboards.image(at, tag, image)

    def updated(self) -> bool:
        """Return whether the newest step changed the weights; while updates are skipped, no checkpoint is wanted."""
        self.flush()
        return not self.last.get("skipped")

    def print(self, line: str) -> None:
        """Print a line above the bar."""
        if is_process_0():
            self._bar.write(line)

    def close(self) -> None:
        """Write what is pending, leave the bar on the screen, and close the files."""
        with contextlib.ExitStack() as stack:
            for each in (self._metrics, self._dashboards, self._evaluations, self._silence):
                if each is not None:
                    stack.callback(each.close)
            self.flush()
            self._bar.close()


def open_writer(
    config: MainConfig, folder: pathlib.Path, start: Moment, *, epoch_start: int, evaluates: bool, **options: Any
) -> Writer:
    """Open the files of a run in its folder and return their writer.

    `epoch_start` is the step after which the epoch under way at `start` began; `evaluates` says whether there will be
    evaluations. `options` are further arguments of `Writer`. Raises UserError if a file or wandb cannot be used.
    """
    resumed = config.resume_from_checkpoint is not None
    metrics = JsonlWriter(folder / "metrics.jsonl", start.step, remembered=epoch_start + 1)
    return Writer(
        start,
        metrics,
        dashboards=Dashboards(folder, config, resumed_at=start if resumed else None),
        evaluations=JsonlWriter(folder / "evaluations.jsonl", start.step) if evaluates else None,
        steps_per_print=config.steps_per_print,
        logging_steps=config.logging_steps,
        epoch_losses=[line["loss"] for line in metrics.kept if line.get("loss") is not None],
        **options,
    )


def device_memory() -> dict[str, float]:
    """Return GiB in use on the first local device, now and at the peak; empty if the back end does not report them."""
    found = jax.local_devices()[0].memory_stats() or {}
    names = {"bytes_in_use": "device/memory_gib", "peak_bytes_in_use": "device/peak_memory_gib"}
    return {tag: found[name] / 2**30 for name, tag in names.items() if name in found}


@contextlib.contextmanager
def warn_and_continue() -> Iterator[None]:
    """Log an error of the block in writing files as a warning; the run continues."""
    try:
        yield
    except (OSError, UserError) as error:
        log.warning(f"{error}; the run continues")
