"""A real server for tests: uvicorn in a thread, on a port of its own, over a tiny random model."""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import jax.numpy as jnp
import uvicorn
from starlette.applications import Starlette

from anima_jax import AnimaPipeline
from anima_jax.serving.app import create_app
from anima_jax.serving.engine import Engine
from anima_jax.serving.server import Server, ServerConfig
from tests.small_run import ASSETS, write_transformer

SMALL: dict[str, Any] = {"width": 32, "height": 48, "steps": 3, "sampler": "euler"}
"""Settings of an image that takes a moment."""


@functools.cache
def small_files(folder: str) -> dict[str, str]:
    """The arguments of `AnimaPipeline.load` for a tiny random model, whose transformer is written to `folder`."""
    path = f"{folder}/base.safetensors"
    write_transformer(path)
    tiny = {
        name: str(ASSETS / f"tiny_{file}.safetensors") for name, file in (("vae", "vae"), ("text_encoder", "qwen3"))
    }
    return {"transformer": path, "tokenizers": str(ASSETS / "tokenizers"), **tiny}


@functools.cache
def small_pipeline(folder: str) -> AnimaPipeline:
    return AnimaPipeline.load(**small_files(folder), dtype=jnp.float32)


@dataclasses.dataclass
class Running:
    """A server that runs: its address, its application, and a client of it."""

    url: str
    app: Starlette
    client: httpx.Client

    @property
    def server(self) -> Server:
        return self.app.state.server


@contextlib.contextmanager
def running_app(app: Starlette, **options: Any) -> Iterator[Running]:
    """Serve an application on a free port of this machine until the block ends."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", **options))
    started = threading.Event()
    inform = server.startup

    async def startup(*arguments: Any, **named: Any) -> None:
        await inform(*arguments, **named)
        started.set()

    server.startup = startup
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert started.wait(60)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, timeout=300) as client:
            yield Running(url, app, client)
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
