"""Runs are found by what they are, a page at a time; nothing written becomes SQL."""

from __future__ import annotations

import base64
import contextlib
import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import update
from typer.testing import CliRunner

import mpq
from mpq.cli import app
from mpq.core.conditions import Condition
from mpq.core.errors import InvalidInputError
from mpq.core.evaluation import CHOSEN, Evaluation
from mpq.core.jobs import JobSpec, RunState
from mpq.core.moments import moment, span
from mpq.core.problem import Allocation, Solution, Status
from mpq.store.models import RunRow
from mpq.store.query import RunQuery
from mpq.store.store import Store, open_store
from tests.builders import schemes

SPEC = JobSpec(model="pkg:net", calibration="pkg:data", budgets=("memory <= 60%",))
START = datetime(2026, 3, 1, tzinfo=UTC)


def solved(store: Store, run_id: str, memory: float, divergence: float, accuracy: float) -> None:
    """Give a run a chosen allocation with these numbers."""
    allocation = Allocation({"a": schemes("int4")[0]})
    solution = Solution(
        status=Status.OPTIMAL,
        solver="made",
        budgets=(),
        allocation=allocation,
        score=divergence / 2,
        totals={"memory": memory, "latency": 1e-3},
        bound=0.0,
        gap=0.0,
        seconds=0.0,
    )
    store.put_solution(run_id, "uniform int8", replace(solution, totals={"memory": 1e12}))
    store.put_solution(run_id, CHOSEN, solution)
    measured = Evaluation(
        candidate=CHOSEN,
        split="held_out",
        allocation=allocation,
        divergence="kl",
        mean=divergence,
        stderr=0.0,
        metrics={"accuracy": accuracy},
    )
    store.put_evaluation(run_id, measured)
    store.put_evaluation(run_id, replace(measured, split="calibration", mean=0.0))


def make(store: Store, count: int = 12) -> list[dict[str, Any]]:
    """Runs number 0, 1, ... whose properties are told beside their ids; every third is solved."""
    made = []
    for i in range(count):
        spec = replace(
            SPEC,
            name=f"vit_{i % 4}" if i % 2 else f"Bert{i % 4}",
            model=f"pkg:net{i % 2}",
            metric=("kl", "gauss_newton")[i % 3 == 0],
            budgets=(("memory <= 60%",), ("memory<=4 MB", "latency <= 3 ms"))[i % 2],
        )
        tags = [f"t{i % 2}", "all"]
        run_id, _ = store.submit(spec, owner=f"user{i % 3}", tags=tags, queued=True)
        if i % 3 == 0:
            solved(store, run_id, 1e6 * (i + 1), i / 10, 1 - i / 100)
            store.set_state(run_id, RunState.RUNNING)
        created = START + timedelta(days=i // 2)  # two at each moment
        with store._write() as session:
            session.execute(update(RunRow).where(RunRow.id == run_id).values(created_at=created))
        made.append({"id": run_id, "i": i, "spec": spec, "at": created})
    return made


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "runs.db") as opened:
        yield opened


@pytest.mark.parametrize(
    ("wanted", "holds"),
    [
        ({}, lambda r: True),
        ({"model": "pkg:net1"}, lambda r: r["i"] % 2 == 1),
        ({"model": "PKG:*1"}, lambda r: r["i"] % 2 == 1),
        ({"name": "vit_*"}, lambda r: r["i"] % 2 == 1),
        ({"name": "*i*_3"}, lambda r: r["spec"].name == "vit_3"),
        ({"name": "vit%"}, lambda r: False),
        ({"name": "vi__*"}, lambda r: False),
        ({"name": "bert0"}, lambda r: False),
        ({"metric": "kl"}, lambda r: r["i"] % 3 != 0),
        ({"state": "running"}, lambda r: r["i"] % 3 == 0),
        ({"state": ["RUNNING", RunState.PENDING]}, lambda r: True),
        ({"owner": "user2"}, lambda r: r["i"] % 3 == 2),
        ({"tag": "t1"}, lambda r: r["i"] % 2 == 1),
        ({"tag": ["t1", "all"]}, lambda r: r["i"] % 2 == 1),
        ({"tag": ["t1", "t0"]}, lambda r: False),
        ({"since": "2026-03-03"}, lambda r: r["i"] >= 4),
        ({"until": START + timedelta(days=2)}, lambda r: r["i"] < 4),
        ({"since": "2026-03-02", "until": "2026-03-03T00:00"}, lambda r: r["i"] in (2, 3)),
        ({"budget": "memory <= 60%"}, lambda r: r["i"] % 2 == 0),
        ({"budget": "memory <= 4 mb"}, lambda r: r["i"] % 2 == 1),
        ({"budget": "latency"}, lambda r: r["i"] % 2 == 1),
        ({"budget": "_"}, lambda r: False),
        ({"where": "memory <= 4 MB"}, lambda r: r["i"] in (0, 3)),
        ({"where": ["memory >= 4000000", "divergence <= 0.6"]}, lambda r: r["i"] in (3, 6)),
        ({"where": "predicted >= 0.3"}, lambda r: r["i"] in (6, 9)),
        ({"where": "accuracy >= 0.95"}, lambda r: r["i"] in (0, 3)),
        ({"where": "latency <= 1 ms", "model": "pkg:net1"}, lambda r: r["i"] in (3, 9)),
    ],
)
def test_filters_find_what_a_plain_look_finds(store: Store, wanted: Any, holds: Any) -> None:
    made = make(store)
    expected = sorted((r for r in made if holds(r)), key=lambda r: (-r["at"].timestamp(), r["id"]))
    assert [run.id for run in store.runs(limit=None, **wanted)] == [r["id"] for r in expected]


@pytest.mark.parametrize(
    "sort", ["-created_at", "created_at", "name", "-name", "memory", "-memory"]
)
@pytest.mark.parametrize("limit", [1, 3, 5])
def test_pages_are_the_whole_in_order(store: Store, sort: str, limit: int) -> None:
    made = {r["id"]: r for r in make(store)}
    query = RunQuery(sort=sort, tag="all")
    whole = [row.run.id for row in store.run_page(query, None).rows]
    ids, cursor = [], None
    while True:
        page = store.run_page(query, limit, cursor)
        assert len(page.rows) <= limit
        ids += [row.run.id for row in page.rows]
        cursor = page.cursor
        if cursor is None:
            break
    assert ids == whole
    keys = {
        "created_at": lambda r: r["at"].timestamp(),
        "name": lambda r: r["spec"].name,
        "memory": lambda r: r["i"],
    }
    shown = [r for r in made.values() if r["i"] % 3 == 0 or "memory" not in sort]
    by_id = sorted(shown, key=lambda r: r["id"])
    ordered = sorted(by_id, key=keys[sort.strip("-")], reverse=False)
    if sort.startswith("-"):
        ordered = sorted(by_id, key=keys[sort.strip("-")], reverse=True)
    assert ids == [r["id"] for r in ordered]


def test_a_page_goes_on_where_it_was_while_runs_come_and_go(store: Store) -> None:
    made = make(store, 6)
    page = store.run_page(limit=2)
    store.create_run(SPEC)  # newer than all
    store.delete_run(page.rows[-1].run.id)
    following = store.run_page(limit=4, cursor=page.cursor)
    assert {row.run.id for row in following.rows} == {r["id"] for r in made[:4]}
    assert following.cursor is None


def test_a_summary_tells_the_chosen_allocation(store: Store) -> None:
    make(store, 4)
    rows = {row.run.id: row for row in store.run_page().rows}
    row = next(row for row in rows.values() if row.totals.get("memory") == 4e6)
    assert (row.owner, row.tags) == ("user0", ("all", "t1"))
    assert (row.predicted, row.divergence, row.metrics) == (0.15, 0.3, {"accuracy": 0.97})
    assert sum(math.isnan(row.divergence) and not row.totals for row in rows.values()) == 2


def test_broken_cursors_are_refused(store: Store) -> None:
    make(store, 4)
    page = store.run_page(RunQuery(sort="name"), limit=1)
    cursor = str(page.cursor)
    rng = random.Random(0)
    broken = ["", "x", "é", "%%%", "A" * 50, cursor[:-3], cursor + "AA", cursor[::-1]]
    for _ in range(30):
        place = rng.randrange(len(cursor))
        other = rng.choice([c for c in "abcXYZ019-_" if c != cursor[place]])
        changed = cursor[:place] + other + cursor[place + 1 :]
        if base64.urlsafe_b64decode(changed + "==") != base64.urlsafe_b64decode(cursor + "=="):
            broken.append(changed)
    for text in broken:
        with pytest.raises(InvalidInputError, match=r"cannot read the cursor .*: pass what"):
            store.run_page(RunQuery(sort="name"), 1, text)
    with pytest.raises(InvalidInputError, match="of other filters or another order"):
        store.run_page(RunQuery(sort="-name"), 1, cursor)
    with pytest.raises(InvalidInputError, match="of other filters or another order"):
        store.run_page(RunQuery(sort="name", tag="t1"), 1, cursor)


@pytest.mark.parametrize("key", [7, None, True, [], {"a": 1}])
def test_a_forged_cursor_is_compared_with_or_refused(store: Store, key: object) -> None:
    from mpq.store.pages import _asked, _mark

    make(store, 4)
    for sort in ("name", "created_at"):
        body = json.dumps([1, _asked(RunQuery(sort=sort)), key, "x"]).encode()
        forged = base64.urlsafe_b64encode(_mark(body) + body).decode()
        with pytest.raises(InvalidInputError, match="cannot read the cursor"):
            store.run_page(RunQuery(sort=sort), 2, forged)


HOSTILE = ["' OR 1=1 --", '"); DROP TABLE runs; --', "%", "_", "\\", "a'b", "💥", "$.x", "${7*7}"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_find_nothing(store: Store, text: str) -> None:
    make(store, 4)
    for part in ("model", "name", "metric", "owner", "tag"):
        assert store.runs(**{part: text}) == []
    if text not in ("%", "_"):
        assert store.runs(budget=text) == []
    for wanted in ({"sort": text}, {"where": f"{text} <= 1"}, {"state": text}):
        with pytest.raises(InvalidInputError):
            store.runs(**wanted)
    assert len(store.runs()) == 4


@given(text=st.text(max_size=30))
def test_no_text_breaks_a_query(text: str) -> None:
    with open_store(":memory:") as store:
        solved(store, store.create_run(SPEC), 1.0, 0.1, 0.9)
        for part in ("model", "name", "owner", "tag", "budget", "sort", "where", "since", "state"):
            with contextlib.suppress(InvalidInputError):
                store.runs(**{part: text})
        with contextlib.suppress(InvalidInputError):
            store.run_page(cursor=text)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"modle": "x"}, "unknown filter 'modle': did you mean 'model'"),
        ({"state": "SUCCEDED"}, "did you mean 'SUCCEEDED'"),
        ({"where": "memory < 4"}, "cannot read the condition"),
        ({"where": "memory <= 4 MX"}, "unknown unit 'MX'"),
        ({"where": "memroy <= 4"}, "unknown number 'memroy': did you mean 'memory'"),
        ({"sort": "memroy"}, "unknown number 'memroy'"),
        ({"since": "yesterday"}, "a moment is a date such as"),
        ({"limit": 0}, "whole number from 1 on, got 0"),
        ({"name": 3}, "name is a text, got 3"),
        ({"tag": [1]}, "tag is texts"),
    ],
)
def test_what_cannot_be_asked_is_told(store: Store, wanted: Any, message: str) -> None:
    from tests.builders import cells, cost

    run_id = make(store, 4)[0]["id"]
    store.put_cost(run_id, cost(cells()))
    with pytest.raises(InvalidInputError, match=message):
        store.runs(**wanted)


def test_spans_and_moments() -> None:
    assert span("90m") == timedelta(minutes=90)
    assert span("2w") == timedelta(days=14)
    assert moment("7d", START) == START - timedelta(days=7)
    assert moment("2026-03-01T02:00+02:00", START) == START
    assert Condition.parse("latency <= 3 ms") == Condition("latency", "<=", 0.003)
    for text in ("", "d", "-3d", "1y", "3 days"):
        with pytest.raises(InvalidInputError, match="a span of time is written"):
            span(text)


def test_a_filter_uses_an_index(store: Store) -> None:
    """No filter on a column reads every run's row."""
    make(store, 4)
    with store._read() as session:
        for wanted in (
            {"model": "x"},
            {"name": "x"},
            {"metric": "x"},
            {"state": "FAILED"},
            {"owner": "x"},
            {"tag": "x"},
            {"since": "2026-03-01"},
            {},
        ):
            query = RunQuery(**wanted).page(5, None)
            text = str(query.compile(session.get_bind(), compile_kwargs={"literal_binds": True}))
            plan = session.connection().exec_driver_sql(f"EXPLAIN QUERY PLAN {text}").all()
            lines = [row[-1] for row in plan]
            assert not any(
                line.startswith("SCAN runs") and "INDEX" not in line for line in lines
            ), (wanted, lines)


def test_list_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPQ_STORAGE", str(tmp_path / "runs.db"))
    with open_store() as store:
        made = make(store)
    runner = CliRunner()

    def listed(*words: str) -> list[dict[str, Any]]:
        found = runner.invoke(app, ["list", "--json", *words])
        assert found.exit_code == 0, (found.output, found.exception)
        return list(json.loads(found.stdout))

    rows = listed("--where", "memory <= 4 MB", "--sort", "-memory", "--tag", "all")
    assert [row["id"] for row in rows] == [made[3]["id"], made[0]["id"]]
    assert (rows[0]["owner"], rows[0]["totals"]["memory"]) == ("user0", 4e6)
    assert rows[0]["divergence"] == 0.3
    assert [row["divergence"] for row in listed("--state", "PENDING", "--limit", "1")] == [None]
    assert len(listed("--user", "user1", "--model", "pkg:net1", "--since", "2026-03-02")) == 1
    first = runner.invoke(app, ["list", "--limit", "5"])
    cursor = first.stderr.split("--after ")[1].split()[0]
    assert len(listed("--limit", "9", "--after", cursor)) == 7
    assert "more: mpq list" in first.stderr
    assert "10.0 MB" in runner.invoke(app, ["list", "--sort", "memory"]).stdout


def test_the_client_lists_and_pages(tmp_path: Path) -> None:
    with mpq.Client(tmp_path / "runs.db") as client:
        made = make(client.store)
        solved_ids = [made[i]["id"] for i in (0, 3, 6, 9)]
        assert [run.id for run in client.runs(sort="memory")] == solved_ids
        page = client.page(sort="memory", limit=3)
        (last,) = client.page(sort="memory", limit=3, cursor=page.cursor).rows
        assert last.run.id == made[9]["id"]
        with pytest.raises(InvalidInputError, match="unknown filter 'onwer'"):
            client.runs(onwer="me")
