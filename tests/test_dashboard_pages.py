"""Pages of the dashboard whatever the database holds, and runs side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

import mpq
from mpq.additivity import Additivity
from mpq.comparison import compare_runs
from mpq.core.evaluation import CHOSEN
from mpq.core.jobs import RunState
from mpq.core.latency import KernelCase, KernelLatency
from mpq.dashboard.app import create_app
from mpq.dashboard.checks_view import checks_view
from mpq.dashboard.compare_view import compare_view
from mpq.dashboard.loaded import LoadedRuns
from mpq.dashboard.pairs_view import map_of
from mpq.dashboard.plotted import verbatim
from mpq.dashboard.settings import Rate, Settings
from mpq.store.store import Store, open_store
from tests.pages import (
    NAMES,
    PAGES,
    SPEC,
    asking,
    figure,
    read,
    searched,
    store,
    texts,
)

__all__ = ["searched", "store"]  # fixtures


@pytest.mark.parametrize("path", PAGES)
def test_an_empty_database_has_pages_that_tell_the_next_step(store: Store, path: str) -> None:
    said = texts(read(asking(store), path))
    assert {"/new": "Dry run", "/kernels": "mpq profile"}.get(path, "mpq run job.toml") in said


@pytest.mark.parametrize("path", PAGES)
def test_pages_show_a_database_with_a_failed_run(
    searched: tuple[Store, list[str]], path: str
) -> None:
    read(asking(searched[0]), path)


# --- runs side by side ----------------------------------------------------------------------------


def test_runs_are_chosen_on_a_form_and_failed_ones_are_not_offered(
    searched: tuple[Store, list[str]],
) -> None:
    store, (first, second, _, failed) = searched
    client = asking(store)
    page = read(client, "/compare", run=first)
    assert f'value="{first}" id="run-{first}" checked' in page
    assert f'value="{second}"' in page
    assert failed not in page
    page = read(client, "/compare", 404, run=["gone", first])
    assert "gone" in texts(page)
    assert 'value="gone"' in page
    assert "no result" in texts(read(client, "/compare", 409, run=[first, failed]))
    assert "At most 6" in texts(read(client, "/compare", 422, run=[str(n) for n in range(7)]))


def test_the_comparison_shows_the_numbers_of_the_view(searched: tuple[Store, list[str]]) -> None:
    store, (*ids, _) = searched
    found, view = compare_runs(store, ids), compare_view(store, ids)
    page = texts(read(asking(store), "/compare", run=ids))
    rows = {row.label: row for row in (*view.totals, *view.measured)}
    assert rows["memory"].values == found.totals["memory"]
    assert rows["KL to original, calibration batches"].values == found.measured["kl calibration"]
    first, second = found.totals["memory"][:2]
    assert rows["memory"].changes[1] == f"{100 * (second / first - 1):+.3g} %"
    for row in (*view.totals, *view.measured):
        for text in row.texts:
            assert text in page
    assert [row.label for row in view.settings] == ["budgets"]
    assert "memory <= 21%" in page
    assert f"{len(found.layers)} layer" in page
    assert {row.layer for row in view.rows} == set(found.layers)
    for row in view.rows:
        assert row.schemes == found.layers[row.layer]


def test_all_layers_are_shown_where_asked(searched: tuple[Store, list[str]]) -> None:
    store, (first, _, second, _) = searched
    view = compare_view(store, (first, second), "all")
    allocation = mpq.SearchResult(store, first).allocation
    assert {row.layer: row.schemes[0] for row in view.rows} == {
        name: str(scheme) for name, scheme in allocation.items()
    }
    assert len(view.rows) == view.same + view.differing > view.differing
    page = read(asking(store), "/compare", run=[first, second], layers="all")
    assert page.count("≠</span>") == view.differing
    for run in view.runs:
        assert [bar.title for bar in run.strip.bars] == [
            f"{row.layer}: {row.schemes[view.runs.index(run)]}" for row in view.rows
        ]


def test_frontiers_of_runs_are_those_that_were_kept(searched: tuple[Store, list[str]]) -> None:
    store, (*ids, _) = searched
    page = read(asking(store), "/compare", run=ids, cost="bops")
    data = figure(page, "frontiers-plot")["data"]
    for run_id, line, chosen in zip(ids, data[::2], data[1::2], strict=True):
        kept = store.frontier(run_id, "bops")
        assert kept is not None
        assert line["y"] == [s.score for s in kept.solutions if s.score > 0]
        solution = dict(store.solutions(run_id))[CHOSEN]
        assert chosen["y"] == [solution.score]
        assert solution.totals is not None
        ratio = solution.totals["bops"] / chosen["x"][0]
        assert ratio == pytest.approx(10 ** round(torch.tensor(ratio).log10().item()))
    assert data[4]["name"] == verbatim(f"{NAMES[0]} {ids[2]}")


def test_extreme_numbers_have_a_page(searched: tuple[Store, list[str]], tmp_path: Path) -> None:
    source, (first, *_) = searched
    with open_store(tmp_path / "extreme.db") as store:
        ids = []
        for size in (1e300, 1e-300):
            run_id = store.create_run(replace(SPEC, name=f"{size:g}"))
            store.put_graph(run_id, source.graph(first))
            store.put_sensitivity(run_id, source.sensitivity(first))
            for table in source.costs(first).values():
                store.put_cost(run_id, table)
            solution = dict(source.solutions(first))[CHOSEN]
            totals = {"memory": size, "latency": size}
            solution = replace(solution, totals=totals, score=size, gap=size)
            store.put_solution(run_id, CHOSEN, solution)
            measured = next(e for e in source.evaluations(first) if e.candidate == CHOSEN)
            store.put_evaluation(run_id, replace(measured, mean=size, stderr=size))
            store.set_state(run_id, RunState.RUNNING)
            store.set_state(run_id, RunState.SUCCEEDED)
            ids.append(run_id)
        case = KernelCase("onnxruntime", "MatMul fp32", "linear 1x1->1")
        for kernel, size in (("MatMul fp32", 1e300), ("MatMulNBits bits=4 block=32", 1e-300)):
            store.put_kernel_latency(
                KernelLatency(
                    device="d",
                    case=replace(case, kernel=kernel),
                    median_s=size,
                    low_s=size,
                    high_s=size,
                    rounds=1,
                )
            )
        client = asking(store)
        page = texts(read(client, "/compare", run=ids))
        assert "1e+300 bytes" in page
        assert "1e-300 ± 1e-300" in page
        assert max(map(len, page.split())) < 100
        said = texts(read(client, "/kernels"))
        assert "1e+300 s" in said
        assert "1e-300 s" in said
        read(client, "/layers")


# --- a run is stopped and goes on ----------------------------------------------------------------


def test_a_run_is_stopped_and_queued_again_from_its_page(store: Store) -> None:
    run_id, _ = store.submit(SPEC, queued=True)
    with asking(store) as asked:
        own = {"Origin": "http://localhost"}
        assert "Stop" in asked.get(f"/runs/{run_id}").text
        found = asked.post(f"/runs/{run_id}/stop", headers=own)
        assert (found.status_code, store.run(run_id).state) == (303, RunState.STOPPED)
        assert "Go on with it" in asked.get(f"/runs/{run_id}").text
        found = asked.post(f"/runs/{run_id}/resume", headers=own)
        assert (found.status_code, store.run(run_id).state) == (303, RunState.PENDING)
        other = {"Origin": "http://evil.example"}
        assert asked.post(f"/runs/{run_id}/stop", headers=other).status_code == 403
        assert store.run(run_id).state is RunState.PENDING


def test_a_browser_gets_a_page_for_what_is_not_there_and_a_program_a_problem(store: Store) -> None:
    with asking(store) as asked:
        found = asked.get("/runs/nothing", headers={"Accept": "text/html"})
        assert (found.status_code, found.headers["content-type"][:9]) == (404, "text/html")
        assert "unknown run" in found.text
        assert "All runs" in found.text
        assert asked.get("/nowhere", headers={"Accept": "text/html"}).status_code == 404
        for path in ("/api/v1/runs/nothing", "/runs/nothing"):
            plain = asked.get(path, headers={"Accept": "application/json"})
            assert plain.json()["type"] == "/errors/unknown_run"


def test_a_log_shows_its_end_and_goes_on(store: Store) -> None:
    run_id, _ = store.submit(SPEC, queued=True)
    for number in range(510):
        store.log(run_id, "note", f"line {number}")
    with asking(store) as asked:
        assert "line 509<" in asked.get(f"/runs/{run_id}/log").text
        first = asked.get(f"/runs/{run_id}/log?after=0").text
        assert "line 499<" in first
        assert "line 500<" not in first
        assert f"/runs/{run_id}/log?after=0" in first


def test_a_page_that_waited_for_a_result_is_loaded_whole(
    searched: tuple[Store, list[str]],
) -> None:
    store, (run_id, *_) = searched
    with asking(store) as asked:
        for view in ("", "/layers"):
            waited = asked.get(f"/runs/{run_id}{view}", headers={"HX-Request": "true"})
            assert waited.headers["hx-refresh"] == "true"
            assert "hx-refresh" not in asked.get(f"/runs/{run_id}{view}").headers


def test_another_budget_in_the_address_is_limited_as_others_are(
    searched: tuple[Store, list[str]],
) -> None:
    store, (run_id, *_) = searched
    app = create_app(store, Settings(moves=Rate(1, 0.01)))
    asked = TestClient(app, base_url="http://localhost")
    asks = [asked.get(f"/runs/{run_id}", params={"budget": "memory <= 90%"}) for _ in range(2)]
    assert [found.status_code for found in asks] == [200, 429]


def test_losses_that_are_nothing_or_below_have_no_ratio(
    searched: tuple[Store, list[str]],
) -> None:
    store, (run_id, *_) = searched
    run = LoadedRuns(store).get(run_id)
    means = (0.0, 0.0, -1e-9, 2.0)
    made = tuple(replace(run.evaluations[0], predicted=1.0, mean=mean) for mean in means)
    view = checks_view(replace(run, evaluations=made), [])
    assert (view.median_ratio, view.spread) == (2.0, None)


def test_a_map_of_many_pairs_keeps_their_numbers() -> None:
    matrix = np.zeros((401, 401))
    matrix[399, 400] = matrix[400, 399] = 1.0
    units = tuple(f"u{n}" for n in range(401))
    found = Additivity(
        units=units,
        metric="m",
        parts=0.0,
        with_pairs=0.0,
        measured=None,
        stderr=None,
        matrix=matrix,
        pairs=(),
    )
    figure = map_of(found)
    assert figure is not None
    (trace,) = figure["data"]
    row, column = np.argwhere(trace["z"] == 1.0)[0]
    assert {trace["x"][column], trace["y"][row]} == {399, 400}
