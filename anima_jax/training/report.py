"""What a person sees of a run: a table before it, a progress bar during it, grids of samples, and a log of figures."""

import json
import pathlib
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO, TypeVar

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from anima_jax.models.parameters import Params, count
from anima_jax.training.optimizers import GROUPS
from anima_jax.training.state import Trained

Item = TypeVar("Item")

_MIN_TILE, _MARGIN, _LINE = 128, 4, 12


def parameter_table(trained: Trained, learning_rates: dict[str, float]) -> str:
    """Each group's number of trained parameters and learning rate, and the frozen ones."""
    lines = [f"{'group':<12} {'trained':>14} {'learning rate':>14}"]
    for group, _ in GROUPS:
        params: Params = {path: value for path, value in trained.params.items() if trained.groups[path] == group}
        rate = learning_rates[group]
        lines.append(f"{group:<12} {count(params):>14,} {f'{rate:g}' if params else 'frozen':>14}")
    lines.append(f"{'total':<12} {count(trained.params):>14,} {f'{count(trained.frozen):,} frozen':>14}")
    return "\n".join(lines)


def bar(items: Iterable[Item], total: int, unit: str) -> Iterator[Item]:
    """The items, with a progress bar while they last."""
    yield from tqdm(items, total=total, unit=unit, dynamic_ncols=True)


class Progress:
    """A progress bar with the loss, and a line of JSON a step. Figures are fetched one step late: no step waits."""

    def __init__(self, total_steps: int, log: TextIO, *, every: int = 1):
        self._bar = tqdm(total=total_steps, unit="step", dynamic_ncols=True, smoothing=0.05)
        self._log, self._every = log, every
        self._pending: tuple[int, dict] | None = None
        self._first = self._last = 0.0  # times at which the first and the last step's figures were there
        self._average: float | None = None

    @property
    def seconds_a_step(self) -> float:
        """Mean time of the steps after the first, which compiles."""
        return (self._last - self._first) / max(1, self._bar.n - 1)

    def step(self, step: int, figures: dict) -> None:
        """Step number `step` (from 1) has been started; its `figures` may still be computed."""
        self.flush()
        self._pending = (step, figures)

    def flush(self) -> None:
        """Report what is pending."""
        if self._pending is None:
            return
        step, figures = self._pending
        self._pending = None
        values = {name: float(value) for name, value in figures.items()}
        self._last = time.monotonic()
        self._first = self._first or self._last
        self._log.write(json.dumps({"step": step, **values}) + "\n")
        loss = values["loss"]
        self._average = loss if self._average is None else 0.98 * self._average + 0.02 * loss
        self._bar.update()
        if step % self._every == 0:
            self._bar.set_postfix_str(f"loss {self._average:.4f}", refresh=False)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.write(line)

    def close(self) -> None:
        """Report what is pending and leave the bar as it is."""
        self.flush()
        self._bar.close()
        self._log.flush()


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


def save_picture(image: Image.Image, path: pathlib.Path) -> None:
    """Write a PNG; it appears under its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    image.save(temporary, format="PNG")
    temporary.replace(path)
