"""Trade-offs: solutions along the limits of one cost or two, and chains of allocations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpq.core.errors import InfeasibleError
from mpq.core.problem import Allocation, Solution
from mpq.core.tables import Cells, Floats, Indices


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontier:
    """Solutions along the limits of one cost, from the smallest to the largest.

    `complete`: they are all allocations that nothing beats in cost and score at once.
    """

    cost: str
    solutions: tuple[Solution, ...]
    complete: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """Solutions at every pair of limits of two costs; None where nothing fits both.

    `solutions[i][j]` is under `limits[0][i]` of `costs[0]` and `limits[1][j]` of `costs[1]`, both
    ascending.
    """

    costs: tuple[str, str]
    limits: tuple[Floats, Floats]
    solutions: tuple[tuple[Solution | None, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Allocations from the cheapest to the best, each of which changes one unit of the one before.

    A unit only ever moves to cells of more cost and less score, so an allocation is contained in
    the next one. `first` (num_units,) is the cheapest choice, step k moves unit `units[k]` to
    cell `moves[k]`; `totals` and `scores` (num_steps + 1,) are those before the first step and
    after each. Every allocation is the best within its own total (Everett 1963), and
    `bound(limit)` says how good any allocation within a limit can be at all.
    """

    cost: str
    cells: Cells
    first: Indices
    units: Indices
    moves: Indices
    totals: Floats
    scores: Floats

    def __len__(self) -> int:
        return len(self.totals)

    def choice(self, step: int) -> Indices:
        """Return the cell of each unit after the first `step` steps."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of a chain of {len(self)}")
        chosen = self.first.copy()
        chosen[self.units[:step]] = self.moves[:step]  # the last of a unit's moves counts
        return chosen

    def allocation(self, step: int) -> Allocation:
        """Return the allocation after the first `step` steps."""
        return Allocation.from_choice(self.cells, self.choice(step))

    def within(self, limit: float) -> int:
        """Return the last step whose total is at most `limit`; raises InfeasibleError for none."""
        step = int(np.searchsorted(self.totals, limit, "right")) - 1
        if step < 0:
            raise InfeasibleError(
                "infeasible",
                f"no allocation of the chain has {self.cost} <= {limit:.6g}: the smallest has "
                f"{self.totals[0]:.6g}",
            )
        return step

    def bound(self, limit: float) -> float:
        """Return what no allocation within `limit` scores less than: the hull at the limit."""
        self.within(limit)
        return float(np.interp(limit, self.totals, self.scores))
