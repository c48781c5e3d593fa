"""Runs side by side, and what many runs of one model gave each layer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mpq
from mpq.cli import app
from mpq.core.errors import InvalidInputError
from mpq.core.evaluation import CHOSEN
from mpq.core.formats import parse_scheme
from mpq.core.jobs import JobSpec
from mpq.store.store import Store, open_store

SPEC = JobSpec(
    model="tests.slow_net:make_model",
    calibration="tests.slow_net:batches",
    budgets=("memory <= 60%",),
    schemes=("int3", "int4", "int8"),
    metric="kl",
    executor="serial",
    refine=0,
    name="a",
)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, list[str]]]:
    """Three searches under budgets that differ."""
    budgets = ("memory <= 24%", "memory <= 21%", "memory <= 29%")
    with open_store(tmp_path_factory.mktemp("compare") / "runs.db") as store:
        runs = [mpq.run_job(replace(SPEC, budgets=(text,), name=text), store) for text in budgets]
        yield store, [run.run_id for run in runs]


def client(store: Store) -> mpq.Client:
    return mpq.Client(store)


def test_a_comparison_is_what_the_results_say(searched: tuple[Store, list[str]]) -> None:
    store, ids = searched
    found = client(store).compare(*ids)
    results = [mpq.SearchResult(store, run_id) for run_id in ids]
    assert found.runs == tuple(ids)
    assert set(found.settings) == {"budgets"}
    assert found.settings["budgets"][1] == ("memory <= 21%",)
    for number, result in enumerate(results):
        assert found.totals["memory"][number] == result.solution.totals["memory"]
        assert found.totals["predicted"][number] == result.solution.score
        measured = {
            f"{e.divergence} {e.split}": e for e in result.evaluation if e.candidate == CHOSEN
        }
        assert set(found.measured) == set(measured)
        for what, evaluation in measured.items():
            assert found.measured[what][number] == evaluation.mean
            assert found.stderr[what][number] == evaluation.stderr
    layers = {
        name: tuple(str(r.allocation[name]) for r in results) for name in results[0].allocation
    }
    assert found.layers == {name: row for name, row in layers.items() if len(set(row)) > 1}
    assert found.layers
    assert found.same + len(found.layers) == len(layers)
    assert found.units_of_measure["memory"] == "bytes"


def test_layers_that_a_run_did_not_search_are_missing() -> None:
    with open_store(":memory:") as other:
        first = mpq.run_job(SPEC, other).run_id
        spec = replace(SPEC, skip=("layers.0",), budgets=("memory <= 90%",))
        second = mpq.run_job(spec, other).run_id
        found = client(other).compare(first, second)
        skipped = set(mpq.SearchResult(other, first).allocation) - set(
            mpq.SearchResult(other, second).allocation
        )
        assert skipped
        assert all(found.layers[layer][1] is None for layer in skipped)
        assert found.settings["skip"] == ((), ("layers.0",))


def test_what_cannot_be_compared_is_told(searched: tuple[Store, list[str]]) -> None:
    store, ids = searched
    with pytest.raises(InvalidInputError, match="two different runs or more"):
        client(store).compare(ids[0])
    with pytest.raises(InvalidInputError, match="two different runs or more"):
        client(store).compare(ids[0], ids[0][:8])
    with open_store(":memory:") as other:
        runs = [other.create_run(SPEC), other.create_run(SPEC)]
        with pytest.raises(InvalidInputError, match="has no result: it is PENDING"):
            client(other).compare(*runs)


def test_layers_count_what_the_runs_chose(searched: tuple[Store, list[str]]) -> None:
    store, ids = searched
    found = client(store).layers(model=SPEC.model)
    results = [mpq.SearchResult(store, run_id) for run_id in ids]
    assert (found.runs, found.model) == (3, SPEC.model)
    assert [layer.layer for layer in found.layers] == list(results[0].allocation)
    for layer in found.layers:
        schemes = Counter(str(result.allocation[layer.layer]) for result in results)
        assert layer.schemes == schemes
        bits = [parse_scheme(text).weights.bits for text in schemes.elements()]
        assert layer.bits == Counter(bits)
        assert (layer.least_bits, layer.runs) == (min(bits), 3)
        assert layer.mean_bits == pytest.approx(sum(bits) / 3)
    for width in (3, 4, 8):
        expected = [layer.layer for layer in found.layers if layer.least_bits >= width]
        assert found.always(width) == tuple(expected)
    one = client(store).layers(budget="memory <= 21%")
    assert one.runs == 1
    assert all(layer.runs == 1 for layer in one.layers)


def test_layers_are_of_one_model_with_results(searched: tuple[Store, list[str]]) -> None:
    store, _ = searched
    with pytest.raises(InvalidInputError, match="no run with these properties has a result"):
        client(store).layers(name="nothing")
    with open_store(":memory:") as other:
        mpq.run_job(SPEC, other)
        result = mpq.run_job(replace(SPEC, name="b"), other)
        from sqlalchemy import update

        from mpq.store.models import RunRow

        with other._write() as session:
            renamed = update(RunRow).where(RunRow.id == result.run_id).values(model="other:net")
            session.execute(renamed)
        with pytest.raises(InvalidInputError, match=r"of 2 models: choose one of other:net, tests"):
            client(other).layers()
        assert client(other).layers(model="other:net").runs == 1


def test_commands(searched: tuple[Store, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    store, ids = searched
    monkeypatch.setenv("MPQ_STORAGE", store.url.render_as_string())
    runner = CliRunner()
    compared = runner.invoke(app, ["compare", *ids])
    assert compared.exit_code == 0, compared.exception
    assert all(run_id in compared.stdout for run_id in ids)
    assert "memory <= 21%" in compared.stdout
    assert "layers differ" in compared.stdout
    view = json.loads(runner.invoke(app, ["compare", *ids, "--json"]).stdout)
    assert view["runs"] == ids
    assert view["totals"]["memory"] == list(client(store).compare(*ids).totals["memory"])
    told = runner.invoke(app, ["layers", "--bits", "4"])
    assert told.exit_code == 0, told.exception
    assert "chosen in 3 runs" in told.stdout
    expected = client(store).layers().always(4)
    assert f"always 4 bits or more: {', '.join(expected) or 'none'}" in told.stdout
    plain = json.loads(runner.invoke(app, ["layers", "--bits", "4", "--json"]).stdout)
    assert plain["always"] == {"bits": 4, "layers": list(expected)}
    assert Path(str(store.url.database)).exists()
