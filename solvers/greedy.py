"""Solver "greedy": one scheme after the other is made cheaper where that loses least."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpq.core.problem import Constraint, Problem, Solution
from mpq.core.tables import Indices
from solvers.check import finish
from solvers.infeasible import explain
from solvers.joint import refuse_joint
from solvers.knapsack import Mask, cheapest, fitting, smallest_total, unit_numbers
from solvers.relaxation import relax

_UNSURE = 1e-9  # of the size of a row: closer to its limit than this, it is summed anew


@dataclass(frozen=True, slots=True, kw_only=True)
class Greedy:
    """The rule of MPTQ-ViT and AIMET (our reading of it), a baseline.

    Every unit starts at its best scheme. Each step gives one unit its next cheaper scheme, the
    one with the most cost saved for the score lost, until every condition is met. Of several
    budgets that are exceeded the cost is the sum of the costs, each relative to its limit, and a
    step must lower the sum of what is exceeded; so it is with constraints and forbidden pairs.
    FEASIBLE, with the linear relaxation as its bound up to `bound_cells` cells; OPTIMAL only
    where the score is that bound or every unit keeps its best scheme; UNKNOWN where no step
    helps though something may fit. Raises InvalidInputError (`joint_costs`) for budgets on costs
    of pairs of cells.
    """

    name: str = "greedy"
    bound_cells: int = 50_000
    time_limit_s: float = 60.0  # for the reasons of an infeasible problem

    def solve(self, problem: Problem) -> Solution:
        """Return where the steps end."""
        start = time.monotonic()
        refuse_joint(problem, "solver 'greedy'")
        values = problem.sensitivity.values
        best = cheapest(problem, values)
        choice, infeasibility = _Steps(problem, best).run(), None
        proven = choice is not None and bool(np.array_equal(values[choice], values[best]))
        bound = -math.inf if proven else self._bound(problem)
        if choice is None and bound == math.inf:
            proven = True
            infeasibility = explain(problem, time_limit_s=self.time_limit_s)
        return finish(
            problem,
            self.name,
            choice,
            proven=proven,
            bound=bound,
            seconds=time.monotonic() - start,
            infeasibility=infeasibility,
        )

    def _bound(self, problem: Problem) -> float:
        """Return what no choice is below, infinite where it is proven that nothing fits."""
        rows, everything = problem.rows(), np.arange(len(problem.cells))
        if any(smallest_total(row) > row.limit for row in rows):
            return math.inf
        if len(everything) > self.bound_cells:
            return -math.inf
        knapsack = fitting(problem, problem.sensitivity.values, rows, everything)
        relaxed = None if knapsack is None else relax(knapsack)
        if knapsack is None or relaxed is None:
            return math.inf
        return knapsack.base + max(0.0, relaxed.bound)


class _Steps:
    """A choice on its way down, by how much it exceeds each row, and the next step of each unit."""

    def __init__(self, problem: Problem, choice: Indices) -> None:
        self.problem, self.choice = problem, choice.copy()
        self.rows = [*problem.rows(), *_apart(problem)]
        self.scores = problem.sensitivity.values
        self.units = unit_numbers(problem.cells)
        self.relative = np.empty((len(self.rows), len(problem.cells)))
        for k, row in enumerate(self.rows):
            self.relative[k] = row.coefficients / _size(row)
        self.over = np.array([self._excess(row) for row in self.rows])
        self.orders: dict[bytes, Indices] = {}

    def run(self) -> Indices | None:
        """Take steps until every row is met; None where no step helps."""
        aimed, exceeded = False, self.over > 0
        for _ in range(10 * len(self.units) + 1):  # no rounding makes it go round in circles
            if not exceeded.any():
                return self.choice if self.problem.meets(self.choice) else None
            if not aimed:
                cheaper = self._cheaper(exceeded)
                self._aim(cheaper[self.choice])
            aimed, unit = True, self._best()
            while unit is None:  # whatever is next costs more elsewhere: look beyond it
                if (self.target < 0).all():
                    return None
                self._aim(np.where(self.target < 0, -1, cheaper[self.target]))
                aimed, unit = False, self._best()
            self._step(unit, cheaper)
            before, exceeded = exceeded, self.over > 0
            aimed &= np.array_equal(before, exceeded)
        return None

    def _best(self) -> int | None:
        """Return the unit whose next step takes off most of the excess for the score it loses."""
        relief = np.zeros(len(self.choice))
        for over, change in zip(self.over, self.change, strict=True):
            relief += max(over, 0.0) - np.maximum(over + change, 0.0)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ratios = np.where(relief > 0, relief / self.lost, 0.0)
        if not ratios.any():
            return None
        return int(np.argmax(ratios))

    def _step(self, unit: int, cheaper: Indices) -> None:
        self.choice[unit] = now = self.target[unit]
        self.over += self.change[:, unit]
        for k in np.flatnonzero(np.abs(self.over) < _UNSURE):
            self.over[k] = self._excess(self.rows[k])
        self.target[unit] = then = cheaper[now]
        self.change[:, unit] = self.relative[:, then] - self.relative[:, now] if then >= 0 else 0.0
        self.lost[unit] = max(self.scores[then] - self.scores[now], 0.0)

    def _aim(self, target: Indices) -> None:
        """Set what each unit may get next, -1 for nothing, and what that changes."""
        self.target = target
        self.change = self.relative[:, target] - self.relative[:, self.choice]
        self.change[:, target < 0] = 0.0
        self.lost = np.maximum(self.scores[target] - self.scores[self.choice], 0.0)

    def _cheaper(self, exceeded: Mask) -> Indices:
        """Return the next cheaper cell of its unit for each cell, -1 for none.

        Of cells that cost the same the one of least score is meant. The cost is that of the
        exceeded rows.
        """
        key = exceeded.tobytes()
        if key not in self.orders:
            costs = self.relative[exceeded].sum(axis=0)
            falling = np.lexsort((self.scores, -costs, self.units))
            first = np.diff(self.units[falling], prepend=-1) != 0  # of its unit
            fresh = first | (np.diff(costs[falling], prepend=np.inf) != 0)  # of its cost
            run = np.cumsum(fresh)  # the number of the run of equal costs that comes next
            following = np.append(falling[fresh], -1)[run]
            following[np.append(first[fresh], True)[run]] = -1
            self.orders[key] = np.empty_like(falling)
            self.orders[key][falling] = following
        return self.orders[key]

    def _excess(self, row: Constraint) -> float:
        return (row.total(self.choice) - row.limit) / _size(row)


def _size(row: Constraint) -> float:
    """Return what an excess is measured by: the limit, or the largest number where that is 0."""
    largest = max(abs(row.fixed), float(np.abs(row.coefficients).max(initial=0.0)))
    return abs(row.limit) if abs(row.limit) > 1e-9 * largest else largest or 1.0


def _apart(problem: Problem) -> Sequence[Constraint]:
    """Return each forbidden pair as a row."""
    return [
        Constraint.from_cells("pair", problem.cells, dict.fromkeys(pair, 1.0), 1.0)
        for pair in problem.forbidden
    ]
