"""The OpenAPI 3.1 document of a server, from the models of its routes."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

import anima_jax
from anima_jax.serving.http.routes import BUSY, Operation, operations

PATH_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")

REASONS = {
    400: "The body cannot be read.",
    401: "The key is missing or wrong.",
    403: "Another site's page asks, or the server is called by a name that is not its own.",
    404: "There is nothing of this name.",
    405: "The route has no such method.",
    408: "The body does not arrive.",
    409: "The state does not allow it.",
    412: "It was changed meanwhile.",
    413: "The body is too large.",
    415: "The body is of another kind.",
    422: "A value is not allowed.",
    429: "The queue is full.",
    500: "A fault of the server.",
    503: "The server takes no jobs now.",
}


def openapi_document(routes: Sequence[Any], *, with_key: bool) -> dict[str, Any]:
    """Return the document of all routes that `api_route` made; `with_key` if the server asks for a key."""
    described = operations(routes)
    models = [
        *((model, "validation") for _, op in described for model in (op.body, op.form, op.query) if model),
        *((op.answer, "serialization") for _, op in described if isinstance(op.answer, type)),
        *((model, "serialization") for _, op in described for model in op.others.values()),
        *((op.error_model, "serialization") for _, op in described),
    ]
    references, definitions = models_json_schema(
        list(dict.fromkeys(models)),  # pyright: ignore[reportArgumentType] - the modes are literals
        ref_template="#/components/schemas/{model}",
    )
    schemas = definitions.get("$defs", {})
    paths: dict[str, dict[str, Any]] = {}
    for path, operation in described:
        written = _operation(path, operation, references, schemas)
        paths.setdefault(PATH_PARAMETER.sub(r"{\1}", path), {})[operation.method.lower()] = written
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "anima_jax", "version": anima_jax.__version__},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if with_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _operation(
    path: str, operation: Operation, references: Mapping[Any, Any], schemas: Mapping[str, Any]
) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in PATH_PARAMETER.findall(path)
    ]
    if operation.query is not None:
        schema = _resolved(references[operation.query, "validation"], schemas)
        required = schema.get("required", ())
        parameters += [
            {"name": name, "in": "query", "required": name in required, "schema": field}
            for name, field in schema.get("properties", {}).items()
        ]
    content = {kind: {"schema": {}} for kind in operation.raw}
    for kind, model in (("application/json", operation.body), ("multipart/form-data", operation.form)):
        if model is not None:
            content[kind] = {"schema": references[model, "validation"]}
    answer = operation.answer
    shown = {answer: {}} if isinstance(answer, str) else {}
    if isinstance(answer, type):
        shown = {"application/json": {"schema": references[answer, "serialization"]}}
    responses: dict[str, Any] = {
        str(operation.status): {"description": "Done."} | ({"content": shown} if shown else {})
    }
    for status in sorted({401, 403, 405, 500, *operation.errors, *_own_errors(operation)}):
        responses[str(status)] = {
            "description": REASONS[status],
            "content": {"application/json": {"schema": references[operation.error_model, "serialization"]}},
        }
        if status in BUSY:
            responses[str(status)]["headers"] = {"Retry-After": {"schema": {"type": "string"}}}
    for status, model in operation.others.items():
        schema = references[model, "serialization"]
        responses[str(status)] = {"description": "Another answer.", "content": {"application/json": {"schema": schema}}}
    written: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{operation.method.lower()}{path}").strip("_"),
        "summary": operation.summary,
        "tags": [operation.tag],
        "responses": responses,
    }
    if parameters:
        written["parameters"] = parameters
    if content:
        written["requestBody"] = {"required": True, "content": content}
    if operation.is_open:
        written["security"] = []
    return written


def _own_errors(operation: Operation) -> set[int]:
    has_body = operation.body is not None or operation.form is not None or bool(operation.raw)
    of_body = {400, 408, 413, 415, operation.invalid} if has_body else set[int]()
    return of_body | ({400, operation.invalid} if operation.query is not None else set[int]())


def _resolved(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Mapping[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    return schemas[name] if name else schema
