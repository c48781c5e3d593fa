"""The server against its own OpenAPI document: what schemathesis makes up breaks nothing."""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import positive_data_acceptance

import mpq
from mpq.dashboard.app import create_app
from mpq.dashboard.openapi import FILE
from mpq.dashboard.settings import Rate, Settings
from mpq.store.store import open_store
from tests.dashboards import secret
from tests.test_compare import SPEC

EXAMPLES = int(os.environ.get("MPQ_TEST_EXAMPLES", "50"))  # of each operation
UNLIMITED = Rate(1_000_000, 1e6)


@pytest.fixture(scope="module")
def contract(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The document of an app over two runs, one of which has results; both are found again."""
    store = open_store(tmp_path_factory.mktemp("contract") / "runs.db")
    store.submit(SPEC, queued=True)
    mpq.run_job(SPEC, store)
    limits = Settings(require_token=True, submits=UNLIMITED, solves=UNLIMITED, solves_at_once=8)
    app = create_app(store, limits)
    headers = {"Host": "localhost", "Authorization": f"Bearer {secret(store, 'admin')}"}
    document = schemathesis.openapi.from_asgi("/api/v1/openapi.json", app, headers=headers)
    return document, headers


DOCUMENT = json.loads(FILE.read_text())
OPERATIONS = sorted(  # what deletes comes last
    ((method, path) for path, found in DOCUMENT["paths"].items() for method in found),
    key=lambda operation: operation[0] == "delete",
)
# A text that fits a schema may still be no budget, no filter, no tag: that is 422 as well.
TOO_STRICT = [positive_data_acceptance]
NAMES = ("a", "latest", "nobody")  # of both runs, of one, of none


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=str)
def test_an_operation_keeps_its_contract(contract: Any, method: str, path: str) -> None:
    """No failure, no answer that the document does not tell of."""
    document, headers = contract
    asked: Counter[int] = Counter()

    @seed(0)
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=document[path][method].as_strategy(), name=st.sampled_from((*NAMES, None)))
    def ask(case: Any, name: str | None) -> None:
        if name is not None and "run" in (case.path_parameters or {}):
            case.path_parameters["run"] = name
        answer = case.call_and_validate(headers=headers, excluded_checks=TOO_STRICT)
        asked[answer.status_code] += 1

    ask()
    assert sum(asked.values()) > 0
    assert not any(status >= 500 for status in asked), asked
    print(method, path, dict(asked))
