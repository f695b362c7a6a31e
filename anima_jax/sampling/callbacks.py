"""What is shown of a picture while it is being drawn: a bar, and intermediate pictures.

Both are told of an evaluation of the network while the next one runs; see `pipeline.ProgressCallback`.
"""

import concurrent.futures
import math
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from tqdm import tqdm

from anima_jax.parallel.hosts import is_process_0
from anima_jax.sampling.request import save_picture, to_images

Latents = Callable[[], list[np.ndarray]]

PREVIEW_LATENTS = 32
"""Longest side of a preview in latent pixels: 256 pixels."""


class ProgressBar:
    """Counts evaluations of the network, and how many there are in a second."""

    def __init__(self):
        self._bar: tqdm | None = None

    def __call__(self, done: int, total: int, latents: Latents) -> None:
        if self._bar is None:
            self._bar = tqdm(total=total, unit="it", dynamic_ncols=True, disable=not is_process_0())
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()


class Previews:
    """Writes a small picture of the clean estimate of every `every`-th evaluation: `out.png` gets `out.step005.png`.

    They are made in another thread, of latents averaged down to 256 pixels, so that sampling does not wait for them.
    """

    def __init__(
        self, decode: Callable[[list[np.ndarray]], list[np.ndarray]], paths: Sequence[pathlib.Path], every: int
    ):
        self._decode, self._paths, self._every = decode, paths, every
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._writing: list[concurrent.futures.Future] = []

    def __call__(self, done: int, total: int, latents: Latents) -> None:
        if 0 < done < total and done % self._every == 0:
            self._writing.append(self._thread.submit(self._write, done, [reduced(x) for x in latents()]))

    def _write(self, done: int, latents: list[np.ndarray]) -> None:
        for image, path in zip(to_images(self._decode(latents)), self._paths, strict=True):
            save_picture(image, path.with_suffix(f".step{done:03d}.png"))

    def close(self) -> None:
        """Wait for what is being written."""
        self._thread.shutdown()
        for writing in self._writing:
            writing.result()


def reduced(latents_tyxc: np.ndarray, side: int = PREVIEW_LATENTS) -> np.ndarray:
    """The latents averaged over squares, so that no side is longer than `side`."""
    t, y, x, c = latents_tyxc.shape
    square = math.ceil(max(y, x) / side)
    whole = latents_tyxc[:, : y - y % square, : x - x % square]
    return whole.reshape(t, y // square, square, x // square, square, c).mean(axis=(2, 4))
