"""The application: all APIs and the page, behind the guards."""

import functools
import pathlib
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount
from starlette.staticfiles import StaticFiles

from anima_jax.serving.compatible import openai_api, webui_api
from anima_jax.serving.engine import Engine
from anima_jax.serving.http import own_api
from anima_jax.serving.http.guards import Guards
from anima_jax.serving.http.metrics import Measured, ServerMetrics
from anima_jax.serving.http.openapi import openapi_document
from anima_jax.serving.http.routes import api_route, matching, operations, shape_of
from anima_jax.serving.http.server import Server, ServerConfig
from anima_jax.serving.studio import dataset_api, run_api
from anima_jax.serving.studio.dataset_shown import ShownDataset
from anima_jax.serving.studio.dataset_view import DatasetView
from anima_jax.serving.studio.made_pictures import MadePictures
from anima_jax.serving.studio.run_folders import Runs

PAGE = pathlib.Path(__file__).parent / "page"

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""Suffix → media type; a browser runs no module that a Windows registry calls text/plain."""


class PageFiles(StaticFiles):
    """The page's files: never older than the server, and of types that a system's own table cannot change."""

    def file_response(self, *arguments: Any, **named: Any) -> Response:
        """Return the response of a file."""
        response = super().file_response(*arguments, **named)
        response.headers["Cache-Control"] = "no-cache"
        if (kind := TYPES.get(pathlib.Path(arguments[0]).suffix)) and response.status_code == 200:
            response.headers["Content-Type"] = kind
        return response


def create_app(engine: Engine | None, settings: ServerConfig | None = None) -> Starlette:
    """Return the application. Without an engine it answers that the model is loading until `app.state.server.start`."""
    server = Server(settings or ServerConfig(), engine)
    metrics = ServerMetrics(server)

    async def show_metrics(request: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def show_document(request: Request) -> Response:
        return JSONResponse(document())

    @functools.cache
    def document() -> dict[str, Any]:
        return openapi_document(routes, with_key=server.config.api_key is not None)

    routes: list[BaseRoute] = [
        *own_api.routes(),
        *run_api.routes(),
        *dataset_api.routes(),
        *openai_api.routes(),
        *webui_api.routes(),
        api_route("/metrics", "GET", show_metrics, "Figures for Prometheus", answer="text/plain"),
        api_route("/openapi.json", "GET", show_document, "This document", answer="application/json"),
        Mount("/", PageFiles(directory=PAGE, html=True), name="page"),
    ]
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(Measured, metrics=metrics, routes=routes),
            Middleware(Guards, config=server.config, routes=routes),
        ],
        exception_handlers={HTTPException: _http_error, Exception: _unexpected},
    )
    app.state.server = server
    app.state.runs = Runs(server.config.run) if server.config.run else None
    app.state.tiles, app.state.dataset = MadePictures(), None
    if (path := server.config.dataset) is not None:
        app.state.dataset = ShownDataset(DatasetView(path, tokenizers=server.config.files.get("tokenizers")))
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer for a path or method that does not exist."""
    assert isinstance(error, HTTPException)
    headers, status, text = dict(error.headers or {}), error.status_code, str(error.detail)
    methods = {method for route in matching(request.app.routes, request.scope) for method in route.methods or ()}
    shape = shape_of(request.url.path, request.app.routes)
    is_api = any(path.split("/")[1] == request.url.path.split("/")[1] for path, _ in operations(request.app.routes))
    if status == 404 and methods:  # the page's files were asked, which have no such name
        status = 405
    if status == 405 and not methods and is_api:
        status, headers = 404, {}
    if status == 404:
        text = "there is nothing at this address"
    elif status == 405:
        text, headers["Allow"] = (
            f"the address has no method {request.method}",
            ", ".join(sorted(methods)) or "GET, HEAD",
        )
    return JSONResponse(shape(status, text), status, headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    """Answer for what nobody expected: the traceback is on stderr, and a client sees none of it."""
    return JSONResponse({"error": "internal error; the server's own output says more"}, 500)
