"""Output of a run's metrics: progress bar, metrics.jsonl, evaluations.jsonl, TensorBoard and Weights & Biases.

TensorBoard's tags are those of diffusion-pipe (train.py): `train/loss`, `train/grad_norm`, `train/epoch_loss`,
`<eval>/loss_quantile_0.10`…, `<eval>/loss`, `eval/eval_time_sec`, and more of ours. A full disk does not stop the run,
and writing continues once there is space again.
"""

import contextlib
import dataclasses
import importlib.util
import logging
import math
import mmap
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

from anima_jax.config.main import MainConfig
from anima_jax.errors import UserError
from anima_jax.parallel.hosts import is_process_0
from anima_jax.training.intervals import RunPoint
from anima_jax.training.jsonl import JsonlWriter, RetryingFile

log = logging.getLogger(__name__)

_RETRYING = "retrying"
"""Path prefix (before a colon) of files that tensorboardX opens with `_RetryingFiles`."""


_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps {elapsed}<{remaining}{postfix}"
"""Layout of the bar. Its text fits 80 columns."""


class _RetryingFiles:
    """A tensorboardX writer factory: opens event files as `RetryingFile`s."""

    @staticmethod
    def directory_check(path: str) -> None:
        os.makedirs(path.removeprefix(f"{_RETRYING}:"), exist_ok=True)

    @staticmethod
    def open(path: str) -> RetryingFile:
        return RetryingFile(path.removeprefix(f"{_RETRYING}:"), "ab")


def check_monitoring(config: MainConfig) -> None:
    """Raise UserError if wandb is enabled but not installed. It is not imported, and nothing is written."""
    if config.monitoring.enable_wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"{config.path}: [monitoring] enable_wandb = true, but wandb is not installed "
            "(pip install wandb, or set it to false)"
        )


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Hide PyTorch from imports in the block: tensorboardX would import it where it is installed, for seconds."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType] - documented by importlib
    try:
        yield
    finally:
        del sys.modules["torch"]


class Dashboards:
    """TensorBoard and Weights & Biases, each if the configuration enables it. Only process 0 writes.

    `resumed_at` is the point at which a resumed run starts: TensorBoard hides what an earlier attempt wrote after it.
    Raises UserError if wandb cannot be used.
    """

    def __init__(self, folder: pathlib.Path, config: MainConfig, *, resumed_at: RunPoint | None = None):
        self._by_examples = config.x_axis_examples
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not is_process_0():
            return
        if config.monitoring.enable_tensorboard:
            with _without_torch():
                from tensorboardX import SummaryWriter, record_writer

            # Hide its warnings about values that are not finite: the run itself reports those.
            logging.getLogger("tensorboardX").setLevel(logging.ERROR)
            record_writer.register_writer_factory(_RETRYING, _RetryingFiles)
            purged = None if resumed_at is None else self._x(resumed_at) + 1
            self._tensorboard = SummaryWriter(f"{_RETRYING}:{folder}", purge_step=purged, flush_secs=10)
        if config.monitoring.enable_wandb:
            self._wandb = _start_wandb(folder, config)

    def scalars(self, point: RunPoint, values: Mapping[str, float], *, x: int | None = None) -> None:
        """Write values of this point; TensorBoard plots them at `x`, if given.

        W&B receives only the finite ones.
        """
        if self._tensorboard:
            for tag, value in values.items():
                self._tensorboard.add_scalar(tag, value, self._x(point) if x is None else x)
        if self._wandb and values:
            finite = {tag: value for tag, value in values.items() if math.isfinite(value)}
            self._wandb.log({**finite, "step": point.step})

    def image(self, point: RunPoint, tag: str, image: Image.Image) -> None:
        """Write an image of this point."""
        if self._tensorboard:
            pixels = np.asarray(image.convert("RGB"))
            self._tensorboard.add_image(tag, pixels, self._x(point), dataformats="HWC")
        if self._wandb:
            self._wandb.log({tag: self._wandb.Image(image), "step": point.step})

    def close(self) -> None:
        """Write buffered data and close the dashboards."""
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def _x(self, point: RunPoint) -> int:
        return point.examples if self._by_examples else point.step


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
    except Exception as error:  # any error of wandb or its network gives the same message
        raise UserError(f"{config.path}: [monitoring] enable_wandb: wandb does not start: {error}") from error
    return wandb


class _Pending(NamedTuple):
    """A step that the device may still be computing."""

    point: RunPoint
    metrics: Mapping[str, Any]
    flops: float
    waited: float


@dataclasses.dataclass
class _Window:
    """Sums over the steps since metrics were last logged."""

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
        """Return steps and images per second, seconds per step waiting for data, and MFU if the peak is known."""
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
    """Writes the metrics of a run to a progress bar, `metrics.jsonl`, `evaluations.jsonl` and dashboards.

    Metrics are fetched from the device one step late, so that the host never waits for a step. `start` is the point at
    which the run starts, `epoch_losses` are the earlier losses of the epoch in progress at that point.
    `rates` maps a step (from 0) to the learning rate of each group; `peak_flops` is the peak FLOPs per second of all
    devices, if known. Metrics go to the bar, or without a terminal to a printed line, every `steps_per_print` steps,
    and to the dashboards every `logging_steps` steps.
    """

    def __init__(
        self,
        start: RunPoint,
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
        bar = {"unit": "step", "dynamic_ncols": True, "smoothing": 0.05, "bar_format": _BAR}
        self._bar = tqdm(total=start.total_steps, initial=start.step, file=self._silence, **bar)
        self._pending: _Pending | None = None
        self._clock = 0.0  # when the device began the pending step, as far as the host knows
        self._spans: list[float] = []  # seconds of each step; the first may include other waits
        self._window = _Window()
        self._epoch_losses = list(epoch_losses)
        self._average: float | None = None
        self._speed = ""
        self.last: dict[str, float] = {}
        """The newest metrics fetched from the device."""
        self.last_step = start.step
        """The step of these metrics."""

    @property
    def evaluation_done(self) -> bool:
        """Whether an earlier attempt completed the evaluation of the step at which the run starts."""
        return bool(self._evaluations and self._evaluations.kept)

    @property
    def seconds_a_step(self) -> float:
        """Mean time of a step in seconds, without the first step and without events between steps."""
        return sum(self._spans[1:]) / max(1, len(self._spans) - 1)

    def step(self, point: RunPoint, metrics: Mapping[str, Any], *, flops: float = 0.0, waited: float = 0.0) -> None:
        """Record that step `point.step` has started, and write the metrics of the previous step.

        The device may still be computing `metrics`. The step takes `flops` FLOPs, and the host waited `waited` seconds
        for its data.
        """
        if self._pending is None:
            # The device was idle: the time of samples, exports and evaluations is not part of a step.
            self._clock = time.monotonic() - waited
        self.flush()
        self._pending = _Pending(point, metrics, flops, waited)

    def flush(self) -> None:
        """Wait for the pending step and write its metrics."""
        if self._pending is None:
            return
        (point, pending, flops, waited), self._pending = self._pending, None
        metrics = {name: float(value) for name, value in jax.device_get(dict(pending)).items()}
        now = time.monotonic()
        span, self._clock = now - self._clock, now
        self._spans.append(span)
        self._window.add(span, point.examples - self._examples, flops, waited)
        self._examples, self.last, self.last_step, loss = point.examples, metrics, point.step, metrics["loss"]
        if math.isfinite(loss):
            self._epoch_losses.append(loss)
            self._average = loss if self._average is None else 0.98 * self._average + 0.02 * loss
        rates, speeds = self._rates(point.step - 1), {}
        shared = {f"learning_rate/{group}": rate for group, rate in rates.items()} | memory_in_use()
        if point.step % self._logging_steps == 0:
            speeds, self._window = self._window.speeds(self._peak), _Window()
            self._write_dashboards(point, metrics, shared, speeds)
        if point.epochs[1] > self._epoch:
            self._write_epoch(point)
        self._metrics.add(point.step, {**metrics, **_counts(point), **shared, **speeds})
        if len(self._spans) == 1:
            self._bar.unpause()  # exclude compilation and samples before the first step
        self._bar.update()
        if point.step % self._steps_per_print == 0:
            self._bar.set_postfix_str(self._postfix(rates, speeds), refresh=False)
            if self._silence and is_process_0():
                print(_line(self._bar), file=sys.stderr)

    def _write_dashboards(self, point: RunPoint, metrics: dict, shared: dict, speeds: dict) -> None:
        if self._dashboards:
            figures = {f"train/{name}": value for name, value in metrics.items()}
            figures |= {f"speed/{name}": value for name, value in speeds.items()}
            self._dashboards.scalars(point, figures | shared)

    def _write_epoch(self, point: RunPoint) -> None:
        """Write the mean loss of the epoch that ended, plotted at the epoch's number as in diffusion-pipe."""
        if self._dashboards and self._epoch_losses:
            mean = sum(self._epoch_losses) / len(self._epoch_losses)
            self._dashboards.scalars(point, {"train/epoch_loss": mean}, x=point.epochs[1])
        self._epoch, self._epoch_losses = point.epochs[1], []

    def _postfix(self, rates: Mapping[str, float], speeds: dict) -> str:
        """Return loss, highest learning rate, images per second and skipped updates; tqdm adds steps and ETA.

        The loss is a running mean, or that of the last step if it is not finite.
        """
        loss = self.last["loss"] if not math.isfinite(self.last["loss"]) else self._average
        parts = [f"loss {loss:.4f}"]
        if rates:
            parts.append(f"lr {max(rates.values()):.3g}")
        if speeds.get("images_per_second"):
            speed = speeds["images_per_second"]
            self._speed = f"{speed:,.{0 if speed >= 100 else 2}f} images/s"
        if self._speed:
            parts.append(self._speed)
        if skipped := int(self.last.get("total_skipped", 0)):
            parts.append(f"{skipped} skipped")
        return ", ".join(parts)

    def evaluation(self, point: RunPoint, figures: Mapping[str, float]) -> None:
        """Write the metrics of an evaluation."""
        if self._dashboards:
            self._dashboards.scalars(point, figures)
        if self._evaluations:
            self._evaluations.add(point.step, figures)

    def image(self, point: RunPoint, tag: str, image: Image.Image) -> None:
        """Show an image on the dashboards."""
        if self._dashboards:
            self._dashboards.image(point, tag, image)

    def updated(self) -> bool:
        """Return whether no update was skipped for values that are not finite: then a checkpoint can be saved.

        One that was skipped because the loss scale was too large does not count.
        """
        self.flush()
        return not self.last.get("skipped")

    def print(self, line: str) -> None:
        """Print a line above the bar."""
        if is_process_0():
            self._bar.write(line)

    def sync(self) -> None:
        """Wait for the pending step, and let the metrics so far survive a power failure."""
        self.flush()
        for each in filter(None, (self._metrics, self._evaluations)):
            each.sync()

    def close(self) -> None:
        """Write pending metrics, leave the bar on the screen, and close the files."""
        with contextlib.ExitStack() as stack:
            for each in (self._metrics, self._dashboards, self._evaluations, self._silence):
                if each is not None:
                    stack.callback(each.close)
            self.flush()
            self._bar.close()


def open_writer(
    config: MainConfig,
    folder: pathlib.Path,
    start: RunPoint,
    *,
    epoch_start: int,
    evaluates: bool,
    resumed: bool,
    **options: Any,
) -> Writer:
    """Return the writer of a run, with its files in `folder` open.

    `epoch_start` is the step after which the epoch in progress at `start` began; `evaluates` says whether the run has
    evaluations, `resumed` whether it resumes an earlier attempt. `options` are further arguments of `Writer`. Raises
    UserError if a file or wandb cannot be used.
    """
    metrics = JsonlWriter(folder / "metrics.jsonl", start.step, remembered=epoch_start + 1)
    evaluations = JsonlWriter(folder / "evaluations.jsonl", start.step) if evaluates else None
    return Writer(
        start,
        metrics,
        # Last, so that no wandb run is left open when a file cannot be written.
        dashboards=Dashboards(folder, config, resumed_at=start if resumed else None),
        evaluations=evaluations,
        steps_per_print=config.steps_per_print,
        logging_steps=config.logging_steps,
        epoch_losses=[line["loss"] for line in metrics.kept if line.get("loss") is not None],
        **options,
    )


def memory_in_use() -> dict[str, float]:
    """Return the GiB in use: on the first local device, now and at the peak, and by this process on the host.

    What the backend or the operating system does not report is left out.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"bytes_in_use": "device/memory_gib", "peak_bytes_in_use": "device/peak_memory_gib"}
    found = {tag: stats[name] / 2**30 for name, tag in names.items() if name in stats}
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm", "rb") as file:  # Linux
        found["host/memory_gib"] = int(file.read().split()[1]) * mmap.PAGESIZE / 2**30
    return found


def _counts(point: RunPoint) -> dict[str, float]:
    """Return what metrics.jsonl counts at a step.

    `epoch` is the number of the epoch, from 1, in which the step began; `wall_time` is in seconds since 1970.
    """
    return {"epoch": point.epochs[0] + 1, "examples": point.examples, "wall_time": round(time.time(), 3)}


def _line(bar: "tqdm[Any]") -> str:
    """Return the bar as a line for a log, without control characters."""
    shown = bar.format_dict
    rate, elapsed = shown["rate"], tqdm.format_interval(shown["elapsed"])
    remaining = tqdm.format_interval((shown["total"] - shown["n"]) / rate) if rate else "?"
    return f"{shown['n']}/{shown['total']} steps, {elapsed}<{remaining}, {shown['postfix']}"


@contextlib.contextmanager
def warn_and_continue() -> Iterator[None]:
    """Log OSError and UserError in the block, such as a full disk, as warnings; the run continues."""
    try:
        yield
    except (OSError, UserError) as error:
        log.warning(f"{error}; the run continues")
