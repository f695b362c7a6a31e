"""uvicorn, with what it lacks: time limits for headers and for slow readers, and a stop that finishes jobs first."""

import asyncio
import contextlib
import dataclasses
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from anima_jax.errors import UserError, os_reason, plural
from anima_jax.exit_codes import INTERRUPTED
from anima_jax.sampling.request import SamplingParams
from anima_jax.serving.engine import Engine
from anima_jax.serving.http.limits import RequestLimits
from anima_jax.serving.http.server import Server, ServerConfig
from anima_jax.serving.tickets import EngineClosedError
from anima_jax.serving.warm_up import warm_up

GRACE = 2.0
"""Seconds for which clients can still fetch what was drawn while the server was stopping."""

CHECK = 0.1
"""Seconds between two looks at what is still open when the server stops."""

CLOSING = 10
"""Seconds for answers that are still being sent when the server ends."""

LEAST_READ = 2**22
"""Bytes that a client takes within `RequestLimits.write_timeout` while more waits for it, or it is let go."""

SPARE_FILES = 500
"""Files that the process opens besides connections."""

KEEP_ALIVE = 60
"""Seconds for which an idle connection stays open: longer than clients keep it, who would send into a closed one."""

BUSY = b"""HTTP/1.1 503 Service Unavailable\r
content-type: application/json\r
retry-after: 5\r
connection: close\r
content-length: 33\r
\r
{"error": "too many connections"}"""


def protocol(limits: RequestLimits) -> type[H11Protocol]:
    """Return uvicorn's HTTP protocol with these limits of time and connections."""

    class LimitedProtocol(H11Protocol):
        _headers_due: asyncio.TimerHandle | None = None
        _reader_due: asyncio.TimerHandle | None = None
        _unsent = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.max_connections:
                transport.write(BUSY)
                transport.close()
            self._await_headers()

        def data_received(self, data: bytes) -> None:
            if self._headers_due is None and (not self.cycle or self.cycle.response_complete):
                self._await_headers()  # of the next request, or the rest of a body that nobody reads
            super().data_received(data)

        def handle_events(self) -> None:
            super().handle_events()
            if self.cycle and not self.cycle.response_complete:
                _cancel(self._headers_due)
                self._headers_due = None

        def pause_writing(self) -> None:
            super().pause_writing()
            self._await_reader()

        def resume_writing(self) -> None:
            super().resume_writing()
            _cancel(self._reader_due)

        def connection_lost(self, exc: Exception | None) -> None:
            _cancel(self._headers_due)
            _cancel(self._reader_due)
            super().connection_lost(exc)

        def _await_reader(self) -> None:
            self._unsent = self.transport.get_write_buffer_size()
            self._reader_due = self.loop.call_later(limits.write_timeout, self._end_if_not_read)

        def _end_if_not_read(self) -> None:
            if self._unsent - self.transport.get_write_buffer_size() < LEAST_READ:
                self.transport.abort()
            else:  # a large answer for a slow line
                self._await_reader()

        def _await_headers(self) -> None:
            self._headers_due = self.loop.call_later(limits.read_timeout, self.transport.abort)

    return LimitedProtocol


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class HttpServer(uvicorn.Server):
    """A server of the application, in the main thread, while another thread loads the model.

    `load` returns the engine. With `warm_up`, images of the default size are compiled for while requests are taken.
    SIGTERM and Ctrl-C end the server once its jobs are finished, at most after
    `drain_timeout` seconds; a second one ends it at once.
    """

    def __init__(
        self,
        app: Starlette,
        load: Callable[[], Engine],
        drain_timeout: float,
        ready: Callable[[], None],
        *,
        warm_up: bool = False,
    ):
        self.state: Server = app.state.server
        limits = self.state.limits
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol(limits),
                loop="asyncio",  # uvloop takes the signals from `launch`
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",  # what clients do wrong is not the server's business
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=CLOSING,
            )
        )
        self._load, self._ready, self._drain_timeout = load, ready, drain_timeout
        self._stopping, self._warm_up = False, warm_up
        self.error: BaseException | None = None
        self._loader = threading.Thread(target=self._load_model, name="anima loader", daemon=True)

    def serve_on(self, listening: socket.socket) -> None:
        """Serve until a signal. Raises what loading the model raised."""
        _allow_files(self.state.limits.max_connections + SPARE_FILES)
        self.run(sockets=[listening])
        if self.error is not None:
            raise self.error
        if self._loader.is_alive():  # It uses libraries that must not be torn down below it.
            sys.stdout.flush()
            os._exit(0)
        if self.state.jobs.engine is not None:
            self.state.jobs.engine.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and begin to load the model."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._loader.start()

    def _load_model(self) -> None:
        try:
            engine = self._load()
        except BaseException as error:
            self.error, self.should_exit = error, True
            self.state.fail()
            return
        self._loop.call_soon_threadsafe(self._start, engine)
        if self._warm_up:
            self._warm(engine)

    def _warm(self, engine: Engine) -> None:
        defaults, names = self.state.config.defaults, {field.name for field in dataclasses.fields(SamplingParams)}
        params = SamplingParams(**{name: value for name, value in defaults.items() if name in names})
        try:
            warm_up(engine, [self.state.default_size], params)
        except (UserError, EngineClosedError, CancelledError) as error:
            if not self._stopping:
                print(f"images of the default size: {error}", file=sys.stderr, flush=True)

    def _start(self, engine: Engine) -> None:
        self.state.start(engine)
        if self._stopping:
            self.state.stop_taking_jobs()
            return
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals ourselves: uvicorn would end the jobs."""
        numbers = [signal.SIGINT, signal.SIGTERM] if threading.current_thread() is threading.main_thread() else []
        before = {number: signal.signal(number, self._stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._stopping:
            os._exit(INTERRUPTED if number == signal.SIGINT else 128 + number)
        self._stopping = True
        self._loop.call_soon_threadsafe(lambda: setattr(self, "_draining", self._loop.create_task(self._drain())))

    async def _drain(self) -> None:
        engine, jobs = self.state.jobs.engine, self.state.jobs.unfinished()
        due = time.monotonic() + self._drain_timeout
        self.state.stop_taking_jobs()
        if engine is not None and (jobs or self.state.jobs.followed):
            print(f"stopping after {plural(len(jobs), 'job')}; a second signal ends them", file=sys.stderr, flush=True)
            while self.state.jobs.followed and time.monotonic() < due:  # they have jobs that are not submitted yet
                await asyncio.sleep(CHECK)
            await asyncio.to_thread(engine.drain, max(0.0, due - time.monotonic()))
            jobs = self.state.jobs.unfinished()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSING):
                    await asyncio.gather(*(job.finished() for job in jobs), return_exceptions=True)
            for job in self.state.jobs.unfinished():
                job.cancel()
            await asyncio.sleep(GRACE)
        self.should_exit = True


def _allow_files(count: int) -> None:
    """Let this process open so many files and connections, if the system may be asked for that and allows it."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        allowed = count if hard == resource.RLIM_INFINITY else min(count, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def listen(config: ServerConfig) -> socket.socket:
    """Return a socket that listens at a server's address. Raises UserError if that is taken or not this machine's."""
    where = f"--host {config.host} --port {config.port}"
    try:
        kind, _, _, _, address = socket.getaddrinfo(
            config.host.strip("[]"), config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(kind, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"{where}: {os_reason(error)}") from None
    try:
        if os.name != "nt":  # where it would let two programs listen
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise UserError(f"{where}: {os_reason(error)}") from None
    return listening
