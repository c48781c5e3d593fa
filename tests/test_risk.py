"""Budgets that hold with a probability, against trying every choice and against drawn costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpq
from mpq.core.errors import InvalidInputError
from mpq.core.jobs import JobSpec
from mpq.core.problem import Budget, Problem, Status
from mpq.core.risk import check_risk, upper_values
from mpq.store.store import Store, open_store
from solvers import solve
from solvers.auto import Auto
from solvers.check import check
from solvers.quick import minimise_quickly
from solvers.risk import at_risk, solve_at_risk
from tests.builders import mlp
from tests.contracts import solver_contract
from tests.oracles import brute_force_at_risk
from tests.test_solvers import drawn, made, with_responses


def measured(
    problem: Problem, cost: str = "latency", spread: float = 0.2, seed: int = 0
) -> Problem:
    """Give one cost intervals of up to `spread` of each value to both sides."""
    rng = np.random.default_rng(seed)
    table = problem.costs[cost]
    half = spread * rng.random(len(table.values)) * table.values
    wide = replace(table, low=table.values - half, high=table.values + half)
    return replace(problem, costs={**problem.costs, cost: wide})


def drawn_totals(
    problem: Problem, choice: np.ndarray, draws: int, shared: float, seed: int = 0
) -> np.ndarray:
    """Return totals of true latencies; `shared` of the variance of each error is one number."""
    rng = np.random.default_rng(seed)
    table = problem.costs["latency"]
    deviation = (table.high - table.low)[choice] / (2 * 1.959964)
    alone, together = rng.normal(size=(draws, len(choice))), rng.normal(size=(draws, 1))
    errors = math.sqrt(shared) * together + math.sqrt(1 - shared) * alone
    return table.fixed + (table.values[choice] + errors * deviation).sum(axis=1)


# --- the optimum -------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32 - 1),
    units=st.integers(1, 5),
    choices=st.integers(1, 4),
    tight=st.floats(0.0, 0.9),
    risk=st.sampled_from([0.5, 0.8, 0.95, 0.999]),
    solver=st.sampled_from(["auto", "ilp"]),
)
@settings(max_examples=120, deadline=None)
def test_the_optimum_at_risk_is_what_trying_everything_finds(
    seed: int, units: int, choices: int, tight: float, risk: float, solver: str
) -> None:
    problem = measured(drawn(units, choices, tight=tight, seed=seed), spread=0.4, seed=seed)
    best = brute_force_at_risk(problem, risk)
    solution = check(problem, solve(problem, solver, risk))
    if best is None:
        assert solution.status is Status.INFEASIBLE
        return
    assert solution.status is Status.OPTIMAL
    assert solution.score == pytest.approx(best, rel=1e-9)
    assert solution.gap == 0.0


def test_the_compiled_search_keeps_the_same_budgets() -> None:
    for seed in range(20):
        problem = measured(drawn(12, 4, seed=seed), seed=seed)
        asked = at_risk(problem, 0.95)
        values = problem.sensitivity.values
        quick = minimise_quickly(asked, values, problem.budgets, time_limit_s=60)
        assert quick.choice is not None
        assert asked.meets(quick.choice)
        exact = solve(problem, "ilp", 0.95)
        assert math.fsum(values[quick.choice]) == pytest.approx(exact.score, rel=1e-9)


def test_every_solver_keeps_budgets_at_risk() -> None:
    problem = with_responses(measured(drawn(8, 4, seed=3), spread=0.5))
    for name in ("auto", "ilp", "pairs"):
        solution = solve(problem, name, 0.95)
        check(problem, solution)
        assert solution.allocation is not None
        assert at_risk(problem, 0.95).fits(solution.allocation)
        assert solution.quantiles is not None
        assert solution.quantiles["latency"] <= problem.limits()["latency"]
        solver_contract(_Named(name), problem)


class _Named:
    def __init__(self, name: str) -> None:
        self.name = name

    def solve(self, problem: Problem) -> mpq.Solution:
        return solve_at_risk(problem, 0.9, self.name)


def test_between_equal_scores_the_one_that_keeps_its_budget_is_taken() -> None:
    """The cheaper cell has the wider interval: on paper it dominates, at risk it does not fit."""
    problem = made([[1.0, 1.0]], {"latency": [[1.0, 1.1]]}, {"latency": 1.2})
    table = problem.costs["latency"]
    wide = replace(table, low=np.array([0.5, 1.1]), high=np.array([1.5, 1.1]))
    problem = replace(problem, costs={"latency": wide})
    for few in (10**6, 0):
        solution = Auto(few_cells=few).solve(at_risk(problem, 0.95))
        assert solution.totals == {"latency": 1.1}
    assert solve(problem).totals == {"latency": 1.0}


# --- what the numbers mean ---------------------------------------------------------------------


@pytest.mark.parametrize("shared", [1.0, 0.5, 0.0])
def test_true_costs_keep_the_budget_as_often_as_asked(shared: float) -> None:
    draws = 4000
    shares = []
    for seed in range(10):
        problem = measured(drawn(20, 5, seed=seed), seed=seed)
        solution = solve(problem, risk=0.95)
        assert solution.allocation is not None
        choice = solution.allocation.choice(problem.cells)
        totals = drawn_totals(problem, choice, draws, shared, seed)
        assert solution.quantiles is not None
        below = float((totals <= solution.quantiles["latency"]).mean())
        error = math.sqrt(0.95 * 0.05 / draws)
        assert below >= 0.95 - 4 * error
        if shared == 1.0:  # the model itself: not more careful than asked either
            assert below <= 0.95 + 4 * error
        shares.append(float((totals <= problem.limits()["latency"]).mean()))
    assert min(shares) >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / draws)


def test_without_risk_the_budget_breaks_about_every_second_time() -> None:
    """The test above can fail: the plain optimum sits at its limit."""
    problem = measured(drawn(40, 5, seed=1, num_budgets=2), seed=1)
    problem = problem.with_budgets([b for b in problem.budgets if b.cost == "latency"])
    solution = solve(problem)
    assert solution.allocation is not None
    totals = drawn_totals(problem, solution.allocation.choice(problem.cells), 4000, 1.0)
    assert (totals <= problem.limits()["latency"]).mean() < 0.7


def test_the_quantile_of_a_lopsided_interval_is_its_upper_side() -> None:
    problem = made([[1.0]], {"latency": [[1.0]]}, {"latency": 9.0})
    table = replace(problem.costs["latency"], low=np.array([0.9]), high=np.array([1.3]))
    assert upper_values(table, 0.975) == pytest.approx([1.3])
    other = replace(table, low=np.array([0.6]), high=np.array([1.1]))
    assert upper_values(other, 0.975) == pytest.approx([1.25])  # half the width of both sides
    assert upper_values(other, 0.5) == pytest.approx([1.0])


def test_the_fixed_part_counts_as_exact() -> None:
    problem = made([[1.0]], {"latency": [[1.0]]}, {"latency": 9.0}, fixed=5.0)
    problem = measured(problem)
    quantiles = solve(problem, risk=0.9).quantiles
    assert quantiles is not None
    assert quantiles["latency"] == 5.0 + upper_values(problem.costs["latency"], 0.9)[0]


@pytest.mark.parametrize("seed", range(5))
def test_a_half_is_the_plain_answer(seed: int) -> None:
    problem = measured(drawn(12, 4, seed=seed))
    plain, half = solve(problem), solve(problem, risk=0.5)
    assert (half.allocation, half.score, half.totals) == (
        plain.allocation,
        plain.score,
        plain.totals,
    )
    assert half.quantiles == plain.totals
    assert (plain.risk, plain.quantiles, half.risk) == (None, None, 0.5)


def test_exact_costs_change_nothing() -> None:
    problem = drawn(12, 4)
    assert at_risk(problem, 0.99) is problem
    assert at_risk(problem, None) is problem
    plain, sure = solve(problem), solve(problem, risk=0.99)
    assert (sure.allocation, sure.quantiles) == (plain.allocation, plain.totals)


def test_more_probability_never_scores_better() -> None:
    problem = measured(drawn(15, 5), spread=0.5)
    scores = [solve(problem, risk=risk).score for risk in (0.5, 0.7, 0.9, 0.99)]
    assert scores == sorted(scores)
    assert scores[0] < scores[-1]


# --- what cannot be ----------------------------------------------------------------------------


def test_a_budget_that_only_luck_keeps_says_what_can_be_kept() -> None:
    problem = made([[2.0, 1.0]] * 2, {"latency": [[1e-3, 2e-3]] * 2}, {"latency": 2.1e-3})
    table = problem.costs["latency"]
    wide = replace(table, low=0.8 * table.values, high=1.2 * table.values)
    problem = replace(problem, costs={"latency": wide})
    assert solve(problem).status is Status.OPTIMAL
    solution = solve(problem, risk=0.95)
    assert solution.status is Status.INFEASIBLE
    reason = solution.infeasibility
    assert reason is not None
    smallest = 2e-3 * (1 + 0.2 * 1.644854 / 1.959964)
    assert reason.smallest["latency"] == pytest.approx(smallest, rel=1e-6)
    assert reason.message == (
        "at risk 0.95 (latency by the 95 % quantile) no allocation fits latency <= 2.1 ms: the "
        "smallest possible is 2.336 ms (every unit at int2); raise the budget or add a faster "
        "format; without risk one fits"
    )
    enough = problem.with_budgets([Budget("latency", reason.smallest["latency"] * (1 + 1e-12))])
    assert solve(enough, risk=0.95).status is Status.OPTIMAL


def test_what_does_not_fit_anyway_does_not_blame_the_risk() -> None:
    problem = measured(made([[2.0]], {"latency": [[1e-3]]}, {"latency": 0.5e-3}))
    reason = solve(problem, risk=0.95).infeasibility
    assert reason is not None
    assert "without risk" not in reason.message
    assert "no allocation fits latency <= 500.0 us" in reason.message


@pytest.mark.parametrize("risk", [0.49, 1.0, 1, math.nan, True, "0.95", None])
def test_a_risk_is_a_probability_of_a_half_or_more(risk: object) -> None:
    with pytest.raises(InvalidInputError, match=r"from 0\.5 up to below 1 such as 0\.95, got"):
        check_risk(risk)
    if risk is None:
        return
    with pytest.raises(InvalidInputError, match="risk"):
        solve(drawn(2, 2), risk=risk)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="risk") as caught:
        JobSpec(model="a:b", calibration="a:c", budgets=(), risk=risk)  # type: ignore[arg-type]
    assert caught.value.code == "job_value"


# --- in a search -------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "runs.db")) as opened:
        yield opened


def uncertain_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that bytes are measured, to 30 % and more for narrow formats."""
    from mpq.costing import Hardware

    exact = Hardware.tables

    def tables(*args: object) -> Mapping[str, mpq.CostTable]:
        found = exact(*args)  # type: ignore[arg-type]
        memory = found["memory"]
        half = 0.3 * np.sqrt(memory.values.max() * memory.values)
        low = np.maximum(memory.values - half, 0.0)
        return {**found, "memory": replace(memory, low=low, high=memory.values + half)}

    monkeypatch.setattr(Hardware, "tables", tables)


def search(store: Store, **changes: object) -> mpq.SearchResult:
    import torch

    torch.manual_seed(0)
    asked = {
        "budgets": ["memory <= uniform int4"],
        "schemes": ["int2", "int3", "int4", "int6", "int8"],
        "executor": "serial",
        "storage": store,
    }
    batches = [torch.randn(16, 6) for _ in range(2)]
    return mpq.search(mlp(), batches, **asked | changes)  # type: ignore[arg-type]


def test_everything_that_a_search_proposes_fits_at_its_risk(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uncertain_sizes(monkeypatch)
    plain, careful = search(store, risk=0.5), search(store)  # what is not asked is 0.95
    limit = careful.solution.budgets[0].limit
    table = careful.problem.costs["memory"]
    upper = upper_values(table, 0.95)

    def at_95(allocation: mpq.Allocation) -> float:
        return table.fixed + math.fsum(upper[allocation.choice(table.cells)])

    assert at_95(plain.unit_allocation) > limit  # the risk matters here
    for solution in careful.solutions.values():
        assert solution.allocation is not None
        assert at_95(solution.allocation) <= limit
        assert solution.quantiles is not None
        assert solution.quantiles["memory"] == at_95(solution.allocation)
    assert any(name.startswith("uniform") for name in careful.solutions)
    assert len(careful.solutions) < len(plain.solutions)  # some uniform scheme fits no more
    assert "95 % quantile" in careful.report(tmp_path / "page.html").read_text()
    again = careful.solve(["memory <= uniform int4"])
    assert (again.risk, again.quantiles and again.quantiles["memory"] <= limit) == (0.95, True)
    assert careful.solve(["memory <= uniform int4"], risk=0.5).score <= again.score
    assert plain.solve(["memory <= uniform int4"], risk=0.95).allocation == again.allocation
    assert all(s.quantiles == s.totals for s in plain.solutions.values())
    assert careful.risk == search(store, risk=0.95).risk == 0.95
    # the trade-off along a cost is not cut off where that cost's own budget is at risk
    ends = [(r.frontier("memory").solutions[-1].totals or {})["memory"] for r in (plain, careful)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"metric": "auto", "metric_seconds": 5.0, "refine": 0},
        {"precision": "settled", "refine": 0},
        {"quality": {"q": "sqnr"}, "refine": 1},
        {"solver": "pairs"},
        {"solver": "evolution", "num_trials": 8},
        {"solver": "optuna", "num_trials": 8},
        {"solver": "nsga2", "num_trials": 8},
    ],
    ids=["auto", "precision", "quality", "pairs", "evolution", "optuna", "nsga2"],
)
def test_other_ways_to_search_keep_the_risk_too(
    store: Store, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    uncertain_sizes(monkeypatch)
    result = search(store, risk=0.95, **changes)
    limit = result.solution.budgets[0].limit
    for name, solution in result.solutions.items():
        assert solution.quantiles is not None, name
        assert solution.quantiles["memory"] <= limit


def test_a_search_says_before_scoring_that_only_luck_would_keep_its_budget(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    uncertain_sizes(monkeypatch)
    monkeypatch.setattr("mpq.pipeline._score", lambda *_: pytest.fail("scored"))
    with pytest.raises(mpq.InfeasibleError, match=r"at risk 0\.95 .* without risk one fits"):
        search(store, risk=0.95, budgets=["memory <= uniform int2"])
