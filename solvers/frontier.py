"""Solutions along the limits of one cost."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from mpq.core.constraints import Constraint
from mpq.core.errors import InfeasibleError, InvalidInputError, RunFailedError, unknown
from mpq.core.frontier import Frontier
from mpq.core.problem import Budget, Problem, Solution
from mpq.core.protocols import Solver
from solvers import get_solver
from solvers.auto import Auto
from solvers.check import finish
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
    they are all allocations that nothing beats in cost and score at once, one of each kind,
    proven by as many exact solutions (epsilon constraint; Haimes 1971).
    Raises InvalidInputError for an unknown cost or solver, no points, or more than 10,000 of
    them; InfeasibleError where the other budgets alone cannot be met.
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
    values = problem.costs[cost].values
    least = by(problem, values, problem.budgets, time_limit_s=_TIME_LIMIT_S)
    if least.choice is None:
        reason = explain(problem, time_limit_s=_TIME_LIMIT_S, by=by)
        raise InfeasibleError("infeasible", reason.message)
    return problem.total(cost, least.choice)


def _minimiser(problem: Problem, points: int | None) -> Minimise:
    """Return what answers so many questions soonest: the compiled search has to be loaded."""
    if len(problem.cells) * (points or 100) <= 25 * Auto().few_cells:
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
    """Return every solution that nothing beats, by solving below each one found."""
    by = _minimiser(problem, None)
    low = smallest(problem, cost, by)
    found: list[Solution] = []
    limit = math.inf
    while limit >= low:
        budgets = problem.budgets
        if found:
            budgets = (Budget(cost, max(limit, math.ulp(0.0))), *budgets)
        if len(found) == _MOST_POINTS:
            raise InvalidInputError(
                "points",
                f"more than {_MOST_POINTS} points lie on the frontier of {cost}: ask for a "
                "number of evenly spaced ones",
            )
        solution = _least_then_cheapest(problem.with_budgets(budgets), cost, by)
        found.append(solution)
        limit = math.nextafter(_total(solution, cost), -math.inf)
    first = Budget(cost, max(_total(found[0], cost), math.ulp(0.0)))
    found[0] = replace(found[0], budgets=(first, *found[0].budgets))
    return tuple(reversed(found))


def _least_then_cheapest(problem: Problem, cost: str, by: Minimise) -> Solution:
    """Return the solution of least score, and of those the one with the least total of a cost."""
    start = time.monotonic()
    scores = problem.sensitivity.values
    least = by(problem, scores, problem.budgets, time_limit_s=_TIME_LIMIT_S)
    choice = least.choice
    if choice is not None and least.proven:
        as_good = Constraint(
            name="score",
            cells=problem.cells,
            coefficients=scores,
            limit=problem.score(choice),
        )
        equals = replace(problem, constraints=(*problem.constraints, as_good))
        cheap = by(equals, problem.costs[cost].values, problem.budgets, time_limit_s=_TIME_LIMIT_S)
        choice = cheap.choice if cheap.choice is not None and cheap.proven else None
    if choice is None:
        raise RunFailedError(
            "solver", f"the frontier of {cost} could not be proven in {_TIME_LIMIT_S:g} s a point"
        )
    seconds = time.monotonic() - start
    return finish(problem, "auto", choice, proven=True, seconds=seconds)


def _improving(found: Iterable[Solution], cost: str) -> list[Solution]:
    solved = [solution for solution in found if solution.allocation is not None]
    solved.sort(key=lambda s: (_total(s, cost), s.score))
    least = itertools.accumulate((s.score for s in solved), min, initial=math.inf)
    return [s for s, before in zip(solved, least, strict=False) if s.score < before]


def _total(solution: Solution, cost: str) -> float:
    return math.inf if solution.totals is None else solution.totals[cost]
