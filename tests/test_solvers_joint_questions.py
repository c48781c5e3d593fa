"""Frontiers, prices, reasons and other questions about costs that count pairs of cells."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mpq.core.errors import InvalidInputError
from mpq.core.problem import Budget
from solvers import solve
from solvers.chain import chain
from solvers.check import check
from solvers.frontier import frontier
from solvers.least_cost import least_cost
from solvers.several import apart, together
from solvers.shadow import shadow_prices
from solvers.surface import surface
from tests.oracles import Enumerated, fast_brute_force
from tests.test_solvers_joint import small


@pytest.mark.parametrize("pairing", ["both low", "formats differ", "every pair"])
def test_points_of_a_frontier_are_the_best_of_all(pairing: str) -> None:
    for seed in range(6):
        problem = small(seed, pairing, 0.2)
        free = problem.with_budgets([b for b in problem.budgets if b.cost != "latency"])
        everything = Enumerated(problem)
        for solution in frontier(problem, "latency", 8).solutions:
            limits = {b.cost: b.limit for b in solution.budgets}
            check(free.with_budgets(solution.budgets), solution)
            assert solution.score == pytest.approx(everything.best(limits), rel=1e-9)
        lowest = frontier(problem, "latency", 8).solutions[0].totals
        memory = {"memory": problem.limits()["memory"]}
        least = everything.smallest("latency", memory, math.inf)
        assert lowest is not None
        assert least is not None
        assert lowest["latency"] == pytest.approx(least, rel=1e-9)


def test_points_of_a_surface_are_the_best_of_all() -> None:
    problem = small(1)
    found, everything = surface(problem, points=(4, 4), gap=0.0), Enumerated(problem)
    for i, memory in enumerate(found.limits[0]):
        for j, latency in enumerate(found.limits[1]):
            best, point = (
                everything.best({"memory": memory, "latency": latency}),
                found.solutions[i][j],
            )
            assert (best is None) == (point is None)
            assert point is None or point.score == pytest.approx(best, rel=1e-9)


def test_the_least_cost_of_a_score_counts_the_pairs() -> None:
    for seed in range(6):
        problem = small(seed).with_budgets([])
        everything = Enumerated(problem)
        limit = float(np.median(everything.scores))
        weights = {"latency": 1.0, "memory": 1e-9}
        total = sum(w * everything.totals[name] for name, w in weights.items())
        for of, values in (("latency", everything.totals["latency"]), (weights, total)):
            found = least_cost(problem, of, limit, gap=0.0)
            assert found.value == pytest.approx(values[everything.scores <= limit].min(), rel=1e-9)


def test_shadow_prices_count_the_pairs() -> None:
    for seed in range(6):
        problem = small(seed)
        solution, everything = solve(problem), Enumerated(problem)
        if solution.allocation is None:
            continue
        for price in shadow_prices(problem, solution, time_limit_s=60).budgets:
            others = {c: m for c, m in problem.limits().items() if c != price.cost}
            raised = everything.best({**others, price.cost: price.raised_limit})
            assert price.without.score == pytest.approx(everything.best(others), rel=1e-9)
            assert price.raised.score == pytest.approx(raised, rel=1e-9)
            if price.binds:
                least = everything.smallest(price.cost, others, solution.score)
                assert price.better.totals is not None
                assert price.better.totals[price.cost] == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize("pairing", ["both low", "formats differ", "every pair"])
def test_an_infeasible_problem_names_what_can_be_reached(pairing: str) -> None:
    for seed in range(6):
        problem = small(seed, pairing)
        everything = Enumerated(problem.with_budgets([]))
        least = float(everything.totals["latency"].min())
        asked = problem.with_budgets([Budget("latency", 0.9 * least)]) if least > 0 else problem
        if least <= 0:
            continue
        for name in ("auto", "brute_force"):
            reason = check(asked, solve(asked, name)).infeasibility
            assert reason is not None
            assert reason.smallest["latency"] == pytest.approx(least, rel=1e-9)
            assert reason.conflict.budgets == ("latency",)
            assert fast_brute_force(
                asked.with_budgets([Budget("latency", reason.raised["latency"])])
            )


def test_several_models_keep_their_pairs() -> None:
    parts = {"one": small(0), "two": small(2)}
    whole = together(parts)
    choices = {name: problem.cells.offsets[:-1] for name, problem in parts.items()}
    chosen = np.concatenate([choices["one"], choices["two"] + len(parts["one"].cells)])
    both = sum(problem.total("latency", choices[name]) for name, problem in parts.items())
    assert whole.total("latency", chosen) == pytest.approx(both, rel=1e-12)
    solution = solve(whole.with_budgets([Budget("latency", both)]))
    assert solution.allocation is not None
    assert set(apart(solution.allocation)) == {"one", "two"}


@pytest.mark.parametrize("name", ["greedy", "dp"])
def test_who_adds_up_units_refuses_by_name(name: str) -> None:
    with pytest.raises(InvalidInputError, match=f"solver '{name}' adds up .* latency") as error:
        solve(small(0), name)
    assert error.value.code == "joint_costs"


def test_the_complete_frontier_and_a_chain_are_refused() -> None:
    problem = small(0).with_budgets([])
    for ask in (lambda: frontier(problem, "latency", None), lambda: chain(problem, "latency")):
        with pytest.raises(InvalidInputError, match="latency counts"):
            ask()
    assert frontier(problem, "memory", None).complete


@pytest.mark.parametrize("name", ["evolution", "optuna", "nsga2"])
def test_searches_by_measurements_keep_the_budgets(name: str) -> None:
    for seed in range(3):
        problem = small(seed)
        solution = check(problem, solve(problem, name))
        assert (solution.allocation is None) == (fast_brute_force(problem) is None)
