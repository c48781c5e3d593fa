"""The units of a knapsack that are still open, those that are settled, and prices for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpq.core.tables import Floats, Indices
from solvers.knapsack import Knapsack, Mask, starts_of
from solvers.lagrange import Dual, at_prices, climb
from solvers.search import exact_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The costs of each entry of a knapsack as the problem states them, a row per budget.

    `sizes` are what the numbers of a row are compared with when they are rounded.
    """

    costs: Floats
    fixed: Floats
    limits: Floats
    sizes: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """Entries of the units that have several, beside one entry of each other unit.

    Entry i is `entries[i]` of the whole knapsack, of unit `units[i]` (ascending, with gaps).
    The settled entries are worth `worth` together and take `sums[k]` of each budget, exactly,
    in two doubles. `sizes` are the slacks of the whole, `slack` what is left of them.
    """

    entries: Indices
    units: Indices
    starts: Indices
    objective: Floats
    weights: Floats
    costs: Floats
    slack: Floats
    sizes: Floats
    settled: Indices
    worth: float
    sums: Floats

    @classmethod
    def whole(cls, knapsack: Knapsack, limits: Limits) -> Core:
        """Return the core in which nothing is settled."""
        return cls(
            entries=np.arange(len(knapsack.cells)),
            units=knapsack.units,
            starts=knapsack.starts,
            objective=knapsack.objective,
            weights=knapsack.weights,
            costs=limits.costs,
            slack=knapsack.slack,
            sizes=knapsack.slack,
            settled=np.empty(0, np.int64),
            worth=0.0,
            sums=np.zeros((len(knapsack.slack), 2)),
        )

    def part(self, keep: Mask) -> Core:
        """Return the core of fewer entries, at least one of each unit."""
        kept = np.flatnonzero(keep)
        units = self.units[kept]
        alone = np.diff(units, prepend=-1) > 0
        alone &= np.diff(units, append=self.units[-1] + 1) > 0
        settled, kept, units = kept[alone], kept[~alone], units[~alone]
        sums, slack = np.empty_like(self.sums), np.empty_like(self.slack)
        for k in range(len(slack)):
            sums[k] = exact_sum(self.costs[k, settled], self.sums[k, 0], self.sums[k, 1])
            used = exact_sum(self.weights[k, settled], -self.slack[k], 0.0)
            slack[k] = -(used[0] + used[1])
        worth = exact_sum(self.objective[settled], self.worth, 0.0)
        return Core(
            entries=self.entries[kept],
            units=units,
            starts=starts_of(units),
            objective=self.objective[kept],
            weights=self.weights[:, kept],
            costs=self.costs[:, kept],
            slack=slack,
            sizes=self.sizes,
            settled=np.concatenate([self.settled, self.entries[settled]]),
            worth=worth[0] + worth[1],
            sums=sums,
        )

    def dual(self, prices: Floats) -> Dual:
        """Return what prices prove about all choices of the core, settled entries included."""
        return at_prices(self.objective, self.weights, self.starts, self.slack, prices, self.worth)

    def better_prices(self, prices: Floats, shift: Floats | float = 0.0) -> Floats:
        """Return almost the best prices, sought around some, for slacks shifted by some sizes."""
        scale = float(self.objective.max(initial=0.0)) or 1.0
        start = prices * self.sizes / scale
        radius = 2 * float(start.max(initial=0.0))
        if not len(self.entries) or not radius:
            return prices
        weights = self.weights / self.sizes[:, None]
        found, _, _ = climb(
            self.objective / scale,
            weights,
            self.slack / self.sizes + shift,
            self.starts,
            start,
            radius,
        )
        return found * scale / self.sizes

    def widths(self) -> Floats:
        """Return how far the weights of each unit are apart, a row per budget, in sizes."""
        begins = self.starts[:-1]
        width = np.maximum.reduceat(self.weights, begins, axis=1)
        width -= np.minimum.reduceat(self.weights, begins, axis=1)
        scaled: Floats = width / self.sizes[:, None]
        return scaled

    def choice(self, taken: Indices) -> Indices:
        """Return the entry of every unit of the whole, in order, for some of the core's."""
        return np.sort(np.concatenate([self.settled, self.entries[taken]]))
