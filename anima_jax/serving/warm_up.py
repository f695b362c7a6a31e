"""Compilation ahead of the first request."""

import dataclasses
from collections.abc import Iterable

from anima_jax.sampling.request import ImageRequest, SamplingParams
from anima_jax.serving.engine import Engine
from anima_jax.serving.orders import Order

STEPS = 2
"""Steps of an image that is drawn for its programs only: a preview comes after the first."""


def warm_up(engine: Engine, sizes: Iterable[tuple[int, int]], params: SamplingParams | None = None) -> None:
    """Compile what images of these sizes, (width, height) in pixels, need, by drawing one of each in two steps.

    They take no place in the queue. Raises what makes one fail, and CancelledError if the engine is closed meanwhile.
    """
    params = dataclasses.replace(params or SamplingParams(), steps=STEPS)
    orders = [Order(ImageRequest("", *size), params, preview_every=1, is_counted=False) for size in sizes]
    for ticket in [engine.submit(order) for order in orders]:
        ticket.result()
