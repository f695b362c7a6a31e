"""Progress of sampling: a progress bar and previews."""

import concurrent.futures
import contextlib
import math
import pathlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from anima_jax.parallel.hosts import progress_bar
from anima_jax.sampling.images import save_image, to_images

Latents = Callable[[], list[np.ndarray]]

ProgressCallback = Callable[[int, int, Latents], None]
"""Called with the number of evaluations done, their total, and a function that returns the latest clean latents.

The total is an estimate that changes if the sampler chooses its steps as it goes. The call for one evaluation happens
while the next one runs. The latents are the network's estimate, (t, y, x, c) for each image; before the first
evaluation they are the starting point.
"""

Decode = Callable[[list[np.ndarray]], list[np.ndarray]]

PREVIEW_LATENTS = 32
"""Maximum side of a preview in latent pixels: 256 pixels."""


class ProgressBar:
    """A progress bar that shows evaluations of the network, and evaluations per second."""

    def __init__(self):
        self._bar: tqdm[Any] | None = None

    def __call__(self, done: int, total: int, latents: Latents) -> None:
        if self._bar is None:
            self._bar = progress_bar(total, "evaluation")
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if done == total:
            self.close()

    def close(self) -> None:
        """End the bar's line, so that an error that stops sampling has its own."""
        if self._bar is not None:
            self._bar.close()


class Previews:
    """A callback that writes a small image of every `every`-th clean estimate: `out.step005.png` for `out.png`.

    Another thread decodes the images, from latents averaged down to 256 pixels, so that sampling does not wait.
    """

    def __init__(self, decode: Decode, paths: Sequence[pathlib.Path], every: int):
        self._decode, self._paths, self._every = decode, paths, every
        self._written = 0
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._pending: list[concurrent.futures.Future[None]] = []

    def __call__(self, done: int, total: int, latents: Latents) -> None:
        due, self._written = done // self._every > self._written, done // self._every
        if due and done < total:
            self._pending.append(self._thread.submit(self._write, done, [downsample(x) for x in latents()]))

    def _write(self, done: int, latents: list[np.ndarray]) -> None:
        for image, path in zip(to_images(self._decode(latents)), self._paths, strict=True):
            save_image(image, path.with_suffix(f".step{done:03d}.png"))

    def close(self) -> None:
        """Wait for unfinished previews, and raise the first error that occurred while writing them."""
        self._thread.shutdown()
        for preview in self._pending:
            preview.result()


@contextlib.contextmanager
def progress(
    decode: Decode, paths: Sequence[pathlib.Path], preview_every: int | None
) -> Generator[ProgressCallback, None, None]:
    """Yield a callback that shows a progress bar and, with `preview_every`, writes previews of images at `paths`."""
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(contextlib.closing(ProgressBar()))
        if preview_every is None:
            yield bar
            return
        previews = stack.enter_context(contextlib.closing(Previews(decode, paths, preview_every)))

        def callback(done: int, total: int, latents: Latents) -> None:
            bar(done, total, latents)
            previews(done, total, latents)

        yield callback


def downsample(latents_tyxc: np.ndarray, side: int = PREVIEW_LATENTS) -> np.ndarray:
    """Return the latents averaged over squares so that no side is longer than `side`."""
    t, y, x, c = latents_tyxc.shape
    square = math.ceil(max(y, x) / side)
    cropped = latents_tyxc[:, : y - y % square, : x - x % square]
    return cropped.reshape(t, y // square, square, x // square, square, c).mean(axis=(2, 4))
