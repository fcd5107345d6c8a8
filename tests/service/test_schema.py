"""Promise: the service does what its /openapi.json says, whatever is sent by that description or against it."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from live import serving
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from service.app import create_app
from service.models import Models
from service.settings import Settings

QUESTIONS = ("GET /livez", "GET /readyz", "GET /healthz", "GET /metrics", "GET /models")
TAKING_INPUT = ("GET /classes", "POST /segment", "POST /segment/batch", "POST /hf")

# What the description calls binary data may be no picture, and a sentence about that is the right answer to it.
EXCLUDED = [positive_data_acceptance, schemathesis.checks.not_a_server_error]


@pytest.fixture(scope="module")
def api(model_file: Path) -> Iterator[schemathesis.BaseSchema]:
    models = Models(Settings(model=model_file, device="cpu", threads=1, timeout_ms=240_000))
    models.start()
    yield schemathesis.openapi.from_asgi("/openapi.json", create_app(models=models))
    models.close()


def no_server_error(context: object, response: schemathesis.Response, case: schemathesis.Case) -> None:
    """504 is the right answer to a request that gives itself a millisecond."""
    in_vain = response.status_code == 504 and "timeout_ms" in str((case.query, case.body))
    assert response.status_code < 500 or in_vain


def check(api: schemathesis.BaseSchema, operation: str, mode: GenerationMode, examples: int) -> None:
    method, path = operation.split()

    @given(case=api[path][method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    def keeps_to_its_description(case: schemathesis.Case) -> None:
        case.call_and_validate(additional_checks=[no_server_error], excluded_checks=EXCLUDED)

    keeps_to_its_description()


def test_every_operation_is_in_this_suite(api: schemathesis.BaseSchema) -> None:
    described = {result.ok().label for result in api.get_all_operations()}
    assert described == {*QUESTIONS, *TAKING_INPUT}


@pytest.mark.parametrize("path", ["/segment", "/segment/batch", "/hf"])
def test_a_body_that_does_not_come_is_answered_as_described(model_file: Path, path: str) -> None:
    models = Models(Settings(model=model_file, device="cpu", threads=1, upload_timeout_ms=50))
    models.start()
    app = create_app(models=models)
    with serving(app) as url, socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 60) as connection:
        form = "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 9\r\n"
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\n{form}\r\n--b".encode())
        status = connection.recv(4096).split()[1].decode()
    models.close()
    assert status == "408"
    assert status in app.openapi()["paths"][path]["post"]["responses"]


@pytest.mark.parametrize("operation", QUESTIONS)
def test_questions_are_answered_as_described(api: schemathesis.BaseSchema, operation: str) -> None:
    check(api, operation, GenerationMode.POSITIVE, 2)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", TAKING_INPUT)
def test_input_is_answered_as_described(api: schemathesis.BaseSchema, operation: str, mode: GenerationMode) -> None:
    check(api, operation, mode, 30)
