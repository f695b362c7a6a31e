"""The application: all APIs and the page, behind the guards."""

import pathlib
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match, Mount
from starlette.staticfiles import StaticFiles

from anima_jax.serving import own_api, run_api
from anima_jax.serving.engine import Engine
from anima_jax.serving.guards import BodyTimeout, Guards
from anima_jax.serving.metrics import Measured, ServerMetrics
from anima_jax.serving.openapi import openapi_document
from anima_jax.serving.routes import api_route, operations, plain_error
from anima_jax.serving.run_folders import Runs
from anima_jax.serving.server import Server, ServerConfig

PAGE = pathlib.Path(__file__).parent / "page"

PROTECTED = ("/api/", "/v1/", "/sdapi/", "/metrics", "/openapi.json")
"""Beginnings of the paths that need the key; the rest are the page's files and /health."""


def create_app(engine: Engine | None, settings: ServerConfig | None = None) -> Starlette:
    """Return the application. Without an engine it answers that the model is loading until `app.state.server.start`."""
    server = Server(settings or ServerConfig(), engine)
    metrics = ServerMetrics(server)

    async def show_metrics(request: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def show_document(request: Request) -> Response:
        return JSONResponse(openapi_document(routes, with_key=server.config.api_key is not None))

    routes: list[BaseRoute] = [
        *own_api.routes(),
        *run_api.routes(),
        api_route("/metrics", "GET", show_metrics, "Figures for Prometheus", answer="text/plain"),
        api_route("/openapi.json", "GET", show_document, "This document", answer="application/json"),
        Mount("/", StaticFiles(directory=PAGE, html=True, check_dir=False), name="page"),
    ]
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(Measured, metrics=metrics, routes=routes),
            Middleware(BodyTimeout, config=server.config),
            Middleware(Guards, config=server.config, protected=PROTECTED),
        ],
        exception_handlers={HTTPException: _http_error, Exception: _unexpected},
    )
    app.state.server = server
    app.state.runs = Runs(server.config.run) if server.config.run else None
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer for a path or method that does not exist."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    message = {404: "there is nothing at this address", 405: f"the address has no method {request.method}"}
    if error.status_code == 405:
        headers["Allow"] = ", ".join(sorted(_methods(request, request.app.routes)))
    text = message.get(error.status_code, str(error.detail))
    return JSONResponse(_shape(request)(error.status_code, text), error.status_code, headers)


def _methods(request: Request, routes: Sequence[BaseRoute]) -> set[str]:
    found: set[str] = set()
    for route in routes:
        if not isinstance(route, Mount) and route.matches(request.scope)[0] != Match.NONE:
            found |= getattr(route, "methods", None) or set()
    return found or {"GET", "HEAD"}


def _shape(request: Request):
    """Return the form of errors of the API whose paths begin as this one does."""
    first = request.url.path.split("/")[1:2]
    shapes = {path.split("/")[1]: operation.shape for path, operation in operations(request.app.routes)}
    return shapes.get(first[0] if first else "", plain_error)


async def _unexpected(request: Request, error: Exception) -> Response:
    """Answer for what nobody expected: the traceback is on stderr, and a client sees none of it."""
    return JSONResponse({"error": "internal error; the server's own output says more"}, 500)
