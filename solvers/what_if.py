"""One problem under ever other budgets, pins and risk, each answered in milliseconds."""

from __future__ import annotations

import math
import time

import numpy as np

from mpq.core.formats import parse_scheme
from mpq.core.problem import Allocation, Budget, Problem, Solution
from mpq.core.tables import Cells, CostTable, Floats, Indices, Responses, SensitivityTable
from solvers.check import finish
from solvers.infeasible import explain
from solvers.knapsack import Knapsack
from solvers.pairs import Descents
from solvers.pairwise import Interacting, bounded_interactions, same_unit
from solvers.quick import minimise_quickly

MOST_PAIRED = 4_000  # cells up to which pairs are searched: their matrix has the square of it
_GAP, _EFFORT = 1e-3, 10  # of the additive optimum: the eye sees no less
_SEED = 0


class WhatIf:
    """Answers for someone who moves a budget and looks on.

    The additive optimum to a proven gap of 0.1 %, and from there, for a problem with responses,
    a short descent on the pairwise score: the interactions of all cells are computed once. Its
    score is that of solver "pairs" then, without a bound; `solvers.solve` gives one, and may find
    better, when the budget rests. Beyond `MOST_PAIRED` cells the answer is the additive one.
    """

    def __init__(self, problem: Problem, *, num_kicks: int = 8, time_limit_s: float = 2.0) -> None:
        self.cells = problem.cells
        self.num_kicks = num_kicks
        self.time_limit_s = time_limit_s
        self._pairs: tuple[Floats, Floats] | None = None
        self._kept: tuple[Cells, tuple[Floats, Floats]] | None = None
        if problem.responses is not None and len(self.cells) <= MOST_PAIRED:
            found, _ = bounded_interactions(problem.responses)
            own = np.diagonal(found).copy()
            found[same_unit(self.cells.offsets)] = 0.0
            self._pairs = own, found

    def solve(self, asked: Problem, near: Allocation | None = None) -> Solution:
        """Return a good allocation of the problem under other conditions, or why there is none.

        `asked` has the tables of the problem, perhaps with fewer schemes for some units; `near`
        is an answer to similar conditions, from which a descent starts as well.
        """
        begun = time.monotonic()
        least = minimise_quickly(
            asked,
            asked.sensitivity.values,
            asked.budgets,
            time_limit_s=self.time_limit_s,
            gap=_GAP,
            effort=_EFFORT,
        )
        solver, choice, bound, proven, reason = (
            "auto",
            least.choice,
            least.bound,
            least.proven,
            None,
        )
        if choice is None and proven:
            reason = explain(asked, time_limit_s=self.time_limit_s, by=minimise_quickly)
        elif choice is not None and self._pairs is not None and asked.responses is not None:
            solver, bound, proven = "pairs", -math.inf, False
            choice = self._improved(asked, choice, near)
        return finish(
            asked,
            solver,
            choice,
            proven=proven,
            bound=bound,
            seconds=time.monotonic() - begun,
            infeasibility=reason,
        )

    def _improved(self, asked: Problem, additive: Indices, near: Allocation | None) -> Indices:
        own, cross = self._pairs_of(asked.cells)
        every = np.arange(len(asked.cells))
        relaxed = Knapsack.of(asked.cells, own, [row.relaxed() for row in asked.rows()], every)
        form = Interacting(knapsack=relaxed, own=own, cross=cross, inner=own[:0], doubt=own[:0])
        further = [] if near is None else [_still_there(near, asked.cells, additive)]
        return Descents(asked, form).best(
            additive, further=further, num_starts=0, num_kicks=self.num_kicks, seed=_SEED
        )

    def _pairs_of(self, cells: Cells) -> tuple[Floats, Floats]:
        """Return own scores and cross terms of these cells, kept until others are asked for."""
        assert self._pairs is not None
        if cells == self.cells:
            return self._pairs
        if self._kept is None or self._kept[0] != cells:
            allowed = dict(zip(cells.units, cells.schemes, strict=True))
            _, numbers = self.cells.restrict(allowed)
            own, cross = self._pairs
            self._kept = cells, (own[numbers], cross[np.ix_(numbers, numbers)])
        return self._kept[1]


def _still_there(near: Allocation, cells: Cells, additive: Indices) -> Indices:
    """Return the choice of an allocation, units that may no longer take it as in `additive`."""
    choice = additive.copy()
    for number, (unit, schemes) in enumerate(zip(cells.units, cells.schemes, strict=True)):
        scheme = near.get(unit)
        if scheme in schemes:
            choice[number] = cells.offsets[number] + schemes.index(scheme)
    return choice


def warm() -> None:
    """Load, or compile, what answers a first question, so that nobody waits for it."""
    schemes = tuple(map(parse_scheme, ("int2", "int3", "int4", "int5", "int6", "int8", "fp16")))
    cells = Cells(units=tuple(f"unit {n}" for n in range(100)), schemes=(schemes,) * 100)
    rng = np.random.default_rng(_SEED)
    vectors = rng.normal(size=(len(cells), 4, 2)).astype(np.float32)
    responses = Responses(cells=cells, vectors=vectors)
    values, stderr = responses.own_scores()
    costs = {
        name: CostTable.exact(name, unit, cells, rng.random(len(cells)))
        for name, unit in (("memory", "bytes"), ("latency", "s"))
    }
    problem = Problem(
        sensitivity=SensitivityTable(metric="made", cells=cells, values=values, stderr=stderr),
        costs=costs,
        budgets=(Budget("memory", 40.0), Budget("latency", 40.0)),
        responses=responses,
    )
    WhatIf(problem).solve(problem)
