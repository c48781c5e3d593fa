"""Allocations that a search by measurements begins with: what the tables say is good."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from mpq.core.problem import Budget, Problem
from mpq.core.tables import Indices
from solvers.exact import minimise
from solvers.pairs import Pairs

_PROGRAM_S = 10.0  # what an integer program may take


def starts(problem: Problem, additive: Indices, points: int = 0) -> Mapping[str, Indices]:
    """Return different choices that meet the problem, by where they are from, the best first.

    The additive optimum, the best with pairs where the problem has responses, the uniform
    schemes that fit, and up to `points` optima of the exact additive frontier between the
    additive optimum and the least total of the first budgeted cost.
    """
    named: dict[str, Indices] = {}
    for name, choice in _proposed(problem, additive, points):
        if not any(np.array_equal(choice, known) for known in named.values()):
            named[name] = choice
    return named


def _proposed(problem: Problem, additive: Indices, points: int) -> Iterator[tuple[str, Indices]]:
    yield "additive optimum", additive
    if problem.responses is not None:
        allocation = Pairs(prove=False, time_limit_s=_PROGRAM_S).solve(problem).allocation
        if allocation is not None:
            yield "optimum with pairs", allocation.choice(problem.cells)
    uniform = {str(s): a.choice(problem.cells) for s, a in problem.uniform().items()}
    for name, choice in sorted(uniform.items(), key=lambda item: problem.score(item[1])):
        if problem.meets(choice):
            yield f"uniform {name}", choice
    if points and problem.budgets:
        yield from _frontier(problem, additive, problem.budgets[0].cost, points)


def _frontier(
    problem: Problem, additive: Indices, cost: str, points: int
) -> Iterator[tuple[str, Indices]]:
    """Yield the additive optimum at each of evenly spaced limits, from the largest down."""
    table, kept = problem.costs[cost], problem.budgets
    least = minimise(problem, table.values, kept, time_limit_s=_PROGRAM_S, joint=table.joint)
    if least.choice is None:
        return
    high, low = problem.total(cost, additive), problem.total(cost, least.choice)
    for limit in np.linspace(high, low, points + 1)[1:].tolist():
        budget = Budget(cost, max(limit, low, math.ulp(0.0)))
        optimum = minimise(
            problem,
            problem.sensitivity.values,
            (budget, *problem.budgets),
            time_limit_s=_PROGRAM_S,
        )
        if optimum.choice is not None:
            yield f"optimum at {cost} <= {limit:g}", optimum.choice
