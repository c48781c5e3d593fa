"""What budgets are worth, against trying every allocation."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mpq.core.constraints import Constraint
from mpq.core.errors import InvalidInputError
from mpq.core.problem import Budget, Problem, Status
from mpq.core.risk import upper_values
from mpq.core.tables import CostTable
from solvers import solve
from solvers.questions import Questions, below
from solvers.shadow import budget_prices, shadow_prices
from tests.oracles import Enumerated
from tests.test_solvers import drawn, made
from tests.test_solvers_oracle import problems


def enumerable(problem: Problem) -> bool:
    return bool(np.prod(np.diff(problem.cells.offsets), dtype=float) <= 1500)


def near(value: float, problem: Problem) -> object:
    magnitude = float(np.abs(problem.sensitivity.values).max(initial=0.0))
    return pytest.approx(value, rel=1e-9, abs=1e-11 * magnitude)


def agrees(problem: Problem) -> None:
    every, solution = Enumerated(problem), solve(problem)
    best = every.best(problem.limits())
    assert (solution.allocation is None) == (best is None)
    if best is None:
        return
    found = shadow_prices(problem, solution, time_limit_s=30)
    assert found.optimum.proven
    assert found.optimum.score == near(best, problem)
    assert [b.cost for b in found.budgets] == list(problem.limits())
    for budget in found.budgets:
        _agrees(problem, every, found.optimum, budget)


def _agrees(problem, every, optimum, budget) -> None:
    limits = problem.limits()
    others = {name: limit for name, limit in limits.items() if name != budget.cost}
    for given_, limit in (
        (budget.without, np.inf),
        (budget.raised, budget.raised_limit),
    ):
        expected = every.best({**others, budget.cost: limit})
        assert given_.proven
        assert given_.score == near(expected, problem)
    gain = optimum.score - budget.without.score
    assert budget.binds == (gain > 1e-9 * abs(optimum.score))
    total = optimum.totals[budget.cost]
    cheaper = every.best({**others, budget.cost: np.nextafter(total, -np.inf)})
    assert budget.cheaper.proven
    assert (budget.cheaper.allocation is None) == (cheaper is None)
    if cheaper is not None:
        assert problem.fits(budget.cheaper.allocation)
        assert budget.cheaper.totals[budget.cost] < total
        assert budget.cheaper.score == near(cheaper, problem)
    assert budget.better.proven
    smallest = every.smallest(budget.cost, others, below=optimum.score)
    if budget.binds:
        assert budget.better.score < optimum.score
        assert budget.better.totals[budget.cost] == pytest.approx(smallest, rel=1e-11)
        least = every.best({**others, budget.cost: budget.better.totals[budget.cost]})
        assert budget.better.score == near(least, problem)
    else:  # nothing is lower by more than rounding
        assert budget.better.allocation is None


@given(problems())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_all_of_it_is_what_trying_everything_finds(problem: Problem) -> None:
    assume(enumerable(problem))
    agrees(problem)


@given(problems())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_compiled_search_finds_it_too(problem: Problem) -> None:
    assume(enumerable(problem))
    with patch("solvers.questions.FEW_CELLS", 0):
        agrees(problem)


@pytest.mark.slow
@given(problems())
@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
def test_all_of_it_is_what_trying_everything_finds_600(problem: Problem) -> None:
    assume(enumerable(problem))
    agrees(problem)


@given(problems(), st.lists(st.floats(0.5, 3.0), min_size=3, max_size=3))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_prices_bound_the_score_at_any_other_limits(problem: Problem, factors: list[float]) -> None:
    """score(other limits) >= dual - prices . (other limits - limits), for all limits at once."""
    assume(enumerable(problem) and problem.cells.units)
    every = Enumerated(problem)
    limits = problem.limits()
    best = every.best(limits)
    assume(best is not None)
    prices = budget_prices(problem)
    assert all(price >= 0 for price in prices.values())
    priced = problem.sensitivity.values + sum(
        (price * problem.costs[name].values for name, price in prices.items()),
        np.zeros(len(problem.cells)),
    )
    least = np.minimum.reduceat(priced, problem.cells.offsets[:-1]).sum()
    room = {name: limit - problem.costs[name].fixed for name, limit in limits.items()}
    size = least + sum(prices[name] * abs(room[name]) for name in limits)
    dual = least - sum(prices[name] * room[name] for name in limits)
    rounding = 1e-9 * abs(size)
    assert dual <= best + rounding
    other = {n: f * limit for (n, limit), f in zip(limits.items(), factors, strict=False)}
    there = every.best(other)
    if there is not None:
        assert there >= dual - sum(prices[n] * (other[n] - limits[n]) for n in limits) - rounding


def test_the_price_is_the_slope_of_the_dual() -> None:
    """Between the two allocations that the relaxed optimum mixes, the score falls by it."""
    problem = made([[8, 2, 0]], {"memory": [[1, 3, 5]]}, {"memory": 2})
    assert budget_prices(problem) == {"memory": pytest.approx(3.0)}
    assert budget_prices(problem.with_budgets([Budget("memory", 4.0)])) == {
        "memory": pytest.approx(1.0)
    }
    assert budget_prices(problem.with_budgets([Budget("memory", 9.0)])) == {"memory": 0.0}


def test_both_ways_to_price_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = drawn(60, 5)
    relaxed = budget_prices(problem)
    monkeypatch.setattr("solvers.shadow.FEW_CELLS", 0)
    assert budget_prices(problem) == pytest.approx(relaxed, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("what", ["scores", "costs"])
def test_the_scale_does_not_matter(scale: float, what: str) -> None:
    problem = drawn(5, 4)
    table = problem.sensitivity
    if what == "scores":
        problem = replace(problem, sensitivity=replace(table, values=table.values * scale))
    else:
        problem = replace(
            problem,
            costs={
                name: CostTable.exact(name, t.unit, t.cells, t.values * scale)
                for name, t in problem.costs.items()
            },
            budgets=tuple(Budget(b.cost, b.limit * scale) for b in problem.budgets),
        )
    agrees(problem)


@pytest.mark.parametrize("unit", [1.0, 0.1])
def test_ties_among_identical_units(unit: float) -> None:
    """Many allocations have the optimum's total and score: the next ones are beyond them all."""
    scores = [[4.0 * unit, 2.0 * unit, 1.0 * unit]] * 6
    memory = [[1 * unit, 2 * unit, 3 * unit]] * 6
    agrees(made(scores, {"memory": memory}, {"memory": 9.5 * unit}))


def test_more_units_that_are_alike_than_can_be_listed() -> None:
    scores = [[4.0, 2.0, 1.0]] * 200
    memory = [[1e5, 2e5, 3e5]] * 200
    problem = made(scores, {"memory": memory}, {"memory": 3e7})
    start = time.perf_counter()
    (found,) = shadow_prices(problem, solve(problem), time_limit_s=10).budgets
    assert time.perf_counter() - start < 8
    assert (found.better.totals, found.better.score) == ({"memory": 3.01e7}, 598.0)
    assert (found.cheaper.totals, found.cheaper.score) == ({"memory": 2.99e7}, 602.0)


@pytest.mark.parametrize(
    "problem",
    [
        made([], {"memory": []}, {"memory": 1.0}),
        made([[3, 2, 1]], {"memory": [[1, 2, 3]]}, {"memory": 2}),
        made([[1], [2]], {"memory": [[5], [6]]}, {"memory": 11}),
        made([[3, 1], [2, 1]], {"memory": [[4, 4], [4, 4]]}, {"memory": 8}),
        made([[3, 1], [2, 1]], {"memory": [[0, 0], [0, 0]]}, {"memory": 1e-9}),
        made([[0, 0], [0, 0]], {"memory": [[1, 2], [2, 1]]}, {"memory": 3}),
        made([[3, 1], [3, 1]], {"memory": [[1, 2], [1, 2]]}, [("memory", 4.0), ("memory", 3.0)]),
        made([[-3, -5], [2, 1]], {"memory": [[1, 2], [1, 2]]}, {"memory": 3.0}),
    ],
)
def test_small_and_odd_problems(problem: Problem) -> None:
    agrees(problem)
    for line in shadow_prices(problem, solve(problem)).told():
        assert line.startswith("memory: ")


def test_constraints_and_forbidden_pairs_hold() -> None:
    problem = drawn(5, 4)
    cells = problem.cells
    rng = np.random.default_rng(3)
    row = rng.normal(size=len(cells))
    limit = float(np.sort(row.reshape(5, 4), axis=1)[:, 1].sum())
    free = solve(problem).allocation
    assert free is not None
    pair = tuple((unit, free[unit]) for unit in cells.units[:2])
    problem = replace(
        problem,
        constraints=(Constraint(name="row", cells=cells, coefficients=row, limit=limit),),
        forbidden=(pair,),
    )
    agrees(problem)


def test_a_solution_that_is_not_optimal_is_told_about_the_optimum() -> None:
    problem = drawn(5, 4)
    best = solve(problem)
    tighter = solve(problem.with_budgets([Budget(b.cost, 0.97 * b.limit) for b in problem.budgets]))
    assert best.score < tighter.score
    chosen = replace(tighter, budgets=problem.budgets, status=Status.FEASIBLE)
    assert shadow_prices(problem.with_budgets(()), chosen) == shadow_prices(problem, best)


def test_an_optimum_of_another_score_is_told_about_the_additive_one() -> None:
    problem = drawn(5, 4)
    other = solve(problem.with_budgets([Budget(b.cost, 0.97 * b.limit) for b in problem.budgets]))
    pairs = replace(other, budgets=problem.budgets, solver="pairs")
    assert pairs.status is Status.OPTIMAL
    assert shadow_prices(problem, pairs) == shadow_prices(problem, solve(problem))


def test_budgets_that_hold_with_a_probability_count_with_quantiles() -> None:
    problem = drawn(5, 4)
    table = problem.costs["latency"]
    unsure = replace(table, low=0.7 * table.values, high=1.3 * table.values)
    problem = replace(problem, costs=dict(problem.costs) | {"latency": unsure})
    solution = solve(problem, risk=0.95)
    found = shadow_prices(problem, solution)
    upper = replace(unsure, values=upper_values(unsure, 0.95))
    surely = replace(problem, costs=dict(problem.costs) | {"latency": upper})
    assert found == shadow_prices(surely, solve(surely))
    assert found.optimum.score == solution.score > solve(problem).score
    agrees(surely)


def test_what_has_no_allocation_has_no_prices() -> None:
    problem = made([[1]], {"memory": [[2]]}, {"memory": 1})
    with pytest.raises(InvalidInputError, match="a solution that is infeasible"):
        shadow_prices(problem, solve(problem))


def test_what_is_not_proven_in_time_says_so() -> None:
    """Identical units and latencies that no whole number tells apart: much is left open."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 4, 400)
    latency, memory = rng.random((4, 6))[kinds], 1e5 * np.arange(1, 7) * (1 + kinds[:, None])
    scores = np.sort(rng.random((400, 6)))[:, ::-1]
    limits = {"memory": float(memory[:, 2].sum()), "latency": float(latency.mean() * 400)}
    problem = made(scores, {"memory": memory, "latency": latency}, limits)
    solution = solve(problem)
    start = time.process_time()
    found = shadow_prices(problem, solution, time_limit_s=0.05)
    assert time.process_time() - start < 5
    for budget in found.budgets:
        for other in (budget.without, budget.raised, budget.better, budget.cheaper):
            if other.allocation is not None:
                choice = other.allocation.choice(problem.cells)
                assert (other.score, other.totals) == (
                    problem.score(choice),
                    problem.totals(choice),
                )
    assert not all(
        o.proven for b in found.budgets for o in (b.without, b.raised, b.better, b.cheaper)
    )


def test_it_is_told_in_plain_sentences() -> None:
    memory = [[3e6, 5e6], [4e6, 7e6]]
    problem = made([[2, 1], [8, 4]], {"memory": memory}, {"memory": 9.5e6})
    assert shadow_prices(problem, solve(problem)).told() == [
        "memory: 8 % more (10.26 MB) buys 33 % less loss (shadow price 1.3e-06 per byte); the next "
        "better allocation takes 1.0 MB more for 33 % less loss, the next cheaper allocation "
        "takes 2.0 MB less for 11 % more loss"
    ]
    loose = problem.with_budgets([Budget("memory", 20e6)])
    assert shadow_prices(loose, solve(loose)).told() == [
        "memory: more than this budget would not help; the next cheaper allocation takes 2.0 MB "
        "less for 20 % more loss"
    ]


def test_below_is_the_next_total_that_whole_numbers_allow() -> None:
    problem = made([[1, 1], [1, 1]], {"memory": [[3e5, 5e5], [1e5, 7e5]]}, fixed=7.0)
    row = Constraint.at_most(problem.costs["memory"], 0.0)
    assert below(row, 800_007.0).limit == 600_007.0
    assert below(row, 400_007.0).limit == 200_007.0
    third = dataclasses.replace(row, fixed=1 / 3)
    assert below(third, 1.0).limit == np.nextafter(1.0, 0)


def test_questions_share_the_time() -> None:
    problem = drawn(400, 8, tight=0.05)
    questions = Questions(problem=problem, number=3, seconds=60)
    assert [questions.best(problem.budgets).proven for _ in range(3)] == [True] * 3
    assert questions.number == 0
