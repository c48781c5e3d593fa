"""Least total of one value per cell under budgets, to a proven gap, in milliseconds."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mpq.core.joint import JointCosts
from mpq.core.problem import Budget, Constraint, Problem
from mpq.core.sums import exact_sum
from mpq.core.tables import Floats, Indices
from solvers.branches import Best, Branches
from solvers.core import Core, Limits
from solvers.descent import descend, repair
from solvers.exact import Least, minimise
from solvers.knapsack import Knapsack, cheapest, fitting, smallest_total
from solvers.lagrange import Dual, maximise_dual
from solvers.search import nearest

_FIRST = 24  # entries beyond one per unit in the first core
_FIRST_NODES = 30  # before a first choice is improved by hand
_MOST_NODES = 2000  # some seconds
_MAX_ENTRIES = 4000  # of a core, beyond one per unit
_REPAIRABLE = 100_000  # entries from which on changing units one by one takes too long
_REPAIRS = 20
MOST_ROWS = 8  # conditions; the ellipsoid shrinks ever more slowly with their number


def minimise_quickly(
    problem: Problem,
    values: Floats,
    budgets: Sequence[Budget],
    *,
    time_limit_s: float,
    joint: JointCosts | None = None,
    gap: float = 0.0,
    effort: int = 0,
    known: Indices | None = None,
) -> Least:
    """Minimise sum_u values[a(u)] over one cell per unit under `budgets`.

    The dual prices the budgets and leaves few units open. Below one threshold after the other
    the core that it leaves is searched, which raises the bound to the threshold or finds the
    best choice. Once bound and choice are within `gap` of the total, a search of more than
    `effort` nodes is given up. Where that does not get there in some seconds, an integer
    program decides about what the dual leaves open; it decides alone where the best choice
    takes a forbidden pair, there are very many conditions, or joint terms in any of them.
    """
    deadline = time.monotonic() + time_limit_s
    asked = replace(problem, budgets=tuple(budgets), forbidden=())
    rows = asked.rows()
    if len(rows) > MOST_ROWS or joint or any(row.joint for row in rows):
        return minimise(problem, values, budgets, time_limit_s=time_limit_s, joint=joint, gap=gap)
    least = _Search(asked, values, rows, deadline, gap).run(effort, known)
    if least.choice is None or problem.allows(least.choice):
        return least
    left = deadline - time.monotonic()
    allowed = minimise(problem, values, budgets, time_limit_s=left, gap=gap)
    return allowed if allowed.proven else replace(allowed, bound=max(allowed.bound, least.bound))


class _Search:
    def __init__(
        self,
        problem: Problem,
        values: Floats,
        rows: tuple[Constraint, ...],
        deadline: float,
        gap: float,
    ) -> None:
        self.problem, self.values, self.rows = problem, values, rows
        self.deadline, self.gap = deadline, gap
        self.best = Best(values=values, rows=rows)
        self.lower = -math.inf

    def run(self, effort: int, known: Indices | None) -> Least:
        for row in self.rows:
            if smallest_total(row) > row.limit:
                return Least(choice=None, bound=math.inf, proven=True)
        free = cheapest(self.problem, self.values)
        if self.best.fits(free):
            return Least(choice=free, bound=exact_sum(self.values[free]), proven=True)
        everything = np.arange(len(self.problem.cells))
        knapsack = fitting(self.problem, self.values, self.rows, everything)
        if knapsack is None:
            return Least(choice=None, bound=math.inf, proven=True)
        rows = np.flatnonzero(knapsack.weights.any(axis=1))
        limits = self._limits(knapsack, rows)
        if len(rows) < len(knapsack.slack):
            knapsack = replace(knapsack, weights=knapsack.weights[rows], slack=knapsack.slack[rows])
        if not len(rows):  # whatever is left fits
            order = np.lexsort((knapsack.objective, knapsack.units))
            self.best.offer(knapsack, order[knapsack.starts[:-1]])
            return self._answer(proven=True)
        dual = maximise_dual(knapsack)
        if dual is None:
            return Least(choice=None, bound=math.inf, proven=True)
        self.lower = knapsack.base + max(0.0, dual.bound)
        if known is not None:
            self.best.offer(knapsack, np.searchsorted(knapsack.cells, known))
        if len(knapsack.cells) <= _REPAIRABLE:
            self.best.offer(knapsack, repair(knapsack, dual.least, steps=_REPAIRS))
        for most_nodes in (_FIRST_NODES, _MOST_NODES):
            if self._deepen(knapsack, limits, dual, effort, most_nodes):
                return self._answer(proven=True)
            if self.best.choice is not None and time.monotonic() > self.deadline:
                return self._answer(proven=False)
            if not self._close() and len(knapsack.cells) <= _REPAIRABLE:
                self._polish(knapsack, dual)
            if self._close():
                return self._answer(proven=False)
        return self._program(knapsack, dual)

    def _polish(self, knapsack: Knapsack, dual: Dual) -> None:
        """Improve a choice that fits by single changes and swaps."""
        start = dual.least
        if self.best.choice is not None:
            start = np.searchsorted(knapsack.cells, self.best.choice)
        fitting_choice = repair(knapsack, start)
        if fitting_choice is not None:
            self.best.offer(knapsack, descend(knapsack, fitting_choice, prices=dual.prices))

    def _limits(self, knapsack: Knapsack, numbers: Indices) -> Limits:
        rows = [self.rows[k] for k in numbers]
        costs = np.array([row.coefficients[knapsack.cells] for row in rows])
        limits, fixed = (np.array([getattr(r, n) for r in rows]) for n in ("limit", "fixed"))
        sizes = np.maximum(np.maximum(np.abs(limits), np.abs(fixed)), 1e-290)
        if len(rows):
            sizes = np.maximum(sizes, np.abs(costs).max(axis=1))
        return Limits(costs=costs, fixed=fixed, limits=limits, sizes=sizes)

    def _deepen(
        self, knapsack: Knapsack, limits: Limits, dual: Dual, effort: int, most_nodes: int
    ) -> bool:
        """Search deeper and deeper; tell whether the best choice, or that none fits, is proven."""
        units, whole = len(knapsack.starts) - 1, Core.whole(knapsack, limits)
        most = float(np.maximum.reduceat(knapsack.objective, knapsack.starts[:-1]).sum())
        depth = nearest(dual.reduced, dual.least, np.full(_FIRST, np.inf)) or most or 1.0
        depth = max(depth, 1e-12 * abs(dual.bound))
        while time.monotonic() < self.deadline:
            threshold = dual.bound + depth
            if dual.bound + 1.5 * depth >= self.best.worth:
                threshold = self.best.worth
            elif threshold > most:
                threshold = math.inf
            if np.count_nonzero(dual.reduced < threshold - dual.bound) > units + _MAX_ENTRIES:
                return False
            branches = Branches(
                best=self.best,
                knapsack=knapsack,
                limits=limits,
                threshold=threshold,
                worth=max(threshold, dual.bound + 16 * depth),
                most_nodes=effort if self._close() else most_nodes,
                deadline=self.deadline,
            )
            if not branches.complete(whole, dual):
                return False
            self.lower = max(self.lower, knapsack.base + min(threshold, self.best.worth))
            if self.best.worth <= threshold or math.isinf(threshold):
                return True
            depth *= 2.0 if branches.nodes < 2 else 1.3
        return False

    def _program(self, knapsack: Knapsack, dual: Dual) -> Least:
        """Let an integer program decide about the entries that are not ruled out."""
        among = knapsack.cells
        if self.best.choice is not None:
            near = dual.reduced <= (self.best.worth - dual.bound) * (1 + 1e-9)
            among = np.union1d(among[near], self.best.choice)
        least = minimise(
            self.problem,
            self.values,
            self.problem.budgets,
            time_limit_s=self.deadline - time.monotonic(),
            among=among,
            known=self.best.choice,
            gap=self.gap,
        )
        return least if least.proven else replace(least, bound=max(least.bound, self.lower))

    def _close(self) -> bool:
        if self.best.choice is None:
            return False
        return self.best.value - self.lower <= self.gap * abs(self.best.value)

    def _answer(self, *, proven: bool) -> Least:
        if self.best.choice is None:
            return Least(choice=None, bound=math.inf if proven else self.lower, proven=proven)
        proven = proven or self.lower >= self.best.value
        bound = self.best.value if proven else self.lower
        return Least(choice=self.best.choice, bound=bound, proven=proven)
