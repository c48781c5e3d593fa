"""Solutions along the limits of one cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from mpq.core.errors import InfeasibleError, InvalidInputError, unknown
from mpq.core.problem import Budget, Frontier, Problem, Solution, Status
from mpq.core.protocols import Solver
from solvers import get_solver
from solvers.exact import minimise
from solvers.infeasible import explain

_TIME_LIMIT_S = 60.0


def frontier(problem: Problem, cost: str, points: int = 25, solver: str = "ilp") -> Frontier:
    """Solve at up to `points` evenly spaced limits of `cost`, the other budgets kept.

    Limits run from the smallest that can be reached to the cost of the best allocation without
    a limit; a budget of the problem on `cost` itself is left out. Each solution's budgets hold
    its limit. Solutions that are not better than a cheaper one are removed.
    Raises InvalidInputError for an unknown cost or solver or no points, InfeasibleError where
    the other budgets alone cannot be met.
    """
    if cost not in problem.costs:
        raise unknown("cost", cost, problem.costs)
    if points < 1:
        raise InvalidInputError("points", f"a frontier has at least 1 point, got {points}")
    others = [budget for budget in problem.budgets if budget.cost != cost]
    values = problem.costs[cost].values
    smallest = minimise(problem, values, others, time_limit_s=_TIME_LIMIT_S)
    if smallest.choice is None:
        reason = explain(problem.with_budgets(others), time_limit_s=_TIME_LIMIT_S)
        raise InfeasibleError("infeasible", reason.message)
    low = problem.total(cost, smallest.choice)
    found = _downwards(problem, others, cost, low, points, get_solver(solver))
    return Frontier(cost=cost, solutions=tuple(_improving(found, cost)))


def _downwards(
    problem: Problem, others: list[Budget], cost: str, low: float, points: int, solver: Solver
) -> Iterator[Solution]:
    """Yield the solution without a limit, then those at smaller and smaller limits."""
    last = solver.solve(problem.with_budgets(others))
    if last.totals is None:
        return
    high = last.totals[cost]
    for limit in np.linspace(high, min(low, high), points):
        budget = Budget(cost, max(float(limit), low, math.ulp(0.0)))
        if limit == high:
            yield replace(last, budgets=(budget, *others))
        elif not (last.status is Status.OPTIMAL and _total(last, cost) <= budget.limit):
            last = solver.solve(problem.with_budgets((budget, *others)))
            yield last


def _improving(found: Iterable[Solution], cost: str) -> list[Solution]:
    kept: list[Solution] = []
    solved = (solution for solution in found if solution.allocation is not None)
    for solution in sorted(solved, key=lambda s: (_total(s, cost), s.score)):
        if not kept or solution.score < kept[-1].score:
            kept.append(solution)
    return kept


def _total(solution: Solution, cost: str) -> float:
    return math.inf if solution.totals is None else solution.totals[cost]
