"""The engine: what is drawn, in which order, and what becomes of orders that fail or are cancelled."""

import threading
from concurrent.futures import CancelledError

import jax.numpy as jnp
import numpy as np
import pytest

from anima_jax import AnimaPipeline, UserError
from anima_jax.sampling.request import ImageRequest, SamplingParams
from anima_jax.serving.engine import Engine, EngineClosedError, EngineFullError
from anima_jax.serving.orders import Order
from tests.small_run import ASSETS, write_transformer

PARAMS = SamplingParams(steps=3, sampler="euler")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    path = tmp_path_factory.mktemp("engine") / "base.safetensors"
    write_transformer(path)
    tiny = {name: ASSETS / f"tiny_{file}.safetensors" for name, file in (("vae", "vae"), ("text_encoder", "qwen3"))}
    return AnimaPipeline.load(transformer=path, tokenizers=ASSETS / "tokenizers", dtype=jnp.float32, **tiny)


def order(prompt="x", width=32, height=48, seed=5, params=PARAMS, **options) -> Order:
    return Order(ImageRequest(prompt, width, height, seed), params, **options)


def test_an_order_is_drawn_as_the_pipeline_draws_it(pipeline):
    engine = Engine(pipeline)
    image = engine.submit(order(preview_every=1)).result(timeout=600)
    (expected,) = pipeline("x", width=32, height=48, seed=5, steps=3, sampler="euler")
    assert np.array_equal(np.asarray(image), np.asarray(expected))
    assert engine.drain(timeout=600)
    with pytest.raises(EngineClosedError, match="no orders any more"):
        engine.submit(order())
    engine.close()


def test_a_full_queue_refuses_and_cancelled_orders_leave_it(pipeline):
    engine, reached, go = Engine(pipeline, max_waiting=1), threading.Event(), threading.Event()

    def stop(ticket):
        if ticket.done == 1:
            reached.set()
            go.wait(600)

    first = engine.submit(order())
    first.subscribe(stop)
    assert reached.wait(600)
    second = engine.submit(order())
    with pytest.raises(EngineFullError, match="1 order already waiting"):
        engine.submit(order())
    second.cancel()
    with pytest.raises(UserError, match="width"):
        engine.submit(order(width=33))
    first.cancel()
    go.set()
    for ticket in (first, second):
        with pytest.raises(CancelledError):
            ticket.result(timeout=600)
    engine.close()
