"""Solver "auto": the additive score, minimised to a proven gap in milliseconds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import numpy as np

from mpq.core.problem import Problem, Solution
from mpq.core.tables import Indices
from solvers.check import finish
from solvers.exact import Minimise, minimise
from solvers.ilp import cheapest_of_equal_score
from solvers.infeasible import explain
from solvers.knapsack import Mask, cheapest, unit_numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Auto:
    """Multiple-choice knapsack by Lagrangian dual and exact search of the core that it leaves.

    OPTIMAL when proven; otherwise FEASIBLE with its bound, within `gap` of it unless stopped by
    `time_limit_s`. With a proven gap of at most `gap`, the search for a proof that nothing is
    better ends after `effort` branches; `gap` 0 always asks for it. Deterministic as long as it
    is not stopped. Between equal scores it chooses as solver "ilp" does, up to 10,000 units. Up to
    `few_cells` cells are left to the integer program at once: loading the compiled search takes
    longer than that.
    """

    name: str = "auto"
    gap: float = 1e-4
    effort: int = 10
    time_limit_s: float = 60.0
    few_cells: int = 2_000

    def solve(self, problem: Problem) -> Solution:
        """Return the allocation of least additive score that meets every budget."""
        start = time.monotonic()
        first, minimiser = self._minimisers(problem)
        least = first(
            problem, problem.sensitivity.values, problem.budgets, time_limit_s=self.time_limit_s
        )
        choice, infeasibility = least.choice, None
        if choice is not None:
            choice = _undominated(problem, choice)
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

    def _minimisers(self, problem: Problem) -> tuple[Minimise, Minimise]:
        """Return what finds the choice, and what answers the questions after it, to the end."""
        if len(problem.cells) <= self.few_cells:
            return minimise, minimise
        from solvers.quick import minimise_quickly

        return partial(minimise_quickly, gap=self.gap, effort=self.effort), minimise_quickly


def _undominated(problem: Problem, choice: Indices) -> Indices:
    """Return the choice with every cell replaced that another one of its unit dominates."""
    sizes = np.diff(problem.cells.offsets)
    values = problem.sensitivity.values
    as_good = values <= np.repeat(values[choice], sizes)
    for row in problem.rows():
        coefficients = row.coefficients
        as_good &= coefficients <= np.repeat(coefficients[choice], sizes)
    as_good[[cell for pair in problem.forbidden_cells() for cell in pair]] = False
    as_good &= ~_joined(problem)
    as_good[choice] = True
    return cheapest(problem, np.where(as_good, values, np.inf))


def _joined(problem: Problem) -> Mask:
    """Mark the cells of all units of which a cell has a joint cost that is limited."""
    owners = unit_numbers(problem.cells)
    units = np.zeros(len(problem.cells.units), np.bool_)
    for row in problem.rows():
        if row.joint:
            units[owners[row.joint.first]] = units[owners[row.joint.second]] = True
    return units[owners]
