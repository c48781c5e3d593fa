"""Answers while a budget is moved: quick, within every budget, close to the searched ones."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from mpq.core.problem import Budget, Problem, Status
from solvers.check import check
from solvers.pairs import Pairs
from solvers.risk import at_risk
from solvers.what_if import WhatIf
from tests.oracles import brute_force
from tests.test_solvers import drawn, with_responses


def moved(problem: Problem, shares: np.ndarray) -> list[Problem]:
    """The memory budget at shares of the way from the least to the most."""
    table, begins = problem.costs["memory"], problem.cells.offsets[:-1]
    low = float(np.minimum.reduceat(table.values, begins).sum())
    high = float(np.maximum.reduceat(table.values, begins).sum())
    others = [budget for budget in problem.budgets if budget.cost != "memory"]
    return [
        problem.with_budgets([Budget("memory", table.fixed + low + s * (high - low)), *others])
        for s in shares
    ]


@pytest.mark.parametrize("seed", range(8))
def test_without_pairs_it_is_the_additive_optimum_within_its_gap(seed: int) -> None:
    problem = drawn(6, 4, num_budgets=1, seed=seed)
    what_if = WhatIf(problem)
    for asked in moved(problem, np.linspace(0.1, 0.9, 5)):
        solution = check(asked, what_if.solve(asked))
        best = brute_force(asked, Problem.score)
        assert best is not None
        assert best - 1e-12 <= solution.score <= best * (1 + 5.1e-3)


def test_with_pairs_it_is_close_to_the_search() -> None:
    problem = with_responses(drawn(40, 6, num_budgets=1, seed=3), seed=3)
    what_if, near, ratios = WhatIf(problem), None, []
    for asked in moved(problem, np.linspace(0.1, 0.9, 9)):
        solution = check(asked, what_if.solve(asked, near))
        near = solution.allocation
        assert solution.solver == "pairs"
        ratios.append(solution.score / Pairs().solve(asked).score)
    assert np.mean(ratios) < 1.05
    assert max(ratios) < 1.2


def test_pins_and_risk_hold() -> None:
    problem = with_responses(drawn(12, 5, seed=1), seed=1)
    unit, schemes = problem.cells.units[4], problem.cells.schemes[4]
    what_if = WhatIf(problem)
    table = problem.costs["latency"]
    costs = {**problem.costs, "latency": replace(table, high=table.values * 1.1)}
    uncertain = replace(problem, costs=costs)
    first = what_if.solve(at_risk(uncertain, 0.9))
    for scheme in schemes:
        asked = at_risk(uncertain, 0.9).pinned({unit: [scheme]})
        solution = check(asked, what_if.solve(asked, first.allocation))
        if solution.allocation is not None:
            assert solution.allocation[unit] == scheme
            rows = asked.rows()
            assert all(row.met(solution.allocation.choice(asked.cells)) for row in rows)


def test_what_fits_nothing_is_told_why() -> None:
    problem = with_responses(drawn(5, 3, num_budgets=1, seed=2), seed=2)
    solution = WhatIf(problem).solve(problem.with_budgets([Budget("memory", 1.0)]))
    assert solution.status is Status.INFEASIBLE
    assert solution.infeasibility is not None
    assert "memory" in solution.infeasibility.message


def test_the_same_question_has_the_same_answer() -> None:
    problem = with_responses(drawn(30, 5, seed=5), seed=5)
    first, second = (WhatIf(problem).solve(problem) for _ in range(2))
    assert first.allocation == second.allocation


@pytest.mark.slow
@pytest.mark.parametrize(("units", "most_s"), [(200, 0.06), (2000, 0.5)])
def test_it_is_quick_enough_to_follow_a_hand(units: int, most_s: float) -> None:
    problem = with_responses(drawn(units, 8, seed=7), samples=64, seed=7)
    what_if, near, seconds = WhatIf(problem), None, []
    for asked in moved(problem, np.linspace(0.2, 0.9, 30)):
        began = time.thread_time()
        near = what_if.solve(asked, near).allocation
        seconds.append(time.thread_time() - began)
    assert np.percentile(seconds[3:], 95) < most_s
