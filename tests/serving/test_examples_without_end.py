"""What schemathesis makes of the OpenAPI document never ends in a 5xx, and every answer is as the document says.

``SCHEMA_EXAMPLES=1000`` asks each of the two addresses that predict so many times, and the others as often as they
differ.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from benchmarks.fuzz_serving import Model
from shoal.serving import Server

schemathesis = pytest.importorskip("schemathesis")
pytest.importorskip("schemathesis.checks")

NUM_EXAMPLES = int(os.environ.get("SCHEMA_EXAMPLES", "100"))
QUIET = ["/v2", "/v2/models/fuzzed", "/v2/models/fuzzed/ready", "/v2/health/live", "/v2/health/ready", "/metrics"]


@pytest.fixture(name="told", scope="module")
def _told() -> Iterator[Any]:
    """Of a model that has a finite answer to all finite numbers: one that overflows fails, which is a 500."""
    with Server(Model()) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


TOO_STRICT = [
    schemathesis.checks.positive_data_acceptance,  # a schema cannot say that data must fill the shape beside them
    schemathesis.checks.negative_data_rejection,  # 413 is a refusal, too
]


def asked(requests: Any, num_examples: int) -> int:
    """How many requests were answered well."""
    answers = []

    @settings(
        max_examples=num_examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(requests)
    def ask(case: Any) -> None:
        answers.append(case.call_and_validate(timeout=20, excluded_checks=TOO_STRICT).status_code)

    ask()
    return len(answers)


@pytest.mark.parametrize("path", ["/predict", "/v2/models/fuzzed/infer"])
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_whatever_is_asked_of_a_model_is_answered_as_the_document_says(told: Any, path: str, mode: str) -> None:
    requests = told[path]["POST"].as_strategy(generation_mode=schemathesis.GenerationMode[mode])
    assert asked(requests, NUM_EXAMPLES // 2) >= NUM_EXAMPLES // 2


@pytest.mark.parametrize("path", QUIET)
def test_whatever_is_told_is_as_the_document_says(told: Any, path: str) -> None:
    assert asked(told[path]["GET"].as_strategy(), 1)


def test_no_address_is_left_out(told: Any) -> None:
    assert sorted(told) == sorted(["/predict", "/v2/models/fuzzed/infer", *QUIET])
