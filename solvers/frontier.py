"""Solutions along the limits of one cost."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from mpq.core.errors import InfeasibleError, InvalidInputError, unknown
from mpq.core.frontier import Frontier
from mpq.core.problem import Budget, Problem, Solution
from mpq.core.protocols import Solver
from solvers import get_solver
from solvers.auto import Auto
from solvers.check import finish
from solvers.dp import pareto
from solvers.exact import Minimise, minimise
from solvers.infeasible import explain

_TIME_LIMIT_S = 60.0
_CLOSE = 1e-3  # a solution this near to its bound is not looked for again at a tighter limit
_MOST_POINTS = 10_000


def frontier(
    problem: Problem, cost: str, points: int | None = 25, solver: str = "auto"
) -> Frontier:
    """Solve at up to `points` evenly spaced limits of `cost`, the other budgets kept.

    Limits run from the smallest that can be reached to the cost of the best allocation without
    a limit; a budget of the problem on `cost` itself is left out. Each solution's budgets hold
    its limit. Solutions that are not better than a cheaper one are removed. With `points` None
    they are all allocations that nothing beats in cost and score at once, one of each kind, by
    the dynamic program of solver "dp".
    Raises InvalidInputError for an unknown cost or solver, no points, or more than 10,000 of
    them (or of the sums on the way; with forbidden pairs also); InfeasibleError where the other
    budgets alone cannot be met.
    """
    if cost not in problem.costs:
        raise unknown("cost", cost, problem.costs)
    if points is not None and points < 1:
        raise InvalidInputError("points", f"a frontier has at least 1 point, got {points}")
    others = [budget for budget in problem.budgets if budget.cost != cost]
    problem = problem.with_budgets(others)
    if points is None:
        return Frontier(cost=cost, solutions=_all(problem, cost), complete=True)
    asked = get_solver(solver)
    low = smallest(problem, cost, _minimiser(problem, points))
    found = _downwards(problem, cost, low, points, asked)
    return Frontier(cost=cost, solutions=tuple(_improving(found, cost)))


def smallest(problem: Problem, cost: str, by: Minimise) -> float:
    """Return the smallest total of a cost within the budgets; raises InfeasibleError for none."""
    table, kept = problem.costs[cost], problem.budgets
    least = by(problem, table.values, kept, time_limit_s=_TIME_LIMIT_S, joint=table.joint)
    if least.choice is None:
        reason = explain(problem, time_limit_s=_TIME_LIMIT_S, by=by)
        raise InfeasibleError("infeasible", reason.message)
    return problem.total(cost, least.choice)


def _minimiser(problem: Problem, points: int) -> Minimise:
    """Return what answers so many questions soonest: the compiled search has to be loaded."""
    if len(problem.cells) * points <= 25 * Auto().few_cells:
        return minimise
    from solvers.quick import minimise_quickly

    return minimise_quickly


def _downwards(
    problem: Problem, cost: str, low: float, points: int, solver: Solver
) -> Iterator[Solution]:
    """Yield the solution without a limit, then those at smaller and smaller limits."""
    last = solver.solve(problem)
    if last.totals is None:
        return
    high = last.totals[cost]
    for limit in np.linspace(high, min(low, high), points):
        budget = Budget(cost, max(float(limit), low, math.ulp(0.0)))
        budgets = (budget, *problem.budgets)
        if limit == high:
            yield replace(last, budgets=budgets)
        elif not (last.gap <= _CLOSE and _total(last, cost) <= budget.limit):
            last = solver.solve(problem.with_budgets(budgets))
            yield last


def _all(problem: Problem, cost: str) -> tuple[Solution, ...]:
    """Return every solution that nothing beats."""
    start = time.monotonic()
    found = pareto(problem, cost)
    if not len(found.costs):
        reason = explain(problem, time_limit_s=_TIME_LIMIT_S)
        raise InfeasibleError("infeasible", reason.message)
    if len(found.costs) > _MOST_POINTS:
        raise InvalidInputError(
            "points",
            f"{len(found.costs):,} points lie on the frontier of {cost}, more than the "
            f"{_MOST_POINTS:,} that are told one by one: ask for a number of evenly spaced ones",
        )
    seconds = (time.monotonic() - start) / len(found.costs)
    limits = [Budget(cost, max(total, math.ulp(0.0))) for total in found.costs.tolist()]
    return tuple(
        finish(
            problem.with_budgets((limit, *problem.budgets)),
            "dp",
            choice,
            proven=True,
            seconds=seconds,
        )
        for limit, choice in zip(limits, found.choices(), strict=True)
    )


def _improving(found: Iterable[Solution], cost: str) -> list[Solution]:
    solved = [solution for solution in found if solution.allocation is not None]
    solved.sort(key=lambda s: (_total(s, cost), s.score))
    least = itertools.accumulate((s.score for s in solved), min, initial=math.inf)
    return [s for s, before in zip(solved, least, strict=False) if s.score < before]


def _total(solution: Solution, cost: str) -> float:
    return math.inf if solution.totals is None else solution.totals[cost]
