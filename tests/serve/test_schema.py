"""Whatever the interface's own description allows, and much that it does not: no 5xx, and answers as described."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serve.api import Students, make_api
from serve.meter import Meter
from serve.settings import Limits

pytestmark = pytest.mark.slow  # it loads transformers

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_answers_are_as_described_and_nothing_breaks(students: Students, mode: schemathesis.GenerationMode) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", make_api(students, Limits(), None, Meter()))
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    assert {operation.path for operation in operations} >= {"/v1/predict", "/v1/models"}
    for operation in operations:
        if mode.is_negative and not operation.body:
            continue  # nothing can be wrong with it

        @settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy(generation_mode=mode))
        def hold(case: Any) -> None:
            case.call_and_validate(checks=CHECKS)

        hold()
