"""Searches for the least of a cost at which limits are met."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpq.core.errors import InfeasibleError, InvalidInputError
from mpq.core.evaluation import CHEAPER, CHOSEN, POINT
from mpq.core.jobs import JobSpec, RunState
from mpq.core.limits import Limit
from mpq.core.problem import Allocation
from mpq.jobfile import parse_job
from mpq.minimise import with_objective
from mpq.nn.patch import quantized
from mpq.referee.compare import compare_job
from mpq.result import SearchResult
from mpq.store.store import Store, open_store
from mpq.terminal import print_run
from tests import pictures
from tests.oracles import every_choice
from tests.pictures import batches, make_picture, on_calibration


def evaluate(model: nn.Module) -> dict[str, float]:
    """A score that falls and one that rises with the error of the picture."""
    with torch.no_grad():
        output, exact = model(batches()[0]), make_picture()(batches()[0])
    error = float((output - exact).square().mean() / exact.square().mean())
    return {"accuracy": 1.0 - error, "error": 1.0 + error}


def search(store: Store, **options: Any) -> SearchResult:
    asked = {
        "budgets": None,
        "minimise": "memory",
        "limits": ["accuracy drop <= 1%"],
        "evaluate": evaluate,
        "quality": None,
    }
    return pictures.search(store, **(asked | options))


@pytest.fixture(scope="module")
def least(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SearchResult]:
    """The least memory at one percent less accuracy, with held-out data; for reading."""
    with open_store(str(tmp_path_factory.mktemp("least") / "runs.db")) as opened:
        yield search(opened, held_out=batches(1, seed=9), refine=4)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "runs.db")) as opened:
        yield opened


def memory(result: SearchResult, allocation: Allocation) -> float:
    return result.problem.total("memory", allocation.choice(result.problem.cells))


@pytest.mark.parametrize(
    ("limits", "refine"),
    [
        (["accuracy drop <= 0.001"], 2),
        (["accuracy >= 0.999", "error rise <= 0.05%"], 0),
    ],
)
def test_the_chosen_is_the_cheapest_measured_that_meets_every_limit(
    store: Store, limits: list[str], refine: int
) -> None:
    result = search(store, limits=limits, refine=refine)
    found = on_calibration(result)
    asked = [Limit.parse(text).from_base(1.0) for text in limits]
    met = {
        name: memory(result, e.allocation)
        for name, e in found.items()
        if e.allocation and all(limit.met(e.metrics[limit.metric]) for limit in asked)
    }
    assert met[CHOSEN] == min(met.values())
    assert met[CHOSEN] < min(m for name, m in met.items() if name.startswith("uniform "))
    assert {f"uniform int{bits}" for bits in (2, 3, 4, 6, 8)} <= found.keys()
    assert sum(name.startswith(POINT) for name in found) <= 10
    assert sum(name.startswith(CHEAPER) for name in found) <= refine
    assert result.solution.totals is not None
    assert result.solution.totals["memory"] == met[CHOSEN]
    assert result.solution.allocation == found[CHOSEN].allocation
    assert found[CHOSEN].measured_bytes == met[CHOSEN]
    assert found["unquantized"].metrics == {"accuracy": 1.0, "error": 1.0}


def test_it_is_nearly_the_cheapest_of_all_allocations(least: SearchResult) -> None:
    """All 625 are measured."""
    result = least
    model = make_picture()
    met = []
    for choice in every_choice(result.problem):
        allocation = Allocation.from_choice(result.problem.cells, choice)
        with quantized(model, allocation):
            if evaluate(model)["accuracy"] >= 0.99:
                met.append(memory(result, allocation))
    uniform = {name: a for name, a in uniform_of(result).items() if accuracy(result, name) >= 0.99}
    assert min(met) <= memory(result, result.unit_allocation) <= 1.02 * min(met)
    assert memory(result, result.unit_allocation) < 0.95 * min(
        memory(result, a) for a in uniform.values()
    )


def uniform_of(result: SearchResult) -> dict[str, Allocation]:
    return {f"uniform {scheme}": a for scheme, a in result.problem.uniform().items()}


def accuracy(result: SearchResult, name: str) -> float:
    return on_calibration(result)[name].metrics["accuracy"]


def test_the_solution_holds_the_best_score_at_its_own_cost(least: SearchResult) -> None:
    result = least
    (own,) = result.solution.budgets
    assert (own.cost, own.limit) == ("memory", memory(result, result.unit_allocation))
    best = result.solve(list(result.solution.budgets))
    assert result.solution.bound == best.score
    assert result.solution.score >= best.score
    assert result.solution.gap == pytest.approx(1 - best.score / result.solution.score)


def test_where_a_minimised_cost_ended_limits_no_frontier(least: SearchResult) -> None:
    kept = least.frontier("bops")
    assert len(kept.solutions) > 3
    assert all([b.cost for b in s.budgets] == ["bops"] for s in kept.solutions)
    again = least.frontier("bops", 24)
    assert [b.cost for b in again.solutions[0].budgets] == ["bops"]


def test_held_out_data_are_measured_beside_the_cheapest_uniform_scheme_that_meets(
    least: SearchResult,
) -> None:
    result = least
    held = {e.candidate for e in result.evaluation if e.split == "held_out"}
    meet = {n: a for n, a in uniform_of(result).items() if accuracy(result, n) >= 0.99}
    cheapest = min(meet, key=lambda name: memory(result, meet[name]))
    assert held == {CHOSEN, "unquantized", cheapest}


def test_other_budgets_hold(store: Store, least: SearchResult) -> None:
    free = least
    bops = free.problem.costs["bops"]
    assert free.solution.totals is not None
    limit = 0.97 * free.solution.totals["bops"]
    tight = search(store, budgets=[f"bops <= {limit!r} bitops"], limits=["accuracy drop <= 20%"])
    assert tight.solution.totals is not None
    assert tight.solution.totals["bops"] <= limit < bops.baseline
    with pytest.raises(InfeasibleError, match="no candidate meets accuracy drop <= 1e-06% from 1:"):
        search(store, budgets=["memory <= 30%"], limits=["accuracy drop <= 0.000001%"])


def test_a_weighted_sum_of_costs_is_minimised(store: Store) -> None:
    weights = {"memory": 1.0, "bops": 1e-3}
    result = search(store, minimise=weights)
    assert store.run(result.run_id).spec.minimise == weights
    priced = with_objective(result.problem, weights)
    met = {
        name: priced.total("minimised", e.allocation.choice(priced.cells))
        for name, e in on_calibration(result).items()
        if e.allocation and e.metrics["accuracy"] >= 0.99
    }
    assert met[CHOSEN] == min(met.values())
    totals = result.solution.totals
    assert totals is not None
    assert met[CHOSEN] == pytest.approx(totals["memory"] + 1e-3 * totals["bops"])
    assert {b.cost: b.limit for b in result.solution.budgets} == totals


def test_qualities_may_be_limited_and_are_not_split(store: Store) -> None:
    result = search(store, quality=pictures.QUALITY, evaluate=None, limits=["layout <= 0.5"])
    found = on_calibration(result)
    assert found[CHOSEN].metrics["layout"] <= 0.5
    assert not [name for name in found if name.startswith("decoupled")]


def test_where_everything_meets_the_cheapest_there_is_comes_out(store: Store) -> None:
    result = search(store, limits=["accuracy >= -1e9"])
    least = min(memory(result, a) for a in uniform_of(result).values())
    assert memory(result, result.unit_allocation) == least
    notes = [e.message for e in store.events(result.run_id) if e.kind == "minimised"]
    assert notes[-1] == "no limit binds: nothing cheaper was there to measure"


def test_where_nothing_meets_one_line_names_the_best_and_nothing_is_lost(store: Store) -> None:
    with pytest.raises(InfeasibleError) as caught:
        search(store, limits=["accuracy drop <= 0%"])
    said = str(caught.value)
    assert "\n" not in said
    (record,) = store.runs()
    assert (record.state, record.error_message) == (RunState.FAILED, said)
    measured = [e for e in store.evaluations(record.id) if e.allocation]
    best = max(measured, key=lambda e: e.metrics["accuracy"])
    value = best.metrics["accuracy"]
    assert said.startswith("no candidate meets accuracy drop <= 0% from 1: the best accuracy is ")
    assert f"is {value:.6g} (" in said


def test_outputs_that_are_not_finite_are_never_chosen(store: Store) -> None:
    def of_weights(model: nn.Module) -> dict[str, float]:
        return {"accuracy": 1.0}  # whatever the output

    class Fragile(pictures.Picture):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            changed = float((self.layout[0].weight - self.kept).abs().max())
            return super().forward(x) * (1.0 if changed < 0.1 else math.nan)

    torch.manual_seed(0)
    model = Fragile().eval()
    model.register_buffer("kept", model.layout[0].weight.detach().clone())
    found = on_calibration(search_of(store, model, evaluate=of_weights))
    assert math.isnan(found["uniform int2"].mean)
    assert math.isfinite(found[CHOSEN].mean)


def search_of(store: Store, model: nn.Module, **options: Any) -> SearchResult:
    import mpq

    return mpq.search(
        model,
        batches(),
        minimise="memory",
        limits=["accuracy drop <= 1%"],
        schemes=["int2", "int3", "int4", "int6", "int8"],
        executor="serial",
        metric="weight_error",
        refine=0,
        storage=store,
        **options,
    )


def test_without_pairs_the_exact_frontier_is_measured(store: Store) -> None:
    result = search(store, metric="weight_error", refine=2)
    found = on_calibration(result)
    assert found[CHOSEN].metrics["accuracy"] >= 0.99
    points = [result.solutions[name] for name in found if name.startswith(POINT)]
    assert points
    assert all(solution.gap == 0.0 for solution in points)


def test_the_run_tells_what_was_minimised_and_what_binds(
    least: SearchResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, store = least, least.store
    notes = [e.message for e in store.events(result.run_id) if e.kind == "minimised"]
    measured = {e.allocation for e in result.evaluation if e.allocation}
    assert f"{len(measured)} allocations measured" in notes[0]
    assert "the cheapest uniform scheme that meets the limits" in notes[0]
    assert notes[1].startswith("accuracy drop <= 1% from 1 binds: ")
    print_run(store, result.run_id)
    shown = capsys.readouterr().out
    above, _, along = shown.partition("measured along memory")
    assert POINT not in above
    assert "yes, chosen" in along
    assert along.count("uniform int") >= 5
    page = result.report(tmp_path / "page.html").read_text()
    assert "Measured along memory" in page
    assert "accuracy drop &lt;= 1%" in page


def test_a_job_without_budgets_is_a_job() -> None:
    job = {"model": "a:b", "calibration": "a:c", "minimise": "memory", "limits": ["a drop <= 1%"]}
    spec = parse_job(job)
    assert (spec.budgets, spec.minimised) == ((), {"memory": 1.0})
    weighted = parse_job({**job, "minimise": {"memory": 1, "latency": 2e6}})
    assert weighted.minimised == {"memory": 1.0, "latency": 2e6}
    with pytest.raises(InvalidInputError, match="judged under budgets and the job has none"):
        compare_job(spec)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"limits": []}, r"minimise 'memory' needs at least one limit on what may be lost"),
        ({"minimise": "memry"}, r"unknown cost 'memry': did you mean 'memory'"),
        ({"minimise": {"memory": 1, "latncy": 1}}, r"unknown cost 'latncy': did you mean 'laten"),
        ({"minimise": ""}, r"unknown cost ''"),
        ({"minimise": {}}, r"minimise: a cost such as 'memory' or \{cost: weight\}, got \{\}"),
        ({"minimise": ["memory"]}, r"minimise: a cost such as 'memory'"),
        ({"minimise": {"memory": 0}}, r"minimise: the weight of 'memory' is positive, got 0"),
        ({"minimise": {"memory": math.nan}}, r"the weight of 'memory' is positive, got nan"),
        ({"minimise": None}, r"give budgets such as .* or minimise='memory' and limits"),
        ({"evaluate": None}, r"unknown metric 'accuracy'.*and what evaluate=\.\.\. returns"),
        ({"limits": ["acuracy drop <= 1%"]}, r"unknown limit metric 'acuracy': did you mean 'acc"),
        ({"limits": ["ssim drop <= 1%"]}, r"'ssim' is a degradation.* write 'ssim <= "),
        ({"solver": "pairs"}, r"minimise: solver 'pairs' judges by the loss under budgets"),
        ({"metric": "auto"}, r"minimise: metric 'auto' judges by the loss .* leave metric out"),
        ({"precision": "settled"}, r"minimise: precision 'settled' judges by the loss"),
        ({"quality_groups": {"a": ["*"]}}, r"minimise: quality_groups .* judges by the loss"),
    ],
)
def test_bad_input_is_one_line(store: Store, options: dict[str, Any], line: str) -> None:
    with pytest.raises(InvalidInputError, match=line) as caught:
        search(store, **options)
    assert "\n" not in str(caught.value)


def test_a_search_for_the_least_loss_needs_no_minimise() -> None:
    spec = JobSpec(model="a:b", calibration="a:c", budgets=("memory <= 60%",))
    assert spec.minimised == {}
