"""One problem under ever other budgets, pins and risk, each answered in milliseconds."""

from __future__ import annotations

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
_GAP = 5e-3  # of the additive optimum: the eye sees no less
_SEED = 0


class WhatIf:
    """Answers for someone who moves a budget and looks on.

    For a problem with responses a short local search on the pairwise score, from the choice that
    is cheapest at the prices of the budgets and from the answer before; the interactions of all
    cells are computed once. Its score is that of solver "pairs", without a bound: `solvers.solve`
    gives one, and may find better, when the budget rests. Without responses, and beyond
    `MOST_PAIRED` cells, the additive optimum to a proven gap of 0.5 %, or what was found in
    `time_limit_s`.
    """

    def __init__(self, problem: Problem, *, num_kicks: int = 8, time_limit_s: float = 0.5) -> None:
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
        is an answer to similar conditions.
        """
        begun = time.monotonic()
        if self._pairs is not None and asked.responses is not None:
            choice = self._searched(asked, near)
            if choice is not None:
                seconds = time.monotonic() - begun
                return finish(asked, "pairs", choice, proven=False, seconds=seconds)
        least = minimise_quickly(
            asked,
            asked.sensitivity.values,
            asked.budgets,
            time_limit_s=self.time_limit_s,
            gap=_GAP,
        )
        reason = None
        if least.choice is None and least.proven:
            reason = explain(asked, time_limit_s=self.time_limit_s, by=minimise_quickly)
        return finish(
            asked,
            "auto",
            least.choice,
            proven=least.proven,
            bound=least.bound,
            seconds=time.monotonic() - begun,
            infeasibility=reason,
        )

    def _searched(self, asked: Problem, near: Allocation | None) -> Indices | None:
        """Return a choice of low pairwise score; None where none was found that fits."""
        own, cross = self._pairs_of(asked.cells)
        every = np.arange(len(asked.cells))
        relaxed = Knapsack.of(asked.cells, own, [row.relaxed() for row in asked.rows()], every)
        if (relaxed.slack < 0).any():
            return None
        form = Interacting(knapsack=relaxed, own=own, cross=cross, inner=own[:0], doubt=own[:0])
        descents = Descents(asked, form)
        start = descents.priced()
        if start is None or not asked.meets(start):
            return None
        further = [] if near is None else [_still_there(near, asked.cells, start)]
        return descents.best(
            start, further=further, num_starts=0, num_kicks=self.num_kicks, seed=_SEED
        )

    def _pairs_of(self, cells: Cells) -> tuple[Floats, Floats]:
        """Return own scores and cross terms of these cells, kept until others are asked for."""
        assert self._pairs is not None
        if cells == self.cells:
            return self._pairs
        kept = self._kept  # looked at once: another thread may ask for other cells meanwhile
        if kept is None or kept[0] != cells:
            allowed = dict(zip(cells.units, cells.schemes, strict=True))
            _, numbers = self.cells.restrict(allowed)
            own, cross = self._pairs
            kept = self._kept = cells, (own[numbers], cross[np.ix_(numbers, numbers)])
        return kept[1]


def _still_there(near: Allocation, cells: Cells, start: Indices) -> Indices:
    """Return the choice of an allocation, units that may no longer take it as in `start`."""
    choice = start.copy()
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
