"""Runs with KV caches and inputs apart, as jobs, on workers, in tables and on every page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpq
from mpq.dry_run import dry_run
from mpq.jobfile import load_job, parse_job
from mpq.layer_use import layer_uses
from mpq.run_tables import allocation_table
from mpq.searching import run_job
from mpq.store.store import Store, open_store
from tests.dashboards import asking
from tests.llamas import batches, llama

pytest.importorskip("transformers")

JOB: dict[str, Any] = {
    "model": "tests.llamas:llama",
    "calibration": "tests.llamas:batches",
    "budgets": ["memory <= 40%", "kv_cache <= 45%", "bops <= 9%"],
    "schemes": ["int8", "int4"],
    "kv_cache": {"context": 100, "batch": 2},
    "activations": "apart",
    "activation_schemes": ["int8", "int4"],
    "executor": "serial",
    "refine": 1,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, str]:
    store = open_store(f"sqlite:///{tmp_path_factory.mktemp('apart')}/mpq.db")
    return store, run_job(parse_job(JOB), store).run_id


def test_a_job_file_says_all_of_it(tmp_path: Path) -> None:
    place = tmp_path / "job.toml"
    place.write_text(
        'model = "m:f"\ncalibration = "m:g"\nbudgets = ["kv_cache <= 2 GB"]\n'
        'kv_cache = {context = 4096, batch = 8}\nkv_schemes = ["bf16", "int8", "int4g32"]\n'
    )
    spec = load_job(place)
    assert spec.kv_cache == {"context": 4096, "batch": 8}
    assert spec.kv_schemes == ("bf16", "int8", "int4g32")
    assert load_job(place, {"kv_cache": True}).kv_cache is True


def test_every_page_shows_it(run: tuple[Store, str]) -> None:
    store, run_id = run
    client = asking(store)
    pages = ("", "/layers", "/sensitivity", "/pairs", "/checks", "/log", "/export")
    for page in (*(f"/runs/{run_id}{p}" for p in pages), "/", "/layers", f"/new?run={run_id}"):
        answer = client.get(page)
        assert answer.status_code == 200, page
    layers = client.get(f"/runs/{run_id}/layers").text
    assert "model.layers.0.self_attn.k_cache" in layers
    assert "lm_head.input" in layers
    assert "200×8" not in layers
    assert "400×8" in layers  # tokens times batch times heads, head_dim
    tables = ("units", "solutions", "allocation", "scores.csv", "costs.csv", "export/mpq")
    for table in tables:
        assert client.get(f"/api/v1/runs/{run_id}/{table}").status_code == 200
    refused = client.get(f"/api/v1/runs/{run_id}/export/torchao")
    assert refused.status_code == 422
    assert "torchao says nothing of KV caches" in refused.json()["detail"]


def test_tables_count_only_weights_as_weights(run: tuple[Store, str]) -> None:
    store, run_id = run
    columns = {c.name: c.values for c in allocation_table(store, run_id).columns}
    weights = dict(zip(columns["layer"], columns["weights"], strict=True))
    assert weights["lm_head"] == 31 * 32
    assert sum(weights.values()) == store.graph(run_id).searched_weights
    uses = {use.layer: use for use in layer_uses(store).layers}
    assert uses["lm_head.input"].least_bits in (4, 8)


def test_two_runs_compare_and_what_was_kept_gives_the_same_answer(run: tuple[Store, str]) -> None:
    store, run_id = run
    again = run_job(parse_job(JOB), store)
    first = mpq.SearchResult(store, run_id)
    assert again.allocation == first.allocation
    assert again.graph == first.graph
    compared = asking(store).get("/compare", params={"run": [run_id, again.run_id]})
    assert compared.status_code == 200
    assert "k_cache" in asking(store).get(f"/runs/{run_id}/layers").text


def test_a_dry_run_tells_bytes_before_anything_is_scored(tmp_path: Path) -> None:
    found = dry_run(parse_job(JOB), open_store(f"sqlite:///{tmp_path}/mpq.db"))
    cache = found.costs["kv_cache"]
    assert cache.baseline == 2 * 2 * 100 * 2 * 2 * 8 * 2
    assert (cache.least, cache.most) == (cache.baseline * 6 / 16, cache.baseline)
    assert "int8:int4 with kv_cache int8" in {row.scheme for row in found.uniforms}
    assert not found.infeasible


def test_the_least_cache_within_a_limit(tmp_path: Path) -> None:
    job = JOB | {
        "budgets": (),
        "minimise": "kv_cache",
        "limits": ["kl <= 0.05"],
        "activations": "tied",
        "activation_schemes": None,
    }
    result = run_job(parse_job(job), open_store(f"sqlite:///{tmp_path}/mpq.db"))
    totals = result.solution.totals
    assert totals is not None
    assert totals["kv_cache"] < result.problem.costs["kv_cache"].baseline


@pytest.mark.slow
def test_workers_of_ray_find_the_same(run: tuple[Store, str], tmp_path: Path) -> None:
    store, run_id = run
    job = JOB | {"executor": "ray", "num_workers": 2}
    other = run_job(parse_job(job), open_store(f"sqlite:///{tmp_path}/mpq.db"))
    assert other.allocation == mpq.SearchResult(store, run_id).allocation
    one, two = (store.problem(run_id), other.problem)
    assert np.array_equal(one.sensitivity.values, two.sensitivity.values)


def test_a_live_model_needs_no_entry_point(tmp_path: Path) -> None:
    result = mpq.search(
        llama(),
        batches(),
        budgets=["resident <= 60%"],
        schemes=["int8", "int4"],
        kv_cache=True,
        executor="serial",
        storage=f"sqlite:///{tmp_path}/mpq.db",
        refine=0,
    )
    costs = result.problem.costs
    assert costs["resident"].baseline == costs["memory"].baseline + costs["kv_cache"].baseline
    assert costs["kv_cache"].baseline == 2 * 2 * 12 * 2 * 8 * 2  # the first sample alone
