"""Several questions about one problem, each answered exactly or told that it was not."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mpq.core.joint import JointCosts
from mpq.core.problem import Allocation, Budget, Constraint, Problem
from mpq.core.shadow import Alternative
from mpq.core.tables import Floats, Indices
from solvers.exact import Least, minimise

FEW_CELLS = 200  # up to so many a dozen integer programs are as fast as loading the search
_CLOSE, _MANY = 1e-3, 1_000_000  # search on until the time is over, start no integer program
_EXACT = 2.0**53


@dataclass(slots=True, kw_only=True)
class Questions:
    """A problem that is asked `number` questions at most within `seconds`.

    What a question leaves of its share of the time the later ones have.
    """

    problem: Problem
    number: int
    seconds: float
    _deadline: float = field(init=False)

    def __post_init__(self) -> None:
        if len(self.problem.cells) > FEW_CELLS:
            import solvers.quick  # noqa: F401  # loading it is not time to answer in

        self._deadline = time.monotonic() + self.seconds

    def least(
        self,
        values: Floats,
        budgets: Sequence[Budget],
        further: Sequence[Constraint] = (),
        *,
        joint: JointCosts | None = None,
        gap: float = _CLOSE,
        effort: int = _MANY,
        known: Indices | None = None,
    ) -> Least:
        """Minimise the total of `values` under budgets and, beside the problem's, constraints.

        `joint` terms belong to the values.
        Of more than a few cells the search is given up, unproven, when bound and choice are
        within `gap` and it has taken `effort` branches: what is open then, more time seldom
        settles. A gap of 0 is not given up. `known` is a choice that fits.
        """
        end = time.monotonic() + (self._deadline - time.monotonic()) / max(1, self.number)
        self.number -= 1
        asked = replace(self.problem, constraints=(*self.problem.constraints, *further))
        if len(asked.cells) <= FEW_CELLS:
            share = 0.5 * (end - time.monotonic())
            found = minimise(asked, values, budgets, time_limit_s=share, joint=joint)
            if found.proven:
                return found
        from solvers.quick import minimise_quickly  # tells totals apart that are all but equal

        left = end - time.monotonic()
        return minimise_quickly(
            asked,
            values,
            budgets,
            time_limit_s=left,
            joint=joint,
            gap=gap,
            effort=effort,
            known=known,
        )

    @property
    def over(self) -> bool:
        """Whether there is no time left."""
        return time.monotonic() > self._deadline

    def best(
        self,
        budgets: Sequence[Budget],
        further: Sequence[Constraint] = (),
        *,
        known: Alternative | None = None,
    ) -> Alternative:
        """Return the allocation of least score under budgets and constraints, a `known` one met."""
        choice = None
        if known is not None and known.allocation is not None:
            choice = known.allocation.choice(self.problem.cells)
        scores = self.problem.sensitivity.values
        found = self.least(scores, budgets, further, known=choice)
        return alternative(self.problem, found.choice, proven=found.proven)


def alternative(problem: Problem, choice: Indices | None, *, proven: bool) -> Alternative:
    """Return a choice of cells with its score and totals."""
    if choice is None:
        return Alternative(proven=proven)
    return Alternative(
        allocation=Allocation.from_choice(problem.cells, choice),
        score=problem.score(choice),
        totals=problem.totals(choice),
        proven=proven,
    )


def below(row: Constraint, total: float) -> Constraint:
    """Return the condition that `row` comes to strictly less than `total`.

    Totals are sums rounded once (fsum), so the limit is the next smaller double. Where all
    coefficients are whole numbers (bytes), it is the next smaller total that the steps between
    them allow, which no tolerance of a solver blurs.
    """
    limit = math.nextafter(total, -math.inf)
    return replace(row, limit=_reachable(row, limit))


def _reachable(row: Constraint, limit: float) -> float:
    offsets, values = row.cells.offsets, row.coefficients
    if row.joint:
        return limit
    whole = np.all(values == np.rint(values)) and row.fixed == round(row.fixed)
    size = float(np.abs(values).max(initial=0.0)) * len(row.cells.units) + abs(row.fixed)
    if not whole or not len(values) or max(size, abs(limit)) >= _EXACT:
        return limit
    least = np.minimum.reduceat(values, offsets[:-1])
    above = values - np.repeat(least, np.diff(offsets))
    step = int(np.gcd.reduce(above.astype(np.int64)))
    if step == 0:
        return limit
    base = int(row.fixed) + int(least.sum())
    return float(base + step * ((math.floor(limit) - base) // step))
