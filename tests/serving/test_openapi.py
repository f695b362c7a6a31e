"""The OpenAPI document: complete, and true of what the server answers to what it allows and to what it does not."""

import contextlib

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

pytest.importorskip("uvicorn")
pytest.importorskip("schemathesis")

import schemathesis

from anima_jax.serving.app import create_app
from anima_jax.serving.http.limits import RequestLimits
from anima_jax.serving.http.routes import ApiRoute
from anima_jax.serving.http.server import ServerConfig
from tests.serving.servers import ManualEngine, running_app

EXAMPLES = 2
"""For each operation; by hand it may be thousands."""


@pytest.fixture(scope="module")
def running():
    limits = RequestLimits(max_size=64, max_steps=8, max_batch=2, max_body=10**8)
    with running_app(create_app(ManualEngine(at_once=True), ServerConfig(limits=limits))) as running:
        yield running


@pytest.fixture(scope="module")
def document(running):
    return running.client.get("/openapi.json").json()


CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance"),
    *("response_schema_conformance", "unsupported_method", "missing_required_header"),
)

STRICT = "negative_data_rejection"
"""What holds for our own API: A1111's takes True for a number, as the original does."""


def ask(operation, mode, examples: int) -> None:
    """Send what the document allows of an operation, or does not allow, and compare the answers with the document."""
    options = settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )

    @options
    @given(case=operation.as_strategy(generation_mode=mode))
    def asked(case):
        names = (*CHECKS, *[STRICT] * operation.path.startswith("/api/"))
        case.call_and_validate(checks=[schemathesis.checks.CHECKS.get_one(name) for name in names], timeout=60)

    asked()


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.name.lower())
def test_answers_are_those_of_the_document(running, mode):
    described = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    for found in described.get_all_operations():
        with contextlib.suppress(Unsatisfiable):  # an operation without parameters allows everything
            ask(found.ok(), mode, EXAMPLES)


def test_every_route_is_described(running, document):
    described = {(path, method.upper()) for path, found in document["paths"].items() for method in found}
    routes = [route for route in running.app.routes if isinstance(route, ApiRoute)]
    assert {(route.path_format, route.operation.method) for route in routes} == described
    assert document["openapi"] == "3.1.0"
    names = [operation["operationId"] for found in document["paths"].values() for operation in found.values()]
    assert len(set(names)) == len(names)
