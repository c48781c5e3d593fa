"""What the server answers: runs, jobs, logs, results, what-ifs, numbers for monitoring."""

from __future__ import annotations

import csv
import io
import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

import mpq
from mpq.core.errors import RunFailedError, StorageError
from mpq.core.evaluation import CHOSEN
from mpq.core.jobs import RunState
from mpq.core.latency import KernelCase, KernelLatency
from mpq.dashboard.app import create_app
from mpq.dashboard.openapi import FILE, openapi_text
from mpq.dashboard.settings import Settings
from mpq.datatable import DataTable
from mpq.jobfile import job_schema
from mpq.run_tables import TABLES, run_table, runs_table
from mpq.store.store import Store, open_store
from tests.dashboards import JOB, asking
from tests.postgres import Server
from tests.test_compare import SPEC


@pytest.fixture
def store(address: str) -> Iterator[Store]:
    with open_store(address) as opened:
        yield opened


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, list[str]]]:
    """Two searches under budgets that differ."""
    with open_store(tmp_path_factory.mktemp("api") / "runs.db") as opened:
        budgets = ("memory <= 24%", "memory <= 29%")
        found = [mpq.run_job(replace(SPEC, budgets=(b,), name=b[-3:]), opened) for b in budgets]
        yield opened, [result.run_id for result in found]


def got(asked: TestClient, path: str, **params: Any) -> Any:
    found = asked.get(f"/api/v1/{path}", params=params)
    assert found.status_code == 200, found.text
    return found.json()


# Runs


def test_a_list_is_what_the_store_says_page_by_page(searched: tuple[Store, list[str]]) -> None:
    store, ids = searched
    asked = asking(store)
    first = got(asked, "runs", limit=1)
    rest = got(asked, "runs", limit=5, cursor=first["cursor"])
    assert [run["id"] for run in first["runs"] + rest["runs"]] == ids[::-1]
    assert rest["cursor"] is None
    assert first["runs"][0]["budgets"] == ["memory <= 29%"]
    assert first["runs"][0]["totals"]["memory"] == store.run_page().rows[0].totals["memory"]
    by_size = got(asked, "runs", sort="memory", where=["predicted >= 0", "memory <= 1 GB"])
    assert [run["id"] for run in by_size["runs"]] == ids
    assert got(asked, "runs", state=["RUNNING", "failed"])["runs"] == []
    assert [r["id"] for r in got(asked, "runs", budget="<=24%")["runs"]] == ids[:1]
    rows = list(csv.DictReader(io.StringIO(asked.get("/api/v1/runs.csv?sort=memory").text)))
    assert [row["id"] for row in rows] == ids
    assert rows[0]["state"] == "SUCCEEDED"


def test_one_run_by_any_of_its_names(searched: tuple[Store, list[str]]) -> None:
    store, ids = searched
    asked = asking(store)
    for name in (ids[0], ids[0][:8], "24%"):
        found = got(asked, f"runs/{name.replace('%', '%25')}")
        assert found["run"]["id"] == ids[0]
    assert found["run"]["job"]["metric"] == "kl"
    assert {s["stage"]: s["done"] for s in found["stages"]} == {
        s.stage: s.done for s in store.progress(ids[0])
    }
    missing = asked.get("/api/v1/runs/no-such")
    assert missing.status_code == 404
    assert missing.json()["type"] == "/errors/unknown_run"


def test_tags_and_deletion(store: Store) -> None:
    asked = asking(store)
    run_id = asked.post("/api/v1/runs", json={"job": JOB, "tags": ["a"]}).json()["id"]
    found = asked.put(f"/api/v1/runs/{run_id}/tags", json={"tags": ["b", "c", "b"]})
    assert found.json()["run"]["tags"] == ["b", "c"]
    assert [r["id"] for r in got(asked, "runs", tag=["c", "b"])["runs"]] == [run_id]
    assert got(asked, "runs", tag="a")["runs"] == []
    wrong = asked.put(f"/api/v1/runs/{run_id}/tags", json={"tags": [" "]})
    assert wrong.status_code == 422
    store.take(run_id, "host:1", 100)
    driven = asked.delete(f"/api/v1/runs/{run_id}")
    assert (driven.status_code, driven.json()["type"]) == (409, "/errors/run_driven")
    store.release(run_id, "host:1")
    assert asked.delete(f"/api/v1/runs/{run_id}").status_code == 204
    assert asked.delete(f"/api/v1/runs/{run_id}").status_code == 404


# Jobs


def test_a_submission_is_one_run_however_often_it_comes(store: Store) -> None:
    asked = asking(store)
    body = {"job": JOB, "tags": ["night"], "priority": 3, "user": "me"}
    headers = {"Idempotency-Key": "k1"}
    first = asked.post("/api/v1/runs", json=body, headers=headers)
    again = asked.post("/api/v1/runs", json=body, headers=headers)
    assert (first.status_code, again.status_code) == (202, 200)
    assert first.headers["location"] == again.headers["location"]
    assert first.headers["location"] == f"/api/v1/runs/{first.json()['id']}"
    assert got(asked, f"runs/{first.json()['id']}")["driving"]["submission_id"] == "k1"
    other = {"job": {**JOB, "seed": 1}}
    conflict = asked.post("/api/v1/runs", json=other, headers=headers)
    assert (conflict.status_code, conflict.json()["type"]) == (409, "/errors/submission_conflict")
    job = store.job(first.json()["id"])
    assert (job.owner, job.priority, job.tags, job.is_driven) == ("me", 3, ("night",), False)
    assert store.take_next("host:1", 60) == first.json()["id"]  # it is queued


@pytest.mark.slow
def test_fifty_submit_at_once_and_twice(store: Store) -> None:
    """Two hundred keys, each sent twice by fifty who do so at the same time: two hundred runs."""
    app = create_app(store, Settings(allow_modules=("tests.slow_net",)))
    start = threading.Barrier(50)

    def submitting(number: int) -> list[tuple[int, str, str]]:
        with TestClient(app, base_url="http://localhost") as asked:
            start.wait()
            found = []
            for key in [f"{number}-{i}" for i in range(4)] * 2:
                body = {"job": {**JOB, "name": key}}
                answer = asked.post("/api/v1/runs", json=body, headers={"Idempotency-Key": key})
                found.append((answer.status_code, key, answer.json()["id"]))
            return found

    with ThreadPoolExecutor(50) as threads:
        found = [each for some in threads.map(submitting, range(50)) for each in some]
    assert sorted({status for status, _, _ in found}) == [200, 202]
    assert sum(status == 202 for status, _, _ in found) == 200
    assert len({run_id for _, _, run_id in found}) == len({(k, r) for _, k, r in found}) == 200
    assert len(store.runs(limit=None)) == 200


def test_the_user_of_a_token_is_its_name(store: Store) -> None:
    from tests.dashboards import secret

    asked = asking(store, token=secret(store, "submit", "ci"))
    found = asked.post("/api/v1/runs", json={"job": JOB, "user": "somebody else"})
    assert store.job(found.json()["id"]).owner == "ci"


def test_a_job_is_checked_without_being_kept(store: Store) -> None:
    asked = asking(store)
    found = asked.post("/api/v1/jobs/check", json={"job": JOB})
    assert found.json()["job"]["solver"] == "auto"
    assert "tests.slow_net" not in sys.modules or store.runs() == []
    wrong = asked.post("/api/v1/jobs/check", json={"job": {**JOB, "metrik": "kl"}})
    assert wrong.status_code == 422
    assert "did you mean 'metric'" in wrong.json()["detail"]
    assert asked.get("/api/v1/job-schema").text == job_schema()


def test_stop_and_resume(store: Store) -> None:
    asked = asking(store)
    run_id = asked.post("/api/v1/runs", json={"job": JOB}).json()["id"]
    url = f"/api/v1/runs/{run_id}"
    store.take(run_id, "host:1", 100)
    assert asked.post(f"{url}/resume").json()["type"] == "/errors/run_driven"
    waiting = asked.post(f"{url}/stop")
    assert (waiting.status_code, waiting.json()["state"]) == (202, "PENDING")
    assert store.renew(run_id, "host:1", 100)  # its driver hears it
    store.set_state(run_id, RunState.STOPPED)
    store.release(run_id, "host:1")
    assert asked.post(f"{url}/stop").status_code == 200
    assert store.take_next("host:2", 60) is None
    resumed = asked.post(f"{url}/resume")
    assert (resumed.status_code, resumed.json()["state"]) == (202, "PENDING")
    assert store.take_next("host:2", 60) == run_id
    assert not store.job(run_id).stop_requested
    store.set_state(run_id, RunState.RUNNING)
    store.set_state(run_id, RunState.SUCCEEDED)
    over = asked.post(f"{url}/resume")
    assert (over.status_code, over.json()["type"]) == (409, "/errors/run_state")


# Logs


def sent(text: str) -> list[dict[str, str]]:
    """Server-sent events as a browser reads them."""
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line[:1] != ":")
        if "data" in fields:
            events.append(fields)
    return events


def test_logs_and_events(store: Store) -> None:
    asked = asking(store)
    run_id = asked.post("/api/v1/runs", json={"job": JOB}).json()["id"]
    for number in range(5):
        store.log(run_id, "note", f"line {number}\nand more")
    store.put_progress(run_id, "scoring", 3, 10)
    ids = [event.id for event in store.events(run_id)]
    found = got(asked, f"runs/{run_id}/logs", after=ids[1], limit=2)
    assert [line["id"] for line in found["lines"]] == ids[2:4]
    assert (found["last"], found["state"]) == (ids[3], "PENDING")
    assert got(asked, f"runs/{run_id}/logs", after=ids[-1])["last"] == ids[-1]
    assert asked.get(f"/api/v1/runs/{run_id}/logs?after=-1").status_code == 422
    store.request_stop(run_id)
    stream = asked.get(f"/api/v1/runs/{run_id}/events")
    assert stream.headers["content-type"].startswith("text/event-stream")
    events = sent(stream.text)
    logged = [event for event in events if event["event"] == "log"]
    assert [int(event["id"]) for event in logged] == ids
    assert json.loads(logged[0]["data"])["message"] == "line 0\nand more"
    assert [e["event"] for e in events[-2:]] == ["progress", "state"]
    assert json.loads(events[-1]["data"]) == {"state": "STOPPED"}
    assert json.loads(events[-2]["data"])[0]["done"] == 3
    later = asked.get(f"/api/v1/runs/{run_id}/events", headers={"Last-Event-ID": str(ids[2])})
    assert [int(e["id"]) for e in sent(later.text) if e["event"] == "log"] == ids[3:]
    done = asked.get(f"/api/v1/runs/{run_id}/events", headers={"Last-Event-ID": str(ids[-1])})
    assert done.status_code == 204


def test_few_listen_at_once(store: Store) -> None:
    run_id, _ = store.submit(SPEC, queued=True)
    asked = asking(store, Settings(streams=0))
    found = asked.get(f"/api/v1/runs/{run_id}/events")
    assert (found.status_code, found.json()["type"]) == (429, "/errors/too_many")


# Results


def test_tables_are_those_of_the_run(searched: tuple[Store, list[str]]) -> None:
    store, (run_id, _) = searched
    asked = asking(store)
    for name in TABLES:
        expected = run_table(store, run_id, name)
        table = DataTable.from_plain(got(asked, f"runs/{run_id}/{name}"))
        assert table.csv() == expected.csv()
        assert asked.get(f"/api/v1/runs/{run_id}/{name}.csv").text == expected.csv()
        lines = [json.loads(line) for line in expected.jsonl().splitlines()]
        assert got(asked, f"runs/{run_id}/{name}.json") == lines
        pq = pytest.importorskip("pyarrow.parquet")
        held = io.BytesIO(asked.get(f"/api/v1/runs/{run_id}/{name}.parquet").content)
        assert pq.read_table(held).equals(expected.arrow())
    assert asked.get(f"/api/v1/runs/{run_id}/secrets").status_code == 404
    assert asked.get(f"/api/v1/runs/{run_id}/scores.pkl").status_code == 404


def test_what_is_told_across_runs_is_there_as_files(searched: tuple[Store, list[str]]) -> None:
    store, ids = searched
    asked = asking(store)
    layers = got(asked, "compare", run=ids[:2])["layers"]
    rows = got(asked, "compare.json", run=ids[:2])
    assert {row["layer"]: [row[run_id] for run_id in ids[:2]] for row in rows} == layers
    for row, use in zip(got(asked, "layers.json"), got(asked, "layers")["layers"], strict=True):
        assert (row["layer"], row["least_bits"]) == (use["layer"], use["least_bits"])
        bits = {key[5:]: row[key] for key in row if key.startswith("bits.") and row[key]}
        assert bits == use["bits"]
    times = DataTable.from_plain(got(asked, "kernels"))
    assert asked.get("/api/v1/kernels.csv").text == times.csv()
    for path in ("layers.parquet", "kernels.parquet", "layers.csv", "kernels.json"):
        assert asked.get(f"/api/v1/{path}").status_code == 200


def test_an_exported_file_is_that_of_the_result(
    searched: tuple[Store, list[str]], tmp_path: Path
) -> None:
    from mpq.result import SearchResult

    store, (run_id, _) = searched
    asked = asking(store)
    for target in ("mpq", "torchao"):
        written = SearchResult(store, run_id).export(target, tmp_path / target)
        assert asked.get(f"/api/v1/runs/{run_id}/export/{target}").text == written.read_text()
    wrong = asked.get(f"/api/v1/runs/{run_id}/export/torchoa")
    assert (wrong.status_code, wrong.json()["type"]) == (422, "/errors/unknown_export_target")
    assert "did you mean 'torchao'" in wrong.json()["detail"]


def test_a_spreadsheet_runs_nothing(store: Store) -> None:
    store.submit(replace(SPEC, name="=cmd|'/c calc'!A0"), tags=["@SUM(1)"], queued=True)
    text = asking(store).get("/api/v1/runs.csv").text
    (row,) = csv.DictReader(io.StringIO(text))
    assert row["name"] == "'=cmd|'/c calc'!A0"
    assert row["tags"] == "'@SUM(1)"


def test_the_network_and_solutions(searched: tuple[Store, list[str]]) -> None:
    store, (run_id, _) = searched
    asked, result = asking(store), mpq.SearchResult(store, run_id)
    units = got(asked, f"runs/{run_id}/units")
    assert [unit["name"] for unit in units["units"]] == [unit.name for unit in result.graph.units]
    assert units["native_bytes"] == result.graph.native_bytes
    (chosen,) = got(asked, f"runs/{run_id}/solutions", label=CHOSEN, allocations=True)
    assert chosen["layers"] == {name: str(s) for name, s in result.allocation.items()}
    assert chosen["totals"] == result.solution.totals
    labels = [one["label"] for one in got(asked, f"runs/{run_id}/solutions")]
    assert labels == [label for label, _ in store.solutions(run_id)]
    assert asked.get(f"/api/v1/runs/{run_id}/solutions?label=none").status_code == 404


def test_frontiers(searched: tuple[Store, list[str]]) -> None:
    store, (run_id, _) = searched
    asked, result = asking(store), mpq.SearchResult(store, run_id)
    for points in (25, 7):
        found = got(asked, f"runs/{run_id}/frontier", points=points, allocations=True)
        expected = result.frontier("memory", points).solutions
        assert [one["score"] for one in found["solutions"]] == [s.score for s in expected]
        assert found["solutions"][0]["allocation"] == expected[0].allocation.text()
    assert asked.get(f"/api/v1/runs/{run_id}/frontier?cost=memry").status_code == 422
    assert asked.get(f"/api/v1/runs/{run_id}/surface").status_code == 404  # latency: not asked


def test_what_if(searched: tuple[Store, list[str]]) -> None:
    store, (run_id, _) = searched
    asked, result = asking(store), mpq.SearchResult(store, run_id)
    layer = result.graph.units[0].layers[0]
    other = result.graph.units[1].layers[0]
    questions: list[dict[str, Any]] = [
        {"budgets": ["memory <= 22%"]},
        {"budgets": ["memory <= 26%"], "pin": {layer: "int8"}},
        {"budgets": ["memory <= 26%"], "forbid": [[[layer, "int8"], [other, "int8"]]]},
        {"budgets": ["memory <= 26%"], "risk": 0.9},
    ]
    for question in questions:
        found = asked.post(f"/api/v1/runs/{run_id}/solve", json=question)
        given = {"forbid": [tuple(map(tuple, pair)) for pair in question.get("forbid", [])]}
        expected = result.solve(**{**question, **given})
        assert found.status_code == 200
        assert found.json()["status"] == "optimal"
        assert found.json()["allocation"] == expected.allocation.text()  # type: ignore[union-attr]
        assert found.json()["score"] == expected.score
    same = asked.post(f"/api/v1/runs/{run_id}/solve", json={}).json()
    assert [b["cost"] for b in same["budgets"]] == ["memory"]
    nothing = asked.post(f"/api/v1/runs/{run_id}/solve", json={"budgets": ["memory <= 1%"]}).json()
    assert (nothing["status"], nothing["allocation"]) == ("infeasible", None)
    assert "smallest possible" in nothing["infeasibility"]["message"]
    wrong = asked.post(f"/api/v1/runs/{run_id}/solve", json={"pin": {"nope": "int8"}})
    assert wrong.status_code == 422
    small = asking(store, Settings(solve_cells=3))
    found = small.post(f"/api/v1/runs/{run_id}/solve", json={})
    assert (found.status_code, found.json()["type"]) == (413, "/errors/too_large")


def test_results_of_an_ended_run_are_sent_once(searched: tuple[Store, list[str]]) -> None:
    store, (run_id, _) = searched
    asked = asking(store)
    for part in ("units", "scores", "scores.csv", "solutions", "frontier"):
        path = f"/api/v1/runs/{run_id}/{part}"
        first = asked.get(path)
        tag = first.headers["etag"]
        again = asked.get(path, headers={"If-None-Match": tag})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
        assert asked.get(path, headers={"If-None-Match": '"other"'}).content == first.content
        assert asked.get(f"{path}?points=3").headers["etag"] != tag
    assert "etag" not in asked.get(f"/api/v1/runs/{run_id}").headers


def test_what_is_not_there_yet(store: Store) -> None:
    run_id, _ = store.submit(SPEC, queued=True)
    asked = asking(store)
    for part in ("units", "scores", "allocation", "frontier", "surface"):
        found = asked.get(f"/api/v1/runs/{run_id}/{part}")
        assert found.status_code in (404, 409), part
        assert "etag" not in found.headers
    assert got(asked, f"runs/{run_id}/solutions") == []
    assert asked.post(f"/api/v1/runs/{run_id}/solve", json={}).status_code in (404, 409)


def test_several_runs_and_kernels(searched: tuple[Store, list[str]]) -> None:
    store, ids = searched
    asked = asking(store)
    expected = mpq.Client(store).compare(*ids)
    found = got(asked, "compare", run=ids)
    assert found == json.loads(json.dumps(expected.view()))
    assert asked.get("/api/v1/compare", params={"run": ids[:1]}).status_code == 422
    assert asked.get("/api/v1/compare", params={"run": ids * 11}).status_code == 422
    layers = got(asked, "layers", metric="kl")
    assert layers == mpq.Client(store).layers(metric="kl").view()
    case = KernelCase(backend="b", kernel="k", shape="s")
    values = {"median_s": 1e-3, "low_s": 9e-4, "high_s": 2e-3, "rounds": 7}
    store.put_kernel_latency(KernelLatency(device="d 1", case=case, **values))  # type: ignore[arg-type]
    for params in ({}, {"device": "d 1"}):
        table = DataTable.from_plain(got(asked, "kernels", **params))
        assert next(table.rows()) == ("d 1", "b", "k", "s", 1e-3, 9e-4, 2e-3, 7, 0)
    assert asked.get("/api/v1/kernels?device=d").status_code == 404


# Monitoring, and the server itself


def test_metrics_are_what_the_database_says(store: Store) -> None:
    ids = [store.submit(SPEC, queued=True)[0] for _ in range(4)]
    store.take(ids[0], "host:1", 60)
    store.set_state(ids[0], RunState.RUNNING)
    store.request_stop(ids[1])
    store.put_partial("key", {}, 2.5)
    asked = asking(store)
    asked.get("/api/v1/runs")
    asked.get(f"/api/v1/runs/{ids[0]}/units")
    found = asked.get("/metrics")
    numbers = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(found.text)
        for sample in family.samples
    }
    for state, number in (("PENDING", 2), ("RUNNING", 1), ("STOPPED", 1), ("FAILED", 0)):
        assert numbers["mpq_runs", state] == number
    assert numbers["mpq_runs_queued",] == 2
    assert numbers["mpq_runs_driven",] == 1
    assert 0 <= numbers["mpq_oldest_queued_seconds",] < 60
    assert numbers["mpq_partials",] == 1
    assert numbers["mpq_partials_seconds",] == 2.5
    assert numbers["mpq_database_seconds",] > 0
    assert numbers["mpq_requests_total", "GET /api/v1/runs", "200"] == 1
    assert numbers["mpq_requests_total", "GET /api/v1/runs/{run}/units", "404"] == 1
    assert numbers["mpq_request_seconds_count", "GET /api/v1/runs"] == 1


def test_a_database_that_is_away_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise StorageError("storage_away", "cannot reach postgresql://me:hunter2@db/runs")

    for name in ("has_tokens", "run_page", "counts"):
        monkeypatch.setattr(Store, name, away)
    asked = asking(store)
    for path in ("/healthz", "/api/v1/runs", "/metrics", "/"):
        found = asked.get(path)
        assert found.status_code == 503, path
        assert found.headers["retry-after"] == "5"
        assert "hunter2" not in found.text


def test_the_openapi_document_is_up_to_date(tmp_path: Path) -> None:
    """Written anew by `python -m mpq.dashboard.openapi`."""
    with open_store(tmp_path / "runs.db") as store:
        assert FILE.read_text() == openapi_text(create_app(store))


def test_a_table_is_read_back() -> None:
    rows = runs_table([])
    assert DataTable.from_plain(rows.plain()) == replace(
        rows, columns=tuple(replace(c, values=[]) for c in rows.columns)
    )


def test_the_server_starts_without_torch(tmp_path: Path) -> None:
    import subprocess

    code = """
import sys
import mpq.dashboard.serve
from tests.dashboards import asking
from mpq.store.store import open_store
with open_store(sys.argv[1]) as store:
    assert asking(store).get("/api/v1/runs").status_code == 200
print(sorted({"torch", "ray", "transformers", "onnxruntime"} & set(sys.modules)))
"""
    words = [sys.executable, "-c", code, str(tmp_path / "runs.db")]
    assert subprocess.check_output(words, text=True) == "[]\n"


def test_solving_over_http_loads_no_torch(searched: tuple[Store, list[str]]) -> None:
    import subprocess

    store, (run_id, _) = searched
    code = """
import sys
from tests.dashboards import asking
from mpq.store.store import open_store
with open_store(sys.argv[1]) as store:
    asked = asking(store)
    found = asked.post(f"/api/v1/runs/{sys.argv[2]}/solve", json={"budgets": ["memory <= 25%"]})
    assert found.json()["status"] == "optimal"
    asked.get(f"/api/v1/runs/{sys.argv[2]}/frontier?points=5")
print(sorted({"torch", "ray", "transformers"} & set(sys.modules)))
"""
    words = [sys.executable, "-c", code, str(store.url.database), run_id]
    assert subprocess.check_output(words, text=True) == "[]\n"


def test_an_error_of_a_run_is_told(store: Store) -> None:
    run_id, _ = store.submit(SPEC, queued=True)
    store.set_state(run_id, RunState.FAILED, RunFailedError("worker_lost", "gone"))
    found = got(asking(store), f"runs/{run_id}")["run"]
    assert (found["state"], found["error_code"], found["error_message"]) == (
        "FAILED",
        "worker_lost",
        "gone",
    )


@pytest.mark.slow
def test_a_server_of_postgresql_that_goes_away_and_comes_back(stoppable: Server) -> None:
    with open_store(stoppable.new_database(), patience_s=0.5) as store:
        run_id, _ = store.submit(SPEC, queued=True)
        asked = asking(store)
        assert asked.get("/healthz").status_code == 200
        stoppable.stop()
        started = time.monotonic()
        for path in ("/healthz", "/api/v1/runs", f"/api/v1/runs/{run_id}", "/metrics"):
            found = asked.get(path)
            assert found.status_code == 503, path
            assert found.json()["type"] == "/errors/storage_away"
        assert time.monotonic() - started < 10
        stoppable.start()
        with pytest.warns(mpq.MpqWarning, match="was away"):
            assert store.run(run_id).id == run_id
        assert asked.get("/healthz").status_code == 200
        assert got(asked, f"runs/{run_id}")["run"]["id"] == run_id
