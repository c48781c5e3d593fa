"""Budgets on measured costs that hold with a probability.

A budget on a cost with error bars asks that the `risk` quantile of the total is within its limit.
The errors of all cells are taken to move together, so the standard deviation of the total is the
sum of those of its cells, sum_i sd_i, and the condition is a linear row of `upper_values`: every
solver meets it, and proves what it proves without. That is what a table of kernel times knows:
cells of layers of equal shape and scheme are one measurement, and most of the error, the speed of
the machine from one process to the next, is common to all kernels. For normal errors of whatever
correlation r, sqrt(sum_ij r_ij sd_i sd_j) <= sum_i sd_i: a budget never holds with less than the
probability asked, and with more where measurements err independently of each other.

Each budget holds with that probability, not all of them together. What has no interval counts as
exact: `CostTable.fixed`, joint terms and the unquantized network that percentages refer to.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from mpq.core.problem import Constraint, Infeasibility, Problem, Solution
from mpq.core.risk import check_risk, quantile, upper_values
from solvers import get_solver
from solvers.exact import minimise
from solvers.infeasible import explain

_TIME_LIMIT_S = 60.0


def at_risk(problem: Problem, risk: float | None, free: Collection[str] = ()) -> Problem:
    """Return the problem whose budgets hold with probability `risk`; None: as they are.

    Budgets stay, except those on costs in `free`, and each on a cost with errors brings a
    constraint on its quantile. Raises InvalidInputError (`risk`) for anything but a number from
    0.5 up to below 1.
    """
    if free:
        problem = problem.with_budgets([b for b in problem.budgets if b.cost not in free])
    if risk is None:
        return problem
    check_risk(risk)
    limits = problem.limits()
    counted = {cost: problem.costs[cost] for cost in limits}
    rows = [
        Constraint(
            name=f"{cost} with probability {risk:g}",
            cells=problem.cells,
            coefficients=upper_values(table, risk),
            limit=limits[cost],
            fixed=table.fixed,
            joint=table.joint,
        )
        for cost, table in counted.items()
        if (upper_values(table, risk) > table.values).any()
    ]
    return replace(problem, constraints=(*problem.constraints, *rows)) if rows else problem


def solve_at_risk(problem: Problem, risk: float, solver: str = "auto") -> Solution:
    """Solve a problem whose budgets hold with probability `risk`, and tell the quantiles.

    Score, bound and gap are those of the problem with the constraints of `at_risk`. An infeasible
    answer holds the smallest reachable quantiles.
    """
    asked = at_risk(problem, risk)
    solution = get_solver(solver).solve(asked)
    if solution.infeasibility is not None and asked is not problem:
        solution = replace(solution, infeasibility=_explained(problem, risk))
    return with_quantiles(problem, solution, risk)


def with_quantiles(problem: Problem, solution: Solution, risk: float | None) -> Solution:
    """Return a solution that tells the quantile of each of its costs; None: as it is."""
    if risk is None or solution.allocation is None:
        return solution if risk is None else replace(solution, risk=risk)
    choice = solution.allocation.choice(problem.cells)
    quantiles = {name: quantile(table, choice, risk) for name, table in problem.costs.items()}
    return replace(solution, risk=risk, quantiles=quantiles)


def by_quantiles(problem: Problem, risk: float | None) -> Problem:
    """Return the problem in which each cost counts with its quantile; None: as it is."""
    if risk is None:
        return problem
    tables = problem.costs
    upper = {name: replace(t, values=upper_values(t, risk)) for name, t in tables.items()}
    return replace(problem, costs=upper)


def _explained(problem: Problem, risk: float) -> Infeasibility:
    """Find what can be reached when each cost counts with its quantile."""
    tables, counted_so = problem.costs, by_quantiles(problem, risk)
    upper = counted_so.costs
    reason = explain(counted_so, time_limit_s=_TIME_LIMIT_S)
    nothing = np.zeros(len(problem.cells))
    free = minimise(problem, nothing, problem.budgets, time_limit_s=_TIME_LIMIT_S)
    moved = [n for n in problem.limits() if (upper[n].values > tables[n].values).any()]
    counted = f"{' and '.join(moved)} by the {100 * risk:g} % quantile"
    end = "" if free.choice is None else "; without risk one fits"
    return replace(reason, message=f"at risk {risk:g} ({counted}) {reason.message}{end}")
