"""Solvers "ilp" and "cbc": the additive score, minimised exactly by an integer program."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import numpy as np

from mpq.core.problem import Problem, Solution
from mpq.core.tables import Indices
from solvers.check import finish
from solvers.exact import Minimise, minimise
from solvers.infeasible import explain
from solvers.knapsack import unit_numbers
from solvers.milp import Library

_MANY = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Ilp:
    """Multiple-choice knapsack by PuLP and HiGHS, or CBC.

    OPTIMAL when proven; stopped by `time_limit_s` it is FEASIBLE with its bound and gap, or
    UNKNOWN without an allocation. Deterministic as long as it is not stopped. Between equal
    scores: of all allocations that give each unit the same score as the one found, it returns
    one with the least total of the first budgeted cost; a cell that loses against another of
    its unit in a cost and wins nothing is never taken.
    """

    name: str = "ilp"
    library: Library = "highs"
    time_limit_s: float = 60.0

    def solve(self, problem: Problem) -> Solution:
        """Return the allocation of least additive score that meets every budget."""
        start = time.monotonic()
        minimiser = partial(minimise, library=self.library)
        least = minimiser(
            problem, problem.sensitivity.values, problem.budgets, time_limit_s=self.time_limit_s
        )
        choice, infeasibility = least.choice, None
        if choice is not None:
            left = self.time_limit_s - (time.monotonic() - start)
            choice = cheapest_of_equal_score(problem, choice, minimiser, time_limit_s=left)
        elif least.proven:
            infeasibility = explain(problem, time_limit_s=self.time_limit_s, by=minimiser)
        return finish(
            problem,
            self.name,
            choice,
            proven=least.proven,
            bound=least.bound,
            seconds=time.monotonic() - start,
            infeasibility=infeasibility,
        )


def cheapest_of_equal_score(
    problem: Problem, choice: Indices, minimise: Minimise, *, time_limit_s: float
) -> Indices:
    """Return a choice of the same scores with the least total of the first budgeted cost.

    Of more than 10,000 units the choice is returned as it is.
    """
    if not problem.budgets or len(choice) > _MANY:
        return choice  # already the cheapest of each unit
    score = problem.sensitivity.values
    equal = score == score[choice][unit_numbers(problem.cells)]
    if equal.sum() == len(choice):
        return choice
    cells = problem.cells
    allowed = {
        unit: [scheme for scheme, same in zip(schemes, equal[start:], strict=False) if same]
        for unit, schemes, start in zip(cells.units, cells.schemes, cells.offsets, strict=False)
    }
    smaller = problem.pinned(allowed)
    cost = smaller.costs[problem.budgets[0].cost]
    least = minimise(
        smaller, cost.values, smaller.budgets, time_limit_s=time_limit_s, joint=cost.joint
    )
    return choice if least.choice is None else np.flatnonzero(equal)[least.choice]
