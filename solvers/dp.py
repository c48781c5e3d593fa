"""Solver "dp": layer by layer, all sums of cost and score that no other sum dominates."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np

from mpq.core.errors import InvalidInputError, unknown
from mpq.core.problem import Constraint, Problem, Solution
from mpq.core.tables import Floats, Indices
from solvers.check import finish
from solvers.dominance import undominated
from solvers.infeasible import explain
from solvers.joint import refuse_joint
from solvers.knapsack import cheapest, fitting, smallest_total
from solvers.partial_sums import Choices, Cut, undominated_choices
from solvers.relaxation import relax
from solvers.rounding import round_to_fit

MAX_STATES = 300_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Dp:
    """The dynamic program of HAWQ-V2 and ZeroQ (our reading of it), exact.

    Unit after unit it keeps the partial sums of (cost, score) that no other one dominates; with
    several budgets a sum has a cost for each. Sums that cannot end within the limits are
    dropped, and those that cannot beat a known choice at the prices of the linear relaxation.
    OPTIMAL, or INFEASIBLE with its reason.
    Raises InvalidInputError (`too_many_states`) where more than `max_states` sums are left, and
    (`forbidden_pairs`, `joint_costs`) for a problem with forbidden pairs or with limits on costs
    of pairs: a sum does not tell of which cells.
    """

    name: str = "dp"
    max_states: int = MAX_STATES
    time_limit_s: float = 60.0  # for the reasons of an infeasible problem

    def solve(self, problem: Problem) -> Solution:
        """Return the allocation of least additive score that meets every budget."""
        start = time.monotonic()
        _refuse_forbidden(problem)
        refuse_joint(problem, "solver 'dp'")
        choice, infeasibility = _best(problem, self.max_states), None
        if choice is None:
            infeasibility = explain(problem, time_limit_s=self.time_limit_s)
        return finish(
            problem,
            self.name,
            choice,
            proven=True,
            seconds=time.monotonic() - start,
            infeasibility=infeasibility,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pareto:
    """The points (cost, score) that no choice dominates, in ascending order of cost.

    `num_states` is how many partial sums were kept before each unit.
    """

    costs: Floats
    scores: Floats
    num_states: tuple[int, ...]
    found: Choices
    numbers: Indices

    def choices(self, points: Indices | slice = slice(None)) -> Indices:
        """Return the choices of cells (points, units) at some of the points, by default all."""
        return self.found.cells_of(self.numbers[points])


def pareto(
    problem: Problem, cost: str, *, max_states: int = MAX_STATES, most_score: float = math.inf
) -> Pareto:
    """Find all points (total of `cost`, score) of choices that no other choice dominates.

    Of the choices that meet every budget, one of `cost` itself included, and every constraint.
    A condition on anything else that some choice breaks makes each sum one number longer, and
    the sums many more. Points of a score above `most_score` are left out. Of choices at the same
    point one is kept; there are no points where nothing fits. Costs and scores are
    `Problem.total` and `Problem.score` of the choices.
    Raises InvalidInputError for an unknown cost, and as solver "dp" does.
    """
    if cost not in problem.costs:
        raise unknown("cost", cost, problem.costs)
    _refuse_forbidden(problem)
    refuse_joint(problem, "the complete frontier, by solver 'dp',", [cost])
    table = problem.costs[cost]
    tracked = _Tracked.of(problem, table.values)
    cuts = tracked.cuts()
    if most_score < math.inf:
        cuts.append(Cut(weights=tracked.unit_vector(-1), most=most_score))
    found = undominated_choices(problem.cells, tracked.values, cuts, max_states)
    numbers = tracked.fitting(found)
    numbers = numbers[found.totals[-1, numbers] <= most_score]
    points = np.array([table.fixed + found.totals[0, numbers], found.totals[-1, numbers]])
    kept = undominated(points.astype(np.complex128))
    return Pareto(
        costs=points[0, kept],
        scores=points[1, kept],
        num_states=found.num_sums,
        found=found,
        numbers=numbers[kept],
    )


def _best(problem: Problem, max_states: int) -> Indices | None:
    values = problem.sensitivity.values
    free = cheapest(problem, values)
    if problem.meets(free):
        return free
    tracked = _Tracked.of(problem)
    if any(smallest_total(row) > row.limit for row in tracked.rows):
        return None
    knapsack = fitting(problem, values, tracked.rows, np.arange(len(problem.cells)))
    relaxed = None if knapsack is None else relax(knapsack)
    if knapsack is None or relaxed is None:
        return None
    cuts, known = tracked.cuts(), round_to_fit(knapsack, relaxed)
    if known is not None and problem.meets(knapsack.cells[known]):
        cuts.append(tracked.priced(relaxed.prices, problem.score(knapsack.cells[known])))
    found = undominated_choices(problem.cells, tracked.values, cuts, max_states)
    numbers = tracked.fitting(found)
    if not len(numbers):
        return None
    best = int(np.argmin(found.totals[-1, numbers]))
    choice: Indices = found.cells_of(numbers[best : best + 1])[0]
    return choice


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tracked:
    """The values that are summed, the score last, and the rows that limit them.

    Row r is a limit of value `numbers[r]`. Rows that no choice breaks are left out.
    """

    values: Floats
    rows: tuple[Constraint, ...]
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, problem: Problem, *first: Floats) -> _Tracked:
        values, numbers = list(first), []
        rows = [row for row in problem.rows() if _largest_total(row) > row.limit]
        for row in rows:
            same = (k for k, value in enumerate(values) if np.array_equal(value, row.coefficients))
            numbers.append(next(same, len(values)))
            if numbers[-1] == len(values):
                values.append(row.coefficients)
        values.append(problem.sensitivity.values)
        return cls(values=np.array(values), rows=tuple(rows), numbers=tuple(numbers))

    def unit_vector(self, number: int) -> Floats:
        vector = np.zeros(len(self.values))
        vector[number] = 1.0
        return vector

    def cuts(self) -> list[Cut]:
        return [
            Cut(weights=self.unit_vector(k), most=row.limit - row.fixed)
            for k, row in zip(self.numbers, self.rows, strict=True)
        ]

    def priced(self, prices: Floats, score: float) -> Cut:
        """Return what every choice of at most that score is within, whatever the prices."""
        weights, most = self.unit_vector(-1), score
        for k, row, price in zip(self.numbers, self.rows, prices.tolist(), strict=True):
            weights[k] += price
            most += price * (row.limit - row.fixed)
        return Cut(weights=weights, most=most)

    def fitting(self, found: Choices) -> Indices:
        """Return the numbers of the choices that meet every row."""
        fits = np.ones(found.totals.shape[1], np.bool_)
        for k, row in zip(self.numbers, self.rows, strict=True):
            fits &= row.fixed + found.totals[k] <= row.limit
        return np.flatnonzero(fits)


def _largest_total(row: Constraint) -> float:
    begins = row.cells.offsets[:-1]
    if not len(begins):
        return row.fixed
    return row.fixed + math.fsum(np.maximum.reduceat(row.coefficients, begins))


def _refuse_forbidden(problem: Problem) -> None:
    if problem.forbidden:
        raise InvalidInputError(
            "forbidden_pairs",
            f"solver 'dp' keeps sums and not choices, so it cannot tell which ones hold one of "
            f"the {len(problem.forbidden)} forbidden pairs: use solver 'auto' or 'ilp'",
        )
