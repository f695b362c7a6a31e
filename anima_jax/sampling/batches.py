"""Images that depend on the rest of their ComfyUI batch: `dpm_adaptive` chooses its steps by the batch's error."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from anima_jax.sampling.callbacks import Latents, ProgressCallback
from anima_jax.sampling.request import INPUTS, ImageRequest

Draw = Callable[[Sequence[ImageRequest], ProgressCallback], list[np.ndarray]]
"""Draws one batch: requests → each image's latents."""


def draw_whole_batches(
    requests: Sequence[ImageRequest], callback: ProgressCallback | None, draw: Draw
) -> list[np.ndarray]:
    """Return each image's latents, from its whole ComfyUI batch, so that it does not depend on the other `requests`.

    One batch after the other is drawn, each once. `callback` is told the progress of all of them.
    """
    batches = list(whole_batches(requests))
    drawn: dict[ImageRequest, np.ndarray] = {}
    done_before = done_now = 0

    def progress(done: int, total: int, latents: Latents) -> None:
        nonlocal done_now
        done_now, batch, left = done, batches[0], len(batches)
        if callback:
            callback(done_before + done, done_before + total * left, lambda: images(drawn | named(batch, latents())))

    def images(known: dict[ImageRequest, np.ndarray]) -> list[np.ndarray]:
        """Return the images of all requests; those that are not known yet are blank."""
        blank = np.zeros_like(next(iter(known.values())))
        return [known.get(request, blank) for request in requests]

    while batches:
        drawn.update(named(batches[0], draw(batches[0], progress)))
        done_before += done_now
        batches.pop(0)
    return images(drawn)


def named(batch: Sequence[ImageRequest], latents: Sequence[np.ndarray]) -> dict[ImageRequest, np.ndarray]:
    return dict(zip(batch, latents, strict=True))


def whole_batches(requests: Sequence[ImageRequest]) -> Iterator[list[ImageRequest]]:
    """Yield the ComfyUI batches that the requests belong to, each with all of its images.

    Requests that are a whole batch together may have different prompts and `INPUTS`. Images that are missing have those
    of the others of their batch.
    """
    none: Any = dict.fromkeys(INPUTS, ())
    groups: dict[ImageRequest, list[ImageRequest]] = {}
    for request in requests:
        groups.setdefault(dataclasses.replace(request, prompt="", batch_index=0, **none), []).append(request)
    for key, group in groups.items():
        indices = range(key.batch_size)
        if sorted(request.batch_index for request in group) == list(indices):
            yield sorted(group, key=lambda request: request.batch_index)
        else:
            for request in dict.fromkeys(dataclasses.replace(request, batch_index=0) for request in group):
                yield [dataclasses.replace(request, batch_index=index) for index in indices]
