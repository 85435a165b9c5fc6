"""Schemathesis over our own OpenAPI document: whatever is sent, never a 5xx.

HEADRACE_FUZZ_EXAMPLES sets how many requests are made in all (default 240).
"""

from __future__ import annotations

import os
from collections import Counter

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server.live import MODEL_NAME, LiveServer

EXAMPLES = int(os.environ.get("HEADRACE_FUZZ_EXAMPLES", "240"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
WEIGHTS = {"/v1/completions": 4, "/v1/chat/completions": 4, "/tokenize": 2}


def test_never_a_5xx(live: LiveServer) -> None:
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    weights = [WEIGHTS.get(operation.path, 1) for operation in operations]
    seen: Counter[int] = Counter()
    for operation, weight in zip(operations, weights, strict=True):
        fuzz(operation, EXAMPLES * weight // sum(weights), seen)
    assert seen[200] > EXAMPLES // 20, seen  # the fuzz reaches behind the validation
    assert seen[400] > EXAMPLES // 20, seen
    assert live.engine.is_alive


def fuzz(operation: schemathesis.APIOperation, num_examples: int, seen: Counter[int]) -> None:
    """Send good and bad requests to one route."""
    modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
    cases = st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes])

    @settings(
        max_examples=num_examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def send(case: schemathesis.Case) -> None:
        body = case.body if isinstance(case.body, dict) else {}
        # without the served model's name, all requests would end at 404
        if isinstance(body.get("model"), str):
            body["model"] = MODEL_NAME
        # without a limit, a chat ends where it is drawn: the test would take 20 s, or minutes
        if operation.path == "/v1/chat/completions" and body.get("max_tokens") is None:
            body["max_tokens"] = 16
        response = case.call(timeout=60)
        seen[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    send()
