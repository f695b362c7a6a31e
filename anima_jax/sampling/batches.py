"""Images that depend on the rest of their ComfyUI batch: `dpm_adaptive` chooses its steps by the batch's error."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from anima_jax.sampling.callbacks import Latents, ProgressCallback
from anima_jax.sampling.request import ImageRequest

Draw = Callable[[Sequence[ImageRequest], ProgressCallback], list[np.ndarray]]
"""Draws one batch: requests → each image's latents."""


def draw_whole_batches(
    requests: Sequence[ImageRequest], draw: Draw, callback: ProgressCallback | None
) -> list[np.ndarray]:
    """Return each image's latents, from its whole ComfyUI batch, so that it does not depend on the other `requests`.

    One batch after the other is drawn, each once. `callback` is told the progress of all of them.
    """
    firsts = list(dict.fromkeys(dataclasses.replace(request, batch_index=0) for request in requests))
    drawn: dict[ImageRequest, list[np.ndarray]] = {}
    finished = 0

    def images(known: dict[ImageRequest, list[np.ndarray]]) -> list[np.ndarray]:
        """Return the images of all requests; those of batches that are not drawn yet are blank."""
        blank = np.zeros_like(next(iter(known.values()))[0])
        batches = [known.get(dataclasses.replace(request, batch_index=0)) for request in requests]
        return [
            batch[request.batch_index] if batch else blank for request, batch in zip(requests, batches, strict=True)
        ]

    for left, first in zip(range(len(firsts), 0, -1), firsts, strict=True):
        before = finished

        def of_all(
            done: int, total: int, latents: Latents, left: int = left, first: ImageRequest = first, before: int = before
        ) -> None:
            nonlocal finished
            finished = before + done
            if callback:
                callback(finished, before + total * left, lambda: images(drawn | {first: latents()}))

        drawn[first] = draw(
            [dataclasses.replace(first, batch_index=index) for index in range(first.batch_size)], of_all
        )
    return images(drawn)
