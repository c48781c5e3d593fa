"""Lines of a driver that programs read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpq import driver
from mpq.core.errors import InvalidInputError
from mpq.core.jobs import RunState
from mpq.logged import Logged
from mpq.progress import Silent
from mpq.store.store import Store, open_store
from tests.test_compare import SPEC


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "runs.db") as opened:
        yield opened


def test_a_driven_run_writes_json_lines(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MPQ_LOG", "json")
    monkeypatch.setattr(driver.signal, "signal", lambda *_: None)  # that of the tests stays
    run_id, _ = store.submit(SPEC)
    driver.drive(store, run_id)
    assert store.run(run_id).state is RunState.SUCCEEDED
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {line["run_id"] for line in lines} == {run_id}
    ended = {line["stage"]: line for line in lines if line["event"] == "stage_ended"}
    assert set(ended) == {stage.stage for stage in store.progress(run_id)}
    for stage, line in ended.items():
        tasks = [
            li["task"] for li in lines if (li["event"], li.get("stage")) == ("task_done", stage)
        ]
        assert tasks == list(range(line["done"]))
        assert line["done"] == line["total"]


def test_silence_where_it_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPQ_LOG", raising=False)
    silent = Silent()
    assert Logged.of("r", silent) is silent
    monkeypatch.setenv("MPQ_LOG", "yaml")
    with pytest.raises(InvalidInputError, match="MPQ_LOG is 'json' or not set, got 'yaml'"):
        Logged.of("r", silent)


def test_a_stage_that_fails_ends(capsys: pytest.CaptureFixture[str]) -> None:
    def failing() -> None:
        with Logged("r", Silent()).stage("s", 2) as advance:
            advance()
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        failing()
    events = [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()]
    assert events == ["stage_started", "task_done", "stage_ended"]
