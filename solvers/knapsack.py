"""The multiple-choice knapsack in plain arrays, and the cells that no best choice needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mpq.core.joint import JointCosts
from mpq.core.problem import Constraint, Problem
from mpq.core.sums import exact_sum
from mpq.core.tables import Cells, Floats, Indices
from solvers.joint import OBJECTIVE, Linked, Terms

Mask = npt.NDArray[np.bool_]
_TINY = 1e-290


@dataclass(frozen=True, slots=True, kw_only=True)
class Knapsack:
    """Entry i is cell `cells[i]` of unit `units[i]`; entries of a unit stand together.

    `objective[i]` and `weights[k, i]` are what the cell takes above the least of its unit, so
    both are >= 0: a choice is worth `base + sum objective` and fits if `sum weights <= slack`.
    `slack` is generous by a few rounding errors; whoever answers checks the real budgets.
    With `terms` of pairs of entries `slack` and `base` hold the most that these can save: they
    are still bounds, and what is not saved is above them.
    """

    cells: Indices
    units: Indices
    starts: Indices
    objective: Floats
    weights: Floats
    slack: Floats
    base: float
    terms: Terms | None = None

    @classmethod
    def of(
        cls,
        cells: Cells,
        values: Floats,
        rows: Sequence[Constraint],
        kept: Indices,
        joint: JointCosts | None = None,
    ) -> Knapsack:
        """Build the knapsack over the `kept` cells (ascending, at least one of each unit).

        `joint` belongs to the `values`.
        """
        whole = len(kept) == len(cells)  # eight million cells are not copied without need
        units = unit_numbers(cells)
        if not whole:
            units = np.cumsum(np.diff(units[kept], prepend=units[kept[:1]]) > 0, dtype=np.int64)
        starts = cells.offsets if whole else starts_of(units)
        least, objective = _above_least(values if whole else values[kept], starts, units)
        weights, slack = np.empty((len(rows), len(kept))), np.empty(len(rows))
        terms = Terms.of(rows, joint, cells, kept)
        for k, row in enumerate(rows):
            coefficients = row.coefficients if whole else row.coefficients[kept]
            floor, weights[k] = _above_least(coefficients, starts, units)
            granted = 0.0 if terms is None else float(terms.granted[k])
            room = math.fsum([row.limit, -row.fixed, -exact_sum(floor), granted])
            size = max(abs(row.limit), abs(row.fixed), float(np.abs(coefficients).max(initial=0)))
            size = max(size, granted)
            slack[k] = room + 4 * np.spacing(max(size, _TINY))
        return cls(
            cells=kept,
            units=units,
            starts=starts,
            objective=objective,
            weights=weights,
            slack=slack,
            base=exact_sum(least if terms is None else np.append(least, -terms.granted[-1])),
            terms=terms,
        )

    def linked(self) -> Linked | None:
        """Return the linear form of the terms, None where there are none."""
        return None if self.terms is None else self.terms.linked(self.units, self.slack)

    @property
    def largest(self) -> float:
        """The largest number in the objective, 1 where all are zero."""
        own = float(self.objective.max(initial=0.0))
        if self.terms is not None:
            of_objective = self.terms.values[self.terms.rows == OBJECTIVE]
            own = max(own, float(np.abs(of_objective).max(initial=0.0)))
        return own or 1.0

    def undominated(self, rank: Indices, exposed: Indices) -> Mask:
        """Mark the entries that no other entry of their unit dominates.

        One entry dominates another if it is nowhere worse and somewhere better; between equals
        the lower `rank` of the cell counts as better. `exposed` cells dominate none: another
        condition may rule them out. Entries are compared that have the same terms.
        """
        safe = ~np.isin(self.cells, exposed)
        kinds = None if self.terms is None else self.terms.kinds(len(self.cells))
        keep = np.ones(len(self.cells), np.bool_)
        sizes = np.diff(self.starts)
        for size in np.unique(sizes):
            entries = self.starts[:-1][sizes == size][:, None] + np.arange(size)
            ranks = rank[self.cells[entries]]
            better = ranks[:, :, None] < ranks[:, None, :]
            dominates = safe[entries][:, :, None]
            if kinds is not None:
                dominates = dominates & (kinds[entries][:, :, None] == kinds[entries][:, None, :])
            nowhere_worse = np.ones_like(better)
            for row in (self.objective, *self.weights):
                mine, other = row[entries][:, :, None], row[entries][:, None, :]
                nowhere_worse &= mine <= other
                better |= mine < other
            keep[entries] = ~(nowhere_worse & better & dominates).any(axis=1)
        return keep

    def split(self) -> tuple[Knapsack, Indices]:
        """Return the knapsack of the units that have a choice, and the cells of the others.

        With terms it is the whole one, unless no unit has a choice.
        """
        free = np.diff(self.starts)[self.units] > 1
        if self.terms is not None and free.any():
            return self, np.empty(0, np.int64)
        owners = self.units[free]
        units = np.cumsum(np.diff(owners, prepend=owners[:1]) > 0, dtype=np.int64)
        smaller = Knapsack(
            cells=self.cells[free],
            units=units,
            starts=starts_of(units),
            objective=self.objective[free],
            weights=self.weights[:, free],
            slack=self.slack,
            base=self.base,
        )
        return smaller, self.cells[~free]


def fitting(
    problem: Problem,
    values: Floats,
    rows: Sequence[Constraint],
    kept: Indices,
    joint: JointCosts | None = None,
) -> Knapsack | None:
    """Return the knapsack of those of the `kept` cells that fit beside the least of all others.

    No weight in it exceeds its slack, and no cell in it is forbidden beside one that is the last
    of its unit. None where some unit has no such cell: nothing fits.
    """
    forbidden = problem.forbidden_cells()
    while True:
        knapsack = Knapsack.of(problem.cells, values, rows, kept, joint)
        fits = np.all(knapsack.weights <= knapsack.slack[:, None], axis=0)
        if forbidden:
            fits &= ~np.isin(knapsack.cells, _ruled_out(knapsack, forbidden))
        if (knapsack.slack < 0).any():
            return None
        if fits.all():
            return knapsack
        if not np.bincount(knapsack.units[fits], minlength=len(problem.cells.units)).all():
            return None
        kept = kept[fits]


def with_terms(problem: Problem, relaxed: Knapsack) -> Knapsack:
    """Return a knapsack of relaxed rows with the problem's own rows, where they differ."""
    rows = problem.rows()
    if not any(row.joint for row in rows):
        return relaxed
    own = Knapsack.of(problem.cells, np.zeros(len(problem.cells)), rows, relaxed.cells)
    return replace(own, objective=relaxed.objective, base=relaxed.base)


def _ruled_out(knapsack: Knapsack, forbidden: Sequence[tuple[int, int]]) -> list[int]:
    """Return the cells that are forbidden beside one which its unit has to take."""
    alone = np.diff(knapsack.starts)[knapsack.units] == 1
    settled = set(knapsack.cells[alone].tolist())
    pairs = [*forbidden, *((other, one) for one, other in forbidden)]
    return [other for one, other in pairs if one in settled]


def starts_of(units: Indices) -> Indices:
    """Return where each unit begins, and the end, for the ascending unit of each entry."""
    return np.flatnonzero(np.diff(units, prepend=-1, append=units.max(initial=-1) + 1))


def _above_least(values: Floats, starts: Indices, units: Indices) -> tuple[Floats, Floats]:
    if not len(values):
        return values, values
    least = np.minimum.reduceat(values, starts[:-1])
    return least, values - least[units]


def unit_numbers(cells: Cells) -> Indices:
    """Return the number of the unit of each cell."""
    return np.repeat(np.arange(len(cells.units)), np.diff(cells.offsets))


def preference(problem: Problem) -> Indices:
    """Return the rank of each cell among equally good ones: cheaper first, then as listed.

    Cheaper in the first budgeted cost, then in the further budgeted ones, then in all others.
    """
    keys = [np.arange(len(problem.cells)), *(_preferred(problem)[::-1])]
    rank = np.empty(len(problem.cells), np.int64)
    rank[np.lexsort(keys)] = np.arange(len(rank))
    return rank


def smallest_total(row: Constraint) -> float:
    """Return the least that any choice comes to, or less where there are joint terms."""
    begins = row.cells.offsets[:-1]
    if not len(begins):
        return row.fixed
    least = np.minimum.reduceat(row.coefficients, begins)
    if row.joint:
        least = np.r_[least, np.minimum(row.joint.values, 0.0)]
    return row.fixed + exact_sum(least)


def cheapest(problem: Problem, values: Floats) -> Indices:
    """Return the cell of least value of each unit, the preferred one among equals."""
    begins = problem.cells.offsets[:-1]
    if not len(begins):
        return np.empty(0, np.int64)
    sizes = np.diff(problem.cells.offsets)
    tied = np.ones(len(values), np.bool_)
    for row in (values, *_preferred(problem)):
        left = np.where(tied, row, np.inf)
        tied &= left == np.repeat(np.minimum.reduceat(left, begins), sizes)
        if np.count_nonzero(tied) == len(begins):
            return np.flatnonzero(tied)
    cells = np.flatnonzero(tied)
    return cells[np.searchsorted(cells, begins)]


def _preferred(problem: Problem) -> list[Floats]:
    order = dict.fromkeys([*(budget.cost for budget in problem.budgets), *problem.costs])
    return [problem.costs[cost].values for cost in order]
