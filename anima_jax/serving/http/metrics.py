"""Figures for Prometheus: requests by route and status, the queue, and what the engine does."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anima_jax.serving.http.routes import matching
from anima_jax.serving.http.server import Server

SECONDS = (0.005, 0.025, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class ServerMetrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self, server: Server):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "anima_requests", "HTTP requests", ("method", "route", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "anima_request_seconds", "Time to the end of an answer", ("route",), buckets=SECONDS, registry=self.registry
        )
        self.running = Gauge("anima_requests_running", "HTTP requests being answered", registry=self.registry)
        self.registry.register(EngineFigures(server))

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self.registry)


class EngineFigures(Collector):
    """What the engine, the jobs and the process say when they are asked."""

    def __init__(self, server: Server):
        self._server = server

    def collect(self) -> Iterator[Metric]:
        """Yield the figures as they are now."""
        jobs = self._server.jobs.newest_first()
        states = dict.fromkeys(("waiting", "drawing", "done", "failed", "cancelled"), 0)
        for job in jobs:
            states[job.state] += 1
        family = GaugeMetricFamily("anima_jobs", "Jobs that are known, by state", labels=("state",))
        for state, count in states.items():
            family.add_metric((state,), count)
        yield family
        yield GaugeMetricFamily("anima_memory_bytes", "Memory of the process", value=resident_bytes())
        engine = self._server.jobs.engine
        if engine is None:
            return
        now = engine.statistics()
        rate = 1 / now.seconds_per_evaluation if now.seconds_per_evaluation else 0.0
        for name, meaning, value in (
            ("anima_queue_images", "Images that wait to be drawn", now.waiting),
            ("anima_drawing_images", "Images being drawn", now.drawing),
            ("anima_slots", "Images that can share an evaluation", now.slots),
            ("anima_slots_used", "Slots in use", now.used_slots),
            ("anima_lora_pages", "Pages of the store of LoRAs, of 8 ranks each", now.adapters.pages),
            ("anima_lora_pages_used", "Pages of LoRAs that images in slots use", now.adapters.used_pages),
            ("anima_loras_stored", "LoRAs in the store", now.adapters.adapters),
            ("anima_loras_merged", "Sets of merged parameters on the devices", now.adapters.merged),
            ("anima_loras_waiting_images", "Images that wait for room for their LoRAs", now.adapters.waiting),
            ("anima_evaluations_per_second", "Evaluations of the network while it draws", rate),
        ):
            yield GaugeMetricFamily(name, meaning, value=value)
        for name, meaning, value in (
            ("anima_evaluations", "Evaluations of the network", now.evaluations),
            ("anima_image_evaluations", "Evaluations, once for each image that took part", now.image_evaluations),
            ("anima_images", "Images drawn", now.images),
            ("anima_images_failed", "Images that could not be drawn", now.failed),
            ("anima_images_cancelled", "Images that were cancelled", now.cancelled),
            ("anima_compilations", "Programs compiled", now.compilations),
        ):
            yield CounterMetricFamily(name, meaning, value=value)


def resident_bytes() -> float:
    """Return the memory of this process; 0 where the system does not say, as on macOS and Windows."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            import resource

            return float(file.read().split()[1]) * resource.getpagesize()
    except (OSError, ImportError):
        return 0.0


class Measured:
    """ASGI middleware that counts and times the requests of each route."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics, routes: list[BaseRoute]):
        self._app, self._metrics, self._routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, begun = 500, time.monotonic()

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.running.inc()
        try:
            await self._app(scope, receive, send_and_note)
        finally:
            self._metrics.running.dec()
            found = matching(self._routes, scope)
            path = found[0].path if found else "other"  # a stranger's path would be a series of its own
            known = scope["method"] in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS")
            self._metrics.requests.labels(scope["method"] if known else "other", path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(time.monotonic() - begun)
