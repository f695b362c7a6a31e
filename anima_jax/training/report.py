"""What a person sees of a run: a table before it, a progress bar during it, grids of samples, and a log of figures."""

import dataclasses
import io
import logging
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from anima_jax.adapters.kinds import TITLES
from anima_jax.adapters.modules import AdapterSpec
from anima_jax.config.main import MainConfig
from anima_jax.models.parameters import Params
from anima_jax.parallel import rules
from anima_jax.parallel.hosts import is_process_0
from anima_jax.training.figures import JsonlWriter
from anima_jax.training.monitor import Monitor
from anima_jax.training.optimizers import GROUPS, group_of
from anima_jax.training.state import ParamPartition

Item = TypeVar("Item")

LOGGER = logging.getLogger("anima_jax")

_MIN_TILE, _MARGIN, _LINE = 128, 4, 12


class _AboveBars(logging.Handler):
    """Writes to stderr, above the progress bars that are there."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def log_to_console() -> None:
    """This package's log goes to stderr, a line a message, whatever handlers other libraries have installed."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without × or → still shows the rest
    handler = _AboveBars()
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False


def start_up_table(config: MainConfig, trained: ParamPartition, data: str) -> str:
    """What a run is about to do: the model, its parameters by group, and the data (their plan, as `data` says it)."""
    model = trained.config
    sizes = f"{model.blocks} blocks of width {model.width:,}, {model.heads} heads, MLP {model.mlp_width:,}"
    if model.adapter:
        sizes += f"; LLM adapter: {model.adapter.blocks} blocks of width {model.adapter.width:,}"
    what = "full training"
    if trained.slots is not None:
        what = "\n".join([adapter_line(trained.slots), *trained.notes])
    start = "a fresh network" if config.model.config else config.model.transformer_path
    parts = {
        "model": f"{start}\n{sizes}\ncomputed in {config.compute_dtype}\n{what}",
        "parameters": parameter_table(trained, config.learning_rates, config.param_dtype),
        "data": data,
    }
    return "\n".join(f"{name}\n{textwrap.indent(text, '  ')}" for name, text in parts.items())


def adapter_line(slots: Mapping[str, AdapterSpec]) -> str:
    """What adapters there are: their kind, ranks and number."""
    ranks = [rank for slot in slots.values() for rank in slot.ranks if rank]
    span = f"{min(ranks)} to {max(ranks)}" if min(ranks) < max(ranks) else f"{max(ranks)}"
    kind = TITLES[next(iter(slots.values())).kind]
    return f"{kind} of rank {span} on {len(ranks)} modules, {len(slots)} linear layers a block"


def parameter_table(trained: ParamPartition, learning_rates: Mapping[str, float], param_dtype: str = "float32") -> str:
    """For each group: parameters, how many of them are trained and at what rate, and the dtypes that hold them.

    Those that are trained are in `param_dtype` while they are.
    """
    lines = [f"{'group':<12} {'parameters':>14} {'trained':>14} {'learning rate':>14}  dtype"]

    def row(name: str, learned: Params, frozen: Params, rate: str) -> str:
        # Of quantised weights the first leaf is the codes, beside their scales.
        dtypes = [str(jax.tree.leaves(value)[0].dtype) for value in frozen.values()]
        held = ", ".join(dict.fromkeys([*([param_dtype] if learned else []), *dtypes]))
        trainable, fixed = (sum(math.prod(value.shape) for value in part.values()) for part in (learned, frozen))
        return f"{name:<12} {trainable + fixed:>14,} {trainable:>14,} {rate:>14}  {held}".rstrip()

    for group, _ in GROUPS:
        learned: Params = {path: value for path, value in trained.params.items() if trained.groups[path] == group}
        # Paths contain the words that tell groups apart, as the names in files do.
        frozen: Params = {path: value for path, value in trained.frozen.items() if group_of(path) == group}
        if group == "text_encoder" and not frozen:
            continue
        lines.append(row(group, learned, frozen, f"{learning_rates[group]:g}" if learned else "frozen"))
    lines.append(row("total", trained.params, trained.frozen, ""))
    return "\n".join(lines)


def mesh_table(
    sizes: Mapping[str, int], trained: ParamPartition, learning_rates: Mapping[str, float], device: str
) -> str:
    """The mesh, and for each parameter: its shape, where it lies, and the learning rate (frozen: 0)."""
    words = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
    lines = [f"mesh of {math.prod(sizes.values())} devices ({device}): {words}"]
    if math.prod(sizes.values()) == 1:
        return lines[0]
    lines.append(f"{'parameter':<52} {'shape':>16} {'shared out over':>24} {'learning rate':>14}")
    for path, leaf in sorted({**trained.frozen, **trained.params}.items()):
        spec = rules.spec(path, leaf.shape, sizes)
        over = ", ".join("+".join(entry) if isinstance(entry, tuple) else entry or "-" for entry in spec)
        rate = learning_rates[trained.groups[path]] if path in trained.params else 0.0
        shape = "×".join(map(str, leaf.shape))
        lines.append(f"{path:<52} {shape:>16} {over or 'whole':>24} {rate:>14g}")
    return "\n".join(lines)


class _Started(NamedTuple):
    """A step that was handed to the device, and what is to be said of it."""

    step: int
    figures: Mapping[str, Any]
    examples: int
    epoch: int
    flops: float
    waited: float


class Progress:
    """Tells how a run goes: a progress bar, a line of JSON a step in `log`, and a monitor's scalars.

    Figures are fetched one step late, so that no step waits. `start` is where the run goes on: steps, examples and
    epochs behind it, and `epoch_losses` those of the epoch that is under way there. `rates` gives each group's learning
    rate at a step (from 0); `peak_flops` is what all devices could do in a second, if that is known. Every `every`
    steps the bar has new figures, or a line of them is printed where no terminal shows it; every `logging_steps` the
    monitor is told.
    """

    def __init__(
        self,
        total_steps: int,
        log: JsonlWriter,
        *,
        every: int = 1,
        logging_steps: int = 1,
        monitor: Monitor | None = None,
        rates: Callable[[int], Mapping[str, float]] = lambda _: {},
        peak_flops: float | None = None,
        start: tuple[int, int, int] = (0, 0, 0),
        epoch_losses: Iterable[float] = (),
    ):
        first, self._examples, self._epoch = start
        silent = not is_process_0() or not sys.stderr.isatty()
        self._silence = open(os.devnull, "w") if silent else None  # noqa: SIM115 - `close` closes it
        bar = {"unit": "step", "dynamic_ncols": True, "smoothing": 0.05}
        self._bar = tqdm(total=total_steps, initial=first, file=self._silence, **bar)
        self._log, self._every, self._logging_steps = log, every, logging_steps
        self._monitor, self._rates, self._peak = monitor, rates, peak_flops
        self._pending: _Started | None = None
        self._clock = 0.0  # when the device was known to begin the pending step
        self._spans: list[float] = []  # seconds of every step but the first, which may wait for more than itself
        self._window = _Window()
        self._epoch_losses = list(epoch_losses)
        self._average: float | None = None
        self._speed = ""
        self.last: dict[str, float] = {}
        """The newest figures that were reported."""

    @property
    def seconds_a_step(self) -> float:
        """Mean time of the steps after the first, without what happened between steps."""
        return sum(self._spans[1:]) / max(1, len(self._spans) - 1)

    def step(
        self,
        step: int,
        figures: Mapping[str, Any],
        *,
        examples: int = 0,
        epoch: int = 0,
        flops: float = 0.0,
        waited: float = 0.0,
    ) -> None:
        """Step number `step` (from 1) has been started; its `figures` may still be computed.

        With it, `examples` were consumed and `epoch` epochs finished since the beginning; it takes `flops`, and
        `waited` seconds went by until its data were there.
        """
        if self._pending is None:
            # The device was idle until now: samples, a saved model or an evaluation take no part in a step's time.
            self._clock = time.monotonic() - waited
        self.flush()
        self._pending = _Started(step, figures, examples, epoch, flops, waited)

    def flush(self) -> None:
        """Report what is pending."""
        if self._pending is None:
            return
        done, self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(dict(done.figures)).items()}
        now = time.monotonic()
        span, self._clock = now - self._clock, now
        self._spans.append(span)
        self._window.add(span, done.examples - self._examples, done.flops, done.waited)
        self._examples = done.examples
        self.last, loss = values, values["loss"]
        if math.isfinite(loss):
            self._epoch_losses.append(loss)
            self._average = loss if self._average is None else 0.98 * self._average + 0.02 * loss
        rates = self._rates(done.step - 1)
        speeds = {}
        if done.step % self._logging_steps == 0:
            speeds, self._window = self._window.speeds(self._peak), _Window()
            self._tell(done, values, rates, speeds)
        if done.epoch > self._epoch:
            self._tell_epoch(done)
        self._log.add(done.step, {**values, **speeds})
        if len(self._spans) == 1:
            self._bar.unpause()  # what was compiled and drawn before is no step's time
        self._bar.update()
        if done.step % self._every == 0:
            self._bar.set_postfix_str(self._postfix(rates, speeds), refresh=False)
            if self._silence:
                print(self._bar, file=sys.stderr)

    def _tell(self, done: _Started, values: dict, rates: Mapping[str, float], speeds: dict) -> None:
        if self._monitor:
            figures = {f"train/{name}": value for name, value in values.items()}
            figures |= {f"learning_rate/{group}": rate for group, rate in rates.items()}
            figures |= {f"speed/{name}": value for name, value in speeds.items()}
            self._monitor.scalars(done.step, done.examples, figures | device_memory())

    def _tell_epoch(self, done: _Started) -> None:
        """The mean loss of the epoch that ended, at the epoch's number, as diffusion-pipe has it."""
        if self._monitor and self._epoch_losses:
            mean = sum(self._epoch_losses) / len(self._epoch_losses)
            self._monitor.at(done.epoch, {"train/epoch_loss": mean}, done.step)
        self._epoch, self._epoch_losses = done.epoch, []

    def _postfix(self, rates: Mapping[str, float], speeds: dict) -> str:
        """Loss, learning rate (the largest of the groups') and images a second; the bar itself has steps and ETA."""
        parts = [] if self._average is None else [f"loss {self._average:.4f}"]
        if rates:
            parts.append(f"lr {max(rates.values()):.3g}")
        if speeds.get("images_per_second"):
            speed = speeds["images_per_second"]
            self._speed = f"{speed:,.{0 if speed >= 100 else 2}f} images/s"
        return ", ".join([*parts, *([self._speed] if self._speed else [])])

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if is_process_0():
            self._bar.write(line)

    def close(self) -> None:
        """Report what is pending and leave the bar as it is."""
        self.flush()
        self._bar.close()
        if self._silence:
            self._silence.close()


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
        """Steps and images a second, seconds a step waited for data, and the share of the device's peak if known."""
        seconds = max(self.seconds, 1e-9)
        figures = {
            "steps_per_second": self.steps / seconds,
            "images_per_second": self.images / seconds,
            "data_wait_seconds": self.waited / max(self.steps, 1),
        }
        if peak_flops and self.flops:
            figures["mfu"] = self.flops / seconds / peak_flops
        return figures


def device_memory() -> dict[str, float]:
    """GiB that the first local device holds, now and at most so far; empty where the back end does not say."""
    found = jax.local_devices()[0].memory_stats() or {}
    names = {"bytes_in_use": "device/memory_gib", "peak_bytes_in_use": "device/peak_memory_gib"}
    return {tag: found[name] / 2**30 for name, tag in names.items() if name in found}


def sample_grid(images: Sequence[Image.Image], captions: Sequence[str], columns: int = 8) -> Image.Image:
    """The images in rows, each over its caption. Small ones are enlarged so that the captions can be read."""
    scale = -(-_MIN_TILE // images[0].width)
    width, height = images[0].width * scale, images[0].height * scale
    font = ImageFont.load_default(size=10)
    wrapped = [textwrap.wrap(caption, max(8, width // 6))[:3] for caption in captions]
    cell = (width + _MARGIN, height + _MARGIN + _LINE * max(map(len, wrapped), default=0))
    columns = min(columns, len(images))
    grid = Image.new("RGB", (cell[0] * columns, cell[1] * -(-len(images) // columns)), "white")
    pen = ImageDraw.Draw(grid)
    for index, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        x, y = cell[0] * (index % columns), cell[1] * (index // columns)
        grid.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        for number, line in enumerate(lines):
            pen.text((x + 2, y + height + _LINE * number), line, fill="black", font=font)
    return grid
