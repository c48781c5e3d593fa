"""A whole search on small models: what is promised of every run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mpq
from mpq.core.errors import InfeasibleError
from mpq.core.evaluation import CHOSEN
from mpq.core.jobs import RunState
from mpq.nn.divergence import OutputDivergence
from mpq.nn.quantizers import WeightQuantizer
from mpq.result import SearchResult
from mpq.store.store import Store, open_store


class Net(nn.Module):
    """A convolution, a depthwise one and two linear layers over 6x6 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, stride=2)
        self.hidden = nn.Linear(32, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.norm(self.conv(x)).relu()).relu()
        return self.head(self.hidden(x.flatten(1)).relu())


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def make_images(count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 2, 6, 6, generator=generator) for _ in range(count)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "runs.db")) as opened:
        yield opened


def search(store: Store, **options: Any) -> SearchResult:
    settings: dict[str, Any] = {
        "budgets": ["memory <= uniform int4"],
        "schemes": ["int2", "int3", "int4", "int6", "int8"],
        "held_out": make_images(2, 1),
        "executor": "serial",
    }
    return mpq.search(make_net(), make_images(3, 0), storage=store, **(settings | options))


def test_a_search_meets_its_budgets_and_beats_every_uniform_scheme_that_fits(store: Store) -> None:
    result = search(store)
    problem = result.problem.with_budgets(result.solution.budgets)
    assert problem.fits(result.unit_allocation)
    calibration = {e.candidate: e for e in result.evaluation if e.split == "calibration"}
    uniform = [e for name, e in calibration.items() if name.startswith("uniform ")]
    assert len(uniform) == 5
    fitting = [e.mean for e in uniform if problem.fits(e.allocation)]
    assert len(fitting) == 3
    assert calibration[CHOSEN].mean <= min(fitting)


def test_every_layer_has_a_scheme_and_coverage_is_whole(store: Store) -> None:
    result = search(store, skip=["head"])
    assert set(result.allocation) == {"conv", "depthwise", "hidden"}
    (head,) = [p for p in result.graph.unsearched if p.name == "head.weight"]
    assert head.reason == "skipped as asked (head)"
    searched = 1 - result.graph.coverage
    parts = sum(p.elements for p in result.graph.unsearched)
    assert searched == pytest.approx(parts / (parts + result.graph.searched_weights))


def test_predicted_bytes_are_the_bytes_of_the_written_file(store: Store) -> None:
    result = search(store, schemes=["int3", "int5a", "int4t", "fp16"], budgets=["memory <= 45%"])
    (chosen,) = [e for e in result.evaluation if e.candidate == CHOSEN and e.split == "held_out"]
    assert chosen.measured_bytes == chosen.predicted_bytes
    assert chosen.predicted_bytes == round((result.solution.totals or {})["memory"])


def test_held_out_data_are_measured_beside_the_prediction(store: Store) -> None:
    result = search(store, evaluate=lambda model: {"norm": float(model.head.weight.norm())})
    held_out = {e.candidate: e for e in result.evaluation if e.split == "held_out"}
    assert held_out[CHOSEN].predicted is not None
    assert held_out["unquantized"].mean == 0.0
    assert held_out["unquantized"].metrics["norm"] != held_out[CHOSEN].metrics["norm"]


def test_apply_runs_the_chosen_network_and_gives_the_model_back(store: Store) -> None:
    result = search(store, clip="mse")
    model, image = make_net(), make_images(1, 2)[0]
    with torch.no_grad():
        before = model(image)
        with result.apply(model) as quantized:
            during = quantized(image)
            scheme = result.allocation["hidden"].weights
            stored = WeightQuantizer("mse").fake_quantize("w", make_net().hidden.weight, scheme)
            assert torch.equal(model.hidden.weight, stored)
        assert torch.equal(model(image), before)
    assert not torch.equal(during, before)


def test_scores_are_computed_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first = search(store)

    def never(*_: object) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr("sensitivity.gauss_newton.GaussNewton.run", never)
    second = search(store, budgets=["memory <= 25%"])
    assert np.array_equal(first.problem.sensitivity.values, second.problem.sensitivity.values)


def test_a_changed_model_is_scored_again(store: Store) -> None:
    first = search(store)
    other = make_net()
    with torch.no_grad():
        other.head.weight *= 1.5
    second = mpq.search(
        other,
        make_images(3, 0),
        storage=store,
        budgets=["memory <= 25%"],
        schemes=["int2", "int3", "int4", "int6", "int8"],
        executor="serial",
    )
    assert not np.array_equal(first.problem.sensitivity.values, second.problem.sensitivity.values)


def test_a_search_that_broke_goes_on_where_it_was(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sensitivity.gauss_newton import GaussNewton

    real, seen = GaussNewton.run, []

    def breaks(self: GaussNewton, workload: Any, task: Any) -> Any:
        seen.append(task.part)
        if len(seen) == 2:
            raise ValueError("the power went out")
        return real(self, workload, task)

    monkeypatch.setattr(GaussNewton, "run", breaks)
    with pytest.raises(mpq.RunFailedError, match="the power went out"):
        search(store)
    assert store.runs()[0].state == RunState.FAILED
    search(store)
    assert seen == [(0,), (1,), (2,), (1,)]  # the others finish before the run ends
    assert store.runs()[0].state == RunState.SUCCEEDED


def test_solving_again_needs_only_the_store(store: Store) -> None:
    result = search(store)
    again = SearchResult(store, result.run_id)
    tighter = again.solve(["memory <= uniform int3"])
    assert tighter.status == mpq.Status.OPTIMAL
    looser = again.solve(["memory <= uniform int3"], pin={"head": "int8"})
    assert str((looser.allocation or {})["head"]) == "int8"
    assert looser.score >= tighter.score - 1e-12


def test_the_frontier_falls(store: Store) -> None:
    solutions = search(store).frontier("memory", points=8).solutions
    memory = [(s.totals or {})["memory"] for s in solutions]
    assert memory == sorted(memory)
    scores = [s.score for s in solutions]
    assert scores == sorted(scores, reverse=True)


def test_a_frontier_that_is_not_found_fails_no_search(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise InfeasibleError("infeasible", "no time left")

    monkeypatch.setattr("solvers.frontier.frontier", fails)
    result = search(store)
    told = [e.message for e in store.events(result.run_id) if e.kind == "frontier"]
    assert "memory is not kept: no time left" in told


def test_frontiers_take_no_more_than_their_time(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpq.frontiers._TIME_LIMIT_S", -1.0)
    result = search(store)
    told = [e.message for e in store.events(result.run_id) if e.kind == "frontier"]
    assert {message.partition(" ")[0] for message in told} >= set(result.problem.costs)
    assert store.frontier(result.run_id, "memory") is None
    assert len(result.frontier("memory").solutions) > 1
    assert store.frontier(result.run_id, "memory") is None
    assert store.run(result.run_id).state == RunState.SUCCEEDED


def test_convolutions_and_activations_under_a_latency_budget(store: Store) -> None:
    result = search(
        store,
        schemes=None,
        budgets=["memory <= 60%", "latency <= 200%"],
        latency_seconds=2.0,
        sample=make_images(1, 0)[0][:1],
    )
    latency = result.problem.costs["latency"]
    assert latency.provenance.startswith("measured on")
    assert (latency.low <= latency.values).all()
    assert (latency.values <= latency.high).all()
    offered = {str(s) for schemes in result.problem.cells.schemes for s in schemes}
    assert offered >= {"fp32", "int8:int8"}


def test_a_scheme_without_a_kernel_is_left_out_and_told(store: Store) -> None:
    result = search(
        store,
        schemes=["fp32", "int3", "int8:int8"],
        budgets=["memory <= 60%", "latency <= 1 s"],
        latency_seconds=2.0,
    )
    offered = {str(s) for schemes in result.problem.cells.schemes for s in schemes}
    assert offered == {"fp32", "int8:int8"}
    left_out = [event.message for event in store.events(result.run_id) if event.kind == "left out"]
    assert any("int3" in message and "hidden" in message for message in left_out)


@pytest.mark.parametrize("metric", ["gauss_newton", "hessian_trace"])
def test_both_metrics_have_error_bars(store: Store, metric: str) -> None:
    table = search(store, metric=metric, refine=0).problem.sensitivity
    assert table.metric == metric
    assert (table.stderr > 0).all()


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_tables(tmp_path: Path) -> None:
    tables = []
    for name, options in {
        "serial": {"executor": "serial"},
        "one": {"executor": "ray", "num_workers": 1},
        "two": {"executor": "ray", "num_workers": 2},
    }.items():
        with open_store(str(tmp_path / f"{name}.db")) as store:
            result = search(store, **options)
            tables.append((result.problem.sensitivity.values, result.allocation))
    for values, allocation in tables[1:]:
        np.testing.assert_array_equal(values, tables[0][0])
        assert allocation == tables[0][1]


def test_solving_a_stored_run_loads_no_torch(store: Store) -> None:
    result = search(store)
    code = f"""
import sys
from mpq.store.store import open_store
from mpq.stated import stated
from solvers import solve
with open_store({str(store.url.database)!r}) as store:
    solution = solve(stated(store.problem({result.run_id!r}), ["memory <= 20%"]))
assert solution.status == "optimal", solution
assert not {{"torch", "ray", "transformers", "onnxruntime"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_page_stands_alone_and_names_everything(store: Store, tmp_path: Path) -> None:
    result = search(store, name="<b>small</b>")
    page = result.report(tmp_path / "page.html").read_text()
    assert "<b>small</b>" not in page
    assert "&lt;b&gt;small&lt;/b&gt;" in page
    for layer in result.allocation:
        assert layer in page
    head = page[: page.index("<body")]
    assert "http" not in head


def test_static_ranges_of_convolutions_are_kept_with_the_run(store: Store) -> None:
    result = search(store, schemes=["int8:int8"], budgets=["memory <= 60%"], refine=0)
    again = SearchResult(store, result.run_id)
    batches = make_images(3, 0)
    low, high = again.graph.input_ranges["conv"]
    assert low == pytest.approx(min(float(b.min()) for b in batches))
    assert high == pytest.approx(max(float(b.max()) for b in batches))
    assert "hidden" not in again.graph.input_ranges  # linear kernels are dynamic
    (measured,) = [
        e for e in result.evaluation if e.candidate == CHOSEN and e.split == "calibration"
    ]
    model = make_net()
    with torch.no_grad(), again.apply(model) as quantized:
        outputs = torch.cat([quantized(b) for b in batches])
    with torch.no_grad():
        original = torch.cat([model(b) for b in batches])
    divergence = OutputDivergence("kl").between(original, outputs).mean()
    assert float(divergence) == pytest.approx(measured.mean, rel=1e-9)


def test_nothing_is_measured_twice(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first = search(store, evaluate=count_parameters)

    def never(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("mpq.evaluate.run_candidate", never)
    monkeypatch.setattr("sensitivity.gauss_newton.GaussNewton.run", never)
    second = search(store, evaluate=count_parameters)
    assert second.allocation == first.allocation
    for again, before in zip(second.evaluation, first.evaluation, strict=True):
        assert replace(again, predicted=None) == replace(before, predicted=None)
        if before.predicted is not None:
            assert again.predicted == pytest.approx(before.predicted, rel=1e-6)


def count_parameters(model: nn.Module) -> dict[str, float]:
    return {"parameters": float(sum(p.numel() for p in model.parameters()))}


def test_what_if_answers_as_solving_does(store: Store) -> None:
    result = search(store, refine=0)
    what_if, near = result.what_if(), None
    for share in (30, 50, 70):
        moved = what_if.solve([f"memory <= {share}%"], near=near)
        solved = result.solve([f"memory <= {share}%"], solver=moved.solver)
        near = moved.allocation
        assert moved.totals is not None
        assert moved.totals["memory"] <= solved.budgets[0].limit
        assert moved.score == pytest.approx(solved.score, rel=0.1)
    pinned = what_if.solve(["memory <= 70%"], pin={"*": "int8"}, near=near)
    assert pinned.allocation is not None
    assert {str(scheme) for scheme in pinned.allocation.values()} == {"int8"}
