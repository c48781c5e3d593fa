"""All choices of a core below a threshold, branching until halves of it can be listed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from mpq.core.problem import Constraint
from mpq.core.sums import exact_sum
from mpq.core.tables import Floats, Indices
from solvers.core import Core, Limits
from solvers.halves import search_halves
from solvers.knapsack import Knapsack
from solvers.lagrange import Dual

_LISTED = 1 << 14  # choices of half a core
_TIED = 1e-9
_DEEPEST = 60  # branchings, one inside the other


@dataclass(slots=True, kw_only=True)
class Best:
    """The best choice so far that meets the budgets: its cells, and its worth above the base."""

    values: Floats
    rows: tuple[Constraint, ...]
    choice: Indices | None = None
    value: float = math.inf
    worth: float = math.inf

    def fits(self, choice: Indices) -> bool:
        """Tell whether a choice of cells meets all conditions but forbidden pairs."""
        return all(row.met(choice) for row in self.rows)

    def offer(self, knapsack: Knapsack, entries: Indices | None) -> bool:
        """Keep a choice of entries if nothing better is known; tell whether it really fits."""
        if entries is None or not self.fits(knapsack.cells[entries]):
            return False
        value = exact_sum(self.values[knapsack.cells[entries]])
        if value < self.value:
            self.choice, self.value = knapsack.cells[entries], value
            self.worth = exact_sum(knapsack.objective[entries])
        return True


@dataclass(slots=True, kw_only=True)
class Branches:
    """A search for what is worth less than `threshold`, depth first.

    The widest unit takes one entry after the other, with prices made anew for each, where too
    many choices of half the core remain. Choices above the threshold and below `worth` are
    offered to `best` too when met. It ends unfinished after `most_nodes` or at the deadline.
    """

    best: Best
    knapsack: Knapsack
    limits: Limits
    threshold: float
    worth: float
    most_nodes: int
    deadline: float
    nodes: int = field(default=0, init=False)

    def complete(self, core: Core, dual: Dual, deep: int = 0) -> bool:
        """Search a core, its dual given; tell whether no choice was left out."""
        threshold = min(self.threshold, self.best.worth)
        if dual.bound >= threshold:
            return True
        self.nodes += 1
        if self.nodes > self.most_nodes or deep > _DEEPEST or time.monotonic() > self.deadline:
            return False
        keep = dual.reduced < threshold - dual.bound
        keep[dual.least] = True
        core = core.part(keep)
        dual = core.dual(dual.prices)
        worth = min(self.best.worth, self.worth)
        found = search_halves(core, dual, self.limits, threshold, worth, most_listed=_LISTED)
        if found.complete:
            return found.choice is None or self.best.offer(self.knapsack, found.choice)
        return all(
            self.complete(child, child.dual(child.better_prices(dual.prices)), deep + 1)
            for child in self._children(core, dual)
        )

    def _children(self, core: Core, dual: Dual) -> Iterator[Core]:
        """Yield the core with each entry of one unit, the most promising first.

        The widest of those units of which no single entry is best at these prices: whatever it
        takes, the bound rises.
        """
        tied = dual.reduced <= _TIED * max(abs(dual.bound), float(dual.reduced.max()))
        several = np.add.reduceat(tied, core.starts[:-1], dtype=np.int64) > 1
        wide = dual.prices * core.sizes @ core.widths()
        unit = int(np.where(several, wide, -1.0).argmax() if several.any() else wide.argmax())
        begin, end = core.starts[unit], core.starts[unit + 1]
        for entry in begin + np.argsort(dual.reduced[begin:end], kind="stable"):
            only = np.ones(len(core.entries), np.bool_)
            only[begin:end] = False
            only[entry] = True
            yield core.part(only)
