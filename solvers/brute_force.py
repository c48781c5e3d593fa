"""Solver "brute_force": every choice is tried."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mpq.core.errors import InvalidInputError
from mpq.core.joint import JointCosts, joined_sum
from mpq.core.problem import Budget, Problem, Solution
from mpq.core.tables import Cells, Floats, Indices
from solvers.check import finish
from solvers.exact import Least
from solvers.infeasible import explain
from solvers.knapsack import Mask

_BLOCK = 2**19  # choices that are held at once


@dataclass(frozen=True, slots=True, kw_only=True)
class BruteForce:
    """The least additive score of all choices, up to `max_choices` of them.

    Always a proof: OPTIMAL, or INFEASIBLE with the reason. Between equal scores it takes the
    least total of the first budgeted cost, then the choice that is first as the schemes are
    listed. Memory does not grow with the number of choices.
    Raises InvalidInputError (`too_many_choices`) where there are more.
    """

    name: str = "brute_force"
    max_choices: int = 100_000_000

    def solve(self, problem: Problem) -> Solution:
        """Return the best allocation of all that meet every condition."""
        start = time.monotonic()
        self._refuse_many(problem.cells)
        values = problem.sensitivity.values
        least = try_everything(problem, values, problem.budgets, time_limit_s=math.inf)
        infeasibility = None
        if least.choice is None:
            infeasibility = explain(problem, time_limit_s=math.inf, by=try_everything)
        return finish(
            problem,
            self.name,
            least.choice,
            proven=True,
            seconds=time.monotonic() - start,
            infeasibility=infeasibility,
        )

    def _refuse_many(self, cells: Cells) -> None:
        choices = math.prod(map(len, cells.schemes))
        if choices > self.max_choices:
            number = f"{choices:,}" if choices < 1e15 else f"10^{math.log10(choices):.0f}"
            raise InvalidInputError(
                "too_many_choices",
                f"solver 'brute_force' would have to try {number} choices, which is more than "
                f"{self.max_choices:,}: pin units, offer fewer schemes, or use solver 'ilp'",
            )


def try_everything(
    problem: Problem,
    values: Floats,
    budgets: Sequence[Budget],
    *,
    time_limit_s: float,
    joint: JointCosts | None = None,
) -> Least:
    """Minimise sum_u values[a(u)] over one cell per unit under `budgets` (see `Minimise`).

    The choices of the first units and those of the others are listed; of every pair of lists
    sums are compared as they are when each is rounded once. It takes its time.
    """
    asked = problem.with_budgets(budgets)
    halves = _Halves(asked.cells)
    worth_of = halves.sums(values, joint)
    rows = [(row, halves.sums(row.coefficients, row.joint)) for row in asked.rows()]
    first = [asked.costs[budget.cost] for budget in budgets[:1]]
    ties = [halves.sums(table.values, table.joint) for table in first]
    best: tuple[float, ...] = (math.inf,)
    choice: Indices | None = None
    for heads in halves.blocks():
        worth = worth_of.of(heads)
        near = np.flatnonzero(worth <= best[0])
        for row, sums in rows:
            near = near[row.fixed + sums.of(heads, near) <= row.limit]
        for pair in asked.forbidden_cells():
            near = near[~np.logical_and(*(halves.takes(cell, heads, near) for cell in pair))]
        while len(near):
            least, key = near[worth[near] == worth[near].min()], [worth[near].min()]
            for sums in ties:
                totals = sums.of(heads, least)
                least, key = least[totals == totals.min()], [*key, totals.min()]
            if tuple(key) >= best:
                break
            taken = halves.choice(heads, least[0])
            if asked.meets(taken):
                best, choice = tuple(key), taken
                break
            near = near[near != least[0]]  # a sum next to the middle of two doubles, very seldom
    if choice is None:
        return Least(choice=None, bound=math.inf, proven=True)
    return Least(choice=choice, bound=joined_sum(values[choice], joint, choice), proven=True)


@dataclass(frozen=True, slots=True)
class _Sums:
    """The sums of one value over both lists, each as its double and what that leaves."""

    head: Floats  # (choices of the first units, 2)
    tail: Floats  # (choices of the other units, 2)
    halves: _Halves
    joint: JointCosts | None

    def of(self, heads: slice, places: Indices | None = None) -> Floats:
        """Return the sums of a block of choices, or of some places in it, rounded once."""
        if places is None:
            one, other = self.head[heads][:, None], self.tail[None]
        else:
            number, rest = np.divmod(places, len(self.tail))
            one, other = self.head[heads][number], self.tail[rest]
        total, lost = _plus(one[..., 0], other[..., 0])
        lost = lost + one[..., 1] + other[..., 1]
        if self.joint:
            total, lost = total.ravel(), lost.ravel()
            everywhere = np.arange(len(total)) if places is None else places
            for taken, value in self.halves.pairs(self.joint, heads, everywhere):
                total, rest = _plus(total, np.where(taken, value, 0.0))
                lost = lost + rest
        exact: Floats = total + lost
        return exact.ravel()


class _Halves:
    """All choices of the first units and all of the others, of about the same number."""

    def __init__(self, cells: Cells) -> None:
        sizes, parts = np.diff(cells.offsets), cells.offsets.tolist()
        ranges = [range(a, b) for a, b in itertools.pairwise(parts)]
        logs = np.cumsum(np.log(np.maximum(1, sizes)))
        self.middle = int(np.searchsorted(logs, logs[-1:].sum() / 2 * (1 + 1e-9)))
        self.head = _listed(ranges[: self.middle])
        self.tail = _listed(ranges[self.middle :])

    def sums(self, values: Floats, joint: JointCosts | None) -> _Sums:
        return _Sums(_exact_sums(values[self.head]), _exact_sums(values[self.tail]), self, joint)

    def pairs(
        self, joint: JointCosts, heads: slice, places: Indices
    ) -> Iterator[tuple[Mask, float]]:
        """Yield where in a block each pair of cells is taken, and its value."""
        for pair in zip(joint.first, joint.second, joint.values, strict=True):
            yield np.logical_and(*(self.takes(c, heads, places) for c in pair[:2])), pair[2]

    def blocks(self) -> Iterator[slice]:
        step = max(1, _BLOCK // len(self.tail))
        for start in range(0, len(self.head), step):
            yield slice(start, start + step)

    def takes(self, cell: int, heads: slice, places: Indices) -> Mask:
        """Tell at which places of a block a cell is taken."""
        number, rest = np.divmod(places, len(self.tail))
        in_head = (self.head == cell).any(axis=1)[heads]
        in_tail = (self.tail == cell).any(axis=1)
        taken: Mask = in_head[number] | in_tail[rest]
        return taken

    def choice(self, heads: slice, place: int) -> Indices:
        number, rest = divmod(int(place), len(self.tail))
        return np.concatenate([self.head[heads][number], self.tail[rest]])


def _plus(one: Floats, other: Floats) -> tuple[Floats, Floats]:
    """Return the rounded sum and what it leaves of the exact one (Knuth)."""
    total = one + other
    back = total - one
    return total, (one - (total - back)) + (other - back)


def _listed(ranges: Sequence[range]) -> Indices:
    grids = np.meshgrid(*ranges, indexing="ij") if ranges else [np.zeros(1, np.int64)]
    width = len(ranges)
    return np.stack(grids, axis=-1).reshape(-1, width or 1)[:, :width].astype(np.int64)


def _exact_sums(table: Floats) -> Floats:
    """Return the sum of each row as its double and what that leaves of it."""
    sums = []
    for row in table.tolist():
        total = math.fsum(row)
        sums.append((total, math.fsum([*row, -total])))
    return np.array(sums)
