"""Routes with their models: what a handler is given is checked, what it returns is described by the OpenAPI document.

A handler is `async def handler(request, *, body, query)`, with `body` and `query` if the route has such a model. It
returns a model of pydantic's or a response, and raises UserError.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import Scope

from anima_jax.errors import UserError, did_you_mean, show_value
from anima_jax.serving.engine import EngineClosedError, EngineFullError
from anima_jax.serving.http.gallery import GalleryImage
from anima_jax.serving.http.jobs import Event, Job, JobCancelledError, error_line, reported
from anima_jax.serving.http.limits import TooLargeError, UnavailableError
from anima_jax.serving.http.server import server_of

MOST_FIELDS = 100
"""Parts of a form."""

MOST_VALUES = 2**17
"""Values in a JSON text, by its commas: each that is wrong costs as much as a whole small request."""


class NotFoundError(UserError):
    """There is nothing of this name: status 404."""


class SlowBodyError(UserError):
    """A client that does not send the body that it has announced: status 408."""


class NotJsonError(UserError):
    """A body that cannot be read: status 400."""


class ConflictError(UserError):
    """What is to be changed is no longer what the client was shown: status 412."""


class MediaTypeError(UserError):
    """A body of another kind than the route takes: status 415."""


STATUS: tuple[tuple[type[UserError], int], ...] = (
    (NotJsonError, 400),
    (NotFoundError, 404),
    (SlowBodyError, 408),
    (JobCancelledError, 409),
    (ConflictError, 412),
    (TooLargeError, 413),
    (MediaTypeError, 415),
    (EngineFullError, 429),
    (EngineClosedError, 503),
    (UnavailableError, 503),
    (UserError, 422),
)
"""Error → HTTP status: the first row that fits."""

GONE = 499
"""Status of an answer that nobody reads, as nginx has it in its logs."""

BUSY = (429, 503)
"""Statuses that come with Retry-After."""


class Strict(BaseModel):
    """A body whose names and types must be exactly those of the document."""

    model_config = ConfigDict(strict=True, extra="forbid")


class ErrorAnswer(BaseModel):
    """What is wrong, in one line."""

    error: str


def plain_error(status: int, message: str) -> dict[str, Any]:
    """Return the JSON of an error of our own API."""
    return {"error": message}


ErrorShape = Callable[[int, str], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Operation:
    """One method of a route as the OpenAPI document describes it.

    `body` is the model of a JSON body, `form` that of a multipart one, `raw` media types that are taken as they are.
    `answer` is the model of the answer, or its media type; `others` are models of answers with other statuses, and
    `errors` statuses besides those that any route has; `invalid` is that of a value that is not allowed. `is_open` is
    for routes that need no key.
    """

    method: str
    summary: str
    tag: str
    body: type[BaseModel] | None = None
    form: type[BaseModel] | None = None
    raw: tuple[str, ...] = ()
    query: type[BaseModel] | None = None
    answer: type[BaseModel] | str | None = None
    status: int = 200
    others: Mapping[int, type[BaseModel]] = dataclasses.field(default_factory=dict[int, type[BaseModel]])
    errors: tuple[int, ...] = ()
    invalid: int = 422
    shape: ErrorShape = plain_error
    error_model: type[BaseModel] = ErrorAnswer
    is_open: bool = False


class ApiRoute(Route):
    """A route with its description."""

    operation: Operation


def api_route(
    path: str, method: str, handler: Callable[..., Awaitable[BaseModel | Response]], summary: str, **described: Any
) -> ApiRoute:
    """Return the route of a handler. `described` are the other fields of `Operation`."""
    operation = Operation(method, summary, **{"tag": "anima", **described})

    async def endpoint(request: Request) -> Response:
        try:
            given: dict[str, Any] = {}
            if operation.query is not None:
                given["query"] = _query(operation.query, request)
            if operation.body is not None:
                given["body"] = read_model(operation.body, await read_json(request))
            answer = await handler(request, **given)
        except UserError as error:
            return error_response(request, operation, error)
        except ClientDisconnect:
            return Response(status_code=GONE)
        except HTTPException:
            raise
        except Exception as error:
            return error_response(request, operation, reported(error), 500)
        finally:
            server_of(request).reading -= getattr(request.state, "body_bytes", 0)
        if isinstance(answer, Response):
            return answer
        return Response(answer.model_dump_json(by_alias=True), operation.status, media_type="application/json")

    route = ApiRoute(path, endpoint, methods=[method], name=f"{method} {path}")
    route.operation = operation
    return route


def error_response(request: Request, operation: Operation, error: UserError, status: int | None = None) -> Response:
    """Return the response of an error, with Retry-After if the client may try again."""
    table = (*STATUS[:-1], (UserError, operation.invalid))
    status = status or next(code for kind, code in table if isinstance(error, kind))
    headers = {"Retry-After": str(server_of(request).config.retry_after)} if status in BUSY else None
    return JSONResponse(operation.shape(status, error_line(error)), status, headers)


async def read_body(request: Request) -> bytes:
    """Return a request's body.

    Raises TooLargeError for one that is larger than the server reads, SlowBodyError for one that does not arrive.
    """
    limits, data, size = server_of(request).limits, list[bytes](), 0
    if int(request.headers.get("content-length", "0")) > limits.max_body:
        raise limits.too_large()
    server, parts, due = server_of(request), request.stream(), time.monotonic() + limits.body_timeout
    while True:
        try:
            async with asyncio.timeout(max(0.0, min(limits.read_timeout, due - time.monotonic()))):
                part = await anext(parts, None)
        except TimeoutError:
            raise SlowBodyError("the request did not arrive in time") from None
        if part is None:
            return b"".join(data)
        data.append(part)
        size += len(part)
        server.reading += len(part)
        request.state.body_bytes = size
        if size > limits.max_body:
            raise limits.too_large()
        if server.reading > limits.max_reading:
            raise UnavailableError("too many large requests at once")


def media_type(request: Request) -> str:
    """Return the kind of a request's body without parameters, in small letters; "" if it is not given."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_json(request: Request) -> bytes:
    """Return a body that is a JSON document. Raises MediaTypeError, TooLargeError or NotJsonError.

    What browsers send to other sites without asking them first is never called JSON.
    """
    kind = media_type(request)
    if kind != "application/json" and not kind.endswith("+json"):
        raise MediaTypeError(f"content-type '{show_value(kind)}', expected application/json")
    data = await read_body(request)
    check_json(data)
    return data


def check_json(data: bytes) -> None:
    """Raise NotJsonError unless this is strict JSON: UTF-8, no NaN, no key twice, no half of a surrogate pair.

    Nor may it have more than `MOST_VALUES` values.
    """
    if data.count(b",") >= MOST_VALUES:
        raise NotJsonError(f"the body has more than {MOST_VALUES} values")
    try:
        text = data.decode("utf-8")
        json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except UnicodeDecodeError:
        raise NotJsonError("the body is not UTF-8 text") from None
    except RecursionError:
        raise NotJsonError("the body is nested too deeply") from None
    except ValueError as error:
        raise NotJsonError(f"the body is not JSON: {error}") from None
    if re.search(rb"\\u[dD][89a-fA-F]", data):
        try:
            json.dumps(json.loads(text), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise NotJsonError("the body contains half of a surrogate pair") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in collections.Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"'{show_value(twice)}' is there twice")
    return found


def read_model(model: type[BaseModel], data: bytes | Mapping[str, Any]) -> BaseModel:
    """Return the model of a checked JSON document, or of a mapping. Raises UserError with what is wrong first."""
    try:
        if isinstance(data, bytes):
            return model.model_validate_json(data)
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(_described(model, error)) from None
    except RecursionError:
        raise NotJsonError("the body is nested too deeply") from None


def _described(model: type[BaseModel], error: ValidationError) -> str:
    """Return the first mistake as one line that begins with its place, such as `loras[0].weight`."""
    errors = error.errors(include_url=False, include_context=False)
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    place, given = show_value(place) if place else "the body", first["input"]
    if first["type"] == "missing":
        return f"{place} is missing"
    if first["type"] == "extra_forbidden":
        return f"there is no setting '{place}'{did_you_mean(str(first['loc'][-1]), model.model_fields)}"
    shown = "" if isinstance(given, dict | list | bytes) else f" {show_value(repr(given))}"
    return f"{place}{shown}: {first['msg'].removeprefix('Value error, ')}"


def _query(model: type[BaseModel], request: Request) -> BaseModel:
    items = request.query_params.multi_items()
    if len(dict(items)) < len(items):
        raise UserError("a parameter of the address is there twice")
    return read_model(model, dict(items))


async def read_form(request: Request) -> dict[str, list[str | bytes]]:
    """Return the fields of a form, multipart or not, with text as str and files as bytes.

    Raises MediaTypeError, TooLargeError, or NotJsonError for a form that cannot be read.
    """
    kind = media_type(request)
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise MediaTypeError(f"content-type '{show_value(kind)}', expected multipart/form-data")
    limits = server_of(request).limits
    data = await read_body(request)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": data, "more_body": False}

    found: dict[str, list[str | bytes]] = {}
    try:
        again = Request(request.scope, receive)
        options = {"max_files": MOST_FIELDS, "max_fields": MOST_FIELDS, "max_part_size": limits.max_body}
        async with again.form(**options) as form:
            for name, value in form.multi_items():
                part = await value.read() if isinstance(value, UploadFile) else value
                found.setdefault(name, []).append(part)
    except (MultiPartException, HTTPException, UnicodeDecodeError, ValueError) as error:
        text = error.detail if isinstance(error, HTTPException) else str(error)
        raise NotJsonError(f"the form cannot be read: {text}") from None
    return found


async def finished_or_gone(request: Request, job: Job) -> list[GalleryImage]:
    """Return the images of a job, which is cancelled if the client goes away before. Raises what makes it fail."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    waiting = [asyncio.ensure_future(job.finished()), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not waiting[0].done():
            raise ClientDisconnect
        return waiting[0].result() or []
    finally:
        job.cancel()  # which changes nothing if it is finished
        for task in waiting:
            task.cancel()


STILL_HERE = ": still here\n\n"
"""A server-sent comment."""


async def events_or_silence(job: Job, heartbeat: float) -> AsyncGenerator[Event | None]:
    """Yield a job's events, and None after each `heartbeat` seconds without any."""

    async def following() -> Event | None:
        return await anext(events, None)

    async with contextlib.aclosing(job.events()) as events:
        pending = asyncio.ensure_future(following())
        try:
            while True:
                done, _ = await asyncio.wait([pending], timeout=heartbeat)
                if not done:
                    yield None
                    continue
                if (event := pending.result()) is None:
                    return
                yield event
                pending = asyncio.ensure_future(following())
        finally:
            pending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await pending


def shape_of(path: str, routes: Iterable[Any]) -> ErrorShape:
    """Return the form of errors of the API whose paths begin as `path` does."""
    shapes = {route.split("/")[1]: operation.shape for route, operation in operations(routes)}
    return shapes.get(path.split("/")[1] if "/" in path else "", plain_error)


def operations(routes: Iterable[Any]) -> list[tuple[str, Operation]]:
    """Return the path and the description of each route that has one."""
    return [(route.path, route.operation) for route in routes if isinstance(route, ApiRoute)]


def matching(routes: Iterable[Any], scope: Scope) -> list[Route]:
    """Return the routes whose path is that of a request, whatever their methods; files of the page have none."""
    return [route for route in routes if isinstance(route, Route) and route.matches(scope)[0] != Match.NONE]
