"""Promise: the service does what its /openapi.json says, whatever is sent by that description."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from service.app import create_app
from service.models import Models
from service.settings import Settings

# Sentences about a picture that is none are right answers to what the description calls binary data.
EXCLUDED = [positive_data_acceptance]


@pytest.fixture(scope="module")
def api(model_file: Path) -> Iterator[schemathesis.BaseSchema]:
    models = Models(Settings(model=model_file, device="cpu", threads=1))
    models.start()
    yield schemathesis.openapi.from_asgi("/openapi.json", create_app(models=models))
    models.close()


described = schemathesis.pytest.from_fixture("api")


@described.parametrize()
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_operation_keeps_to_its_description(case: schemathesis.Case) -> None:
    case.call_and_validate(excluded_checks=EXCLUDED)
