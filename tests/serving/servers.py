"""A real server for tests: uvicorn in a thread, on a port of its own, over a tiny random model."""

import contextlib
import dataclasses
import functools
import threading
import types
from collections.abc import Iterator
from typing import Any

import httpx
import jax.numpy as jnp
import uvicorn
from PIL import Image
from starlette.applications import Starlette

from anima_jax import AnimaPipeline, UserError
from anima_jax.serving.adapters import AdapterStatistics
from anima_jax.serving.app import create_app
from anima_jax.serving.engine import Engine, EngineFullError, Statistics
from anima_jax.serving.http.http_server import protocol
from anima_jax.serving.http.server import Server, ServerConfig
from anima_jax.serving.orders import Order
from anima_jax.serving.tickets import Ticket
from anima_jax.text.tokenizers import load_tokenizers
from tests.small_run import ASSETS, write_transformer

SMALL: dict[str, Any] = {"width": 32, "height": 48, "steps": 3, "sampler": "euler"}
"""Settings of an image that takes a moment."""


@functools.cache
def small_files(folder: str) -> dict[str, str]:
    """The arguments of `AnimaPipeline.load` for a tiny random model, whose transformer is written to `folder`."""
    path = f"{folder}/base.safetensors"
    write_transformer(path)
    tiny = {"vae": str(ASSETS / "tiny_vae.safetensors"), "text_encoder": str(ASSETS / "tiny_qwen3.safetensors")}
    return {"transformer": path, "tokenizers": str(ASSETS / "tokenizers"), **tiny}


@functools.cache
def small_pipeline(folder: str) -> AnimaPipeline:
    return AnimaPipeline.load(**small_files(folder), dtype=jnp.float32)


@dataclasses.dataclass
class Running:
    """A server that runs: its address, its application, a client of it, and uvicorn's side of it."""

    url: str
    app: Starlette
    client: httpx.Client
    uvicorn: uvicorn.Server

    @property
    def server(self) -> Server:
        return self.app.state.server

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", int(self.url.rpartition(":")[2])


@contextlib.contextmanager
def running_app(app: Starlette) -> Iterator[Running]:
    """Serve an application on a free port of this machine until the block ends."""
    limited = protocol(app.state.server.limits)
    config = uvicorn.Config(app, port=0, log_level="critical", http=limited, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    started, inform = threading.Event(), server.startup

    async def startup(*arguments: Any, **named: Any) -> None:
        await inform(*arguments, **named)
        started.set()

    server.startup = startup
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert started.wait(60)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=300) as client:
            yield Running(url, app, client, server)
    finally:
        server.should_exit = True
        thread.join(60)


@contextlib.contextmanager
def running_server(folder: str, *, library: Any = None, slots: int = 4, **settings: Any) -> Iterator[Running]:
    """Serve the tiny model; `settings` are fields of `ServerConfig`, `folder` is for the model's file."""
    engine = Engine(small_pipeline(folder), slots=slots, library=library)
    files = small_files(folder) | {"dtype": "float32"}
    try:
        with running_app(create_app(engine, ServerConfig(files=files, **settings))) as running:
            yield running
    finally:
        engine.close()


class ManualEngine:
    """An engine whose tickets a test moves, for what must happen while an image waits or is drawn.

    With `at_once` an order is finished, as a black picture, when it is submitted.
    """

    def __init__(self, max_waiting: int = 2, at_once: bool = False):
        self.library, self.max_waiting, self.at_once = None, max_waiting, at_once
        self.pipeline = types.SimpleNamespace(tokenizers=load_tokenizers(ASSETS / "tokenizers"))
        self.tickets: list[Ticket] = []
        self.submitted = threading.Semaphore(0)

    def submit(self, order: Order) -> Ticket:
        order.check()
        if order.loras:
            raise UserError("the server has no folder of LoRAs")
        waiting = [ticket for ticket in self.tickets if ticket.state == "waiting"]
        if len(waiting) >= self.max_waiting:
            raise EngineFullError("too many are waiting")
        ticket = Ticket(str(len(self.tickets)), order, self._position)
        self.tickets.append(ticket)
        if self.at_once:
            self.finish(ticket)
        self.submitted.release()
        return ticket

    def _position(self, ticket: Ticket) -> int:
        return [one for one in self.tickets if one.state == "waiting"].index(ticket)

    def finish(self, ticket: Ticket) -> None:
        """Draw nothing, as a picture of the right size."""
        request = ticket.order.request
        ticket.move("done", image=Image.new("RGB", (request.width, request.height)))

    def statistics(self) -> Statistics:
        zeros = {field.name: 0 for field in dataclasses.fields(Statistics)}
        return Statistics(**zeros | {"slots": 1, "adapters": AdapterStatistics(0, 0, 0, 0, 0)})

    def drain(self, timeout: float | None = None) -> bool:
        return True

    def close(self) -> None:
        pass
