"""Least total of one value per cell under budgets, proven."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from mpq.core.joint import JointCosts, joined_sum
from mpq.core.problem import Budget, Constraint, Problem
from mpq.core.tables import Floats, Indices
from solvers.knapsack import Knapsack, cheapest, fitting, preference, smallest_total
from solvers.milp import TOLERANCE, Answer, Library, branch_and_cut
from solvers.relaxation import Relaxation, relax
from solvers.rounding import round_to_fit

_FEW_CHOICES = 10**7  # some seconds
_MAX_EXCLUDED = 20  # choices that break a budget by less than the solver can see
_LARGE = 300  # entries from which on a small core is solved first
_CORE = 60  # entries of that core beyond one per unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Least:
    """The chosen cell of each unit, or None, and a lower bound on the total of the values.

    `proven`: nothing is better, or, where `choice` is None, nothing fits.
    """

    choice: Indices | None
    bound: float
    proven: bool


class Minimise(Protocol):
    """A way to find the least total."""

    def __call__(
        self,
        problem: Problem,
        values: Floats,
        budgets: Sequence[Budget],
        *,
        time_limit_s: float,
        joint: JointCosts | None = None,
    ) -> Least:
        """Minimise sum_u values[a(u)] over one cell per unit under `budgets`.

        `joint` terms belong to the values. The problem's constraints and forbidden pairs hold,
        its own budgets do not.
        """


def minimise(
    problem: Problem,
    values: Floats,
    budgets: Sequence[Budget],
    *,
    time_limit_s: float,
    joint: JointCosts | None = None,
    among: Indices | None = None,
    known: Indices | None = None,
    gap: float = 0.0,
    library: Library = "highs",
) -> Least:
    """Minimise sum_u values[a(u)] over one cell per unit under `budgets`.

    `values` (num_cells,), with their `joint` terms, stand in for the problem's sensitivity,
    `budgets` for its own; its constraints and forbidden pairs hold. The linear relaxation
    prices the budgets, rounding it gives a first choice, the distance of the two rules out most
    cells, and an integer program decides about the rest. A better choice is overlooked only if
    it gains less than about 1e-11 of what the answer loses against the unconstrained best.
    `time_limit_s` bounds the integer programs, not building them.

    With a `known` choice that fits, `among` (ascending, holding it) may be those cells alone of
    which a better choice consists. The search ends within `gap` of the total.
    """
    asked = problem.with_budgets(budgets)
    deadline = time.monotonic() + time_limit_s
    search = _Search(asked, values, joint, asked.rows(), deadline, gap, library)
    if among is not None:
        search.best = known
        return search.decide(among)
    least = search.run()
    return _without_tolerance(search, least) if search.blurred and not least.proven else least


def _without_tolerance(search: _Search, least: Least) -> Least:
    """Decide what an integer program cannot tell apart, by sums without error.

    Of few choices all are tried; of many the dual's core is searched, where that knows all the
    conditions there are.
    """
    from solvers.brute_force import try_everything
    from solvers.quick import MOST_ROWS, minimise_quickly

    problem, left = search.problem, search.deadline - time.monotonic()
    by: Minimise | None = None
    if math.prod(map(len, problem.cells.schemes)) <= _FEW_CHOICES:
        by = try_everything
    elif not problem.forbidden and len(search.rows) <= MOST_ROWS and not search.with_terms:
        by = minimise_quickly
    if by is None:
        return least
    decided = by(problem, search.values, problem.budgets, time_limit_s=left, joint=search.joint)
    return decided if decided.proven or decided.choice is not None else least


class _Search:
    def __init__(
        self,
        problem: Problem,
        values: Floats,
        joint: JointCosts | None,
        rows: Sequence[Constraint],
        deadline: float,
        gap: float,
        library: Library,
    ) -> None:
        self.problem, self.values, self.joint, self.rows = problem, values, joint, rows
        self.with_terms = bool(joint) or any(row.joint for row in rows)
        self.forbidden = problem.forbidden_cells()
        self.deadline, self.gap, self.library = deadline, gap, library
        self.best: Indices | None = None
        self.blurred = False  # too many choices break a row by less than the program can see

    def run(self) -> Least:
        for row in self.rows:
            if smallest_total(row) > row.limit:
                return Least(choice=None, bound=math.inf, proven=True)
        if not self.joint:
            free = cheapest(self.problem, self.values)
            if self._fits(free):
                return Least(choice=free, bound=self._value(free), proven=True)
        return self.decide(np.arange(len(self.problem.cells)))

    def decide(self, cells: Indices) -> Least:
        knapsack = self._part(cells)
        if knapsack is not None:
            exposed = np.array([i for pair in self.forbidden for i in pair], np.int64)
            best_of_unit = knapsack.undominated(preference(self.problem), exposed)
            knapsack = self._part(knapsack.cells[best_of_unit])
        relaxed = None if knapsack is None else relax(knapsack)
        if knapsack is None or relaxed is None:
            return self._answer(math.inf, proven=True)
        rounded = round_to_fit(knapsack, relaxed)
        if rounded is not None:
            self._offer(np.array([], np.int64), knapsack, rounded)
        return self._decide(knapsack, relaxed)

    def _decide(self, whole: Knapsack, relaxed: Relaxation) -> Least:
        """Rule cells out by the best choice so far, solve the rest, repeat while that helps."""
        lower = whole.base + max(0.0, relaxed.bound)
        if len(self._undecided(whole, relaxed).cells) > _LARGE:
            core = self._core(whole, relaxed)
            if core is not None:
                self._solve(core, share=0.25)
        while True:
            rest = self._undecided(whole, relaxed)
            before = self.best
            answer = self._solve(rest)
            lower = max(lower, rest.base + answer.bound)
            if not answer.complete or (answer.bound < math.inf and self._enough() > 0):
                return self._answer(lower, proven=False)
            if self.best is None or self.best is before:
                return self._answer(lower, proven=True)
            # Small on the scale that the solver saw: look again on the scale of the answer.
            loss = self._value(self.best) - rest.base
            closer = relax(rest) if loss * 10 <= rest.objective.max() else None
            if closer is None:
                return self._answer(lower, proven=True)
            whole, relaxed = rest, closer

    def _undecided(self, whole: Knapsack, relaxed: Relaxation) -> Knapsack:
        if self.best is None:
            return whole
        value = self._value(self.best)
        rounding = 4 * np.spacing(max(abs(value), abs(whole.base)))
        most = (value - whole.base) * (1 + 1e-10) + rounding
        keep = (whole.objective <= most) & (relaxed.bound + relaxed.reduced <= most)
        keep |= np.isin(whole.cells, self.best)
        return self._part(whole.cells[keep]) or whole

    def _core(self, whole: Knapsack, relaxed: Relaxation) -> Knapsack | None:
        """Return the part in which a very good choice is likely: the entries nearest to even."""
        nearest = np.argsort(relaxed.reduced, kind="stable")[: len(whole.starts) - 1 + _CORE]
        keep = relaxed.shares > 1e-9
        keep[nearest] = True
        return self._part(whole.cells[keep])

    def _part(self, kept: Indices) -> Knapsack | None:
        return fitting(self.problem, self.values, self.rows, kept, self.joint)

    def _solve(self, rest: Knapsack, *, share: float = 1.0) -> Answer:
        """Solve, cutting off choices that fit only within the solver's tolerance.

        `share` is the part of the time left that this may take.
        """
        start = time.monotonic()
        deadline = start + share * (self.deadline - start)
        free, settled = rest.split()
        if not len(free.cells):
            self._offer(settled, free, free.cells)
            return Answer(choice=None, bound=0.0, complete=True)
        excluded: list[Indices] = []
        while True:
            left = deadline - time.monotonic()
            answer = self._program(free, excluded, left, enough=self._enough())
            if answer.choice is None or self._offer(settled, free, answer.choice):
                return answer
            if not excluded:  # something that surely fits, in case too many do not
                tight = replace(free, slack=free.slack * (1 - 4 * TOLERANCE))
                safe = self._program(tight, [], deadline - time.monotonic())
                if safe.choice is not None:
                    self._offer(settled, free, safe.choice)
            excluded.append(answer.choice)
            self.blurred |= len(excluded) > _MAX_EXCLUDED
            if not answer.complete or self.blurred:
                return replace(answer, complete=False)

    def _program(
        self, free: Knapsack, excluded: list[Indices], left: float, *, enough: float = 0.0
    ) -> Answer:
        return branch_and_cut(
            free,
            excluded,
            forbidden=self.forbidden,
            time_limit_s=left,
            enough=enough,
            gap=self.gap / 2 if self.with_terms else 0.0,
            library=self.library,
        )

    def _enough(self) -> float:
        return 0.0 if self.best is None else self.gap * abs(self._value(self.best)) / 2

    def _offer(self, settled: Indices, knapsack: Knapsack, entries: Indices) -> bool:
        """Keep a choice if it really fits and nothing better is known; tell whether it fits."""
        choice = np.sort(np.concatenate([settled, knapsack.cells[entries]]))
        if not self._fits(choice):
            return False
        if self.best is None or self._value(choice) < self._value(self.best):
            self.best = choice
        return True

    def _answer(self, lower: float, *, proven: bool) -> Least:
        if self.best is None:
            return Least(choice=None, bound=math.inf if proven else lower, proven=proven)
        value = self._value(self.best)
        proven = proven or lower >= value
        return Least(choice=self.best, bound=value if proven else lower, proven=proven)

    def _fits(self, choice: Indices) -> bool:
        return self.problem.allows(choice) and all(row.met(choice) for row in self.rows)

    def _value(self, choice: Indices) -> float:
        return joined_sum(self.values[choice], self.joint, choice)
