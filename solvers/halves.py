"""The best choice of a core below a threshold, from all choices of its two halves."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from mpq.core.tables import Floats, Indices
from solvers.core import Core, Limits
from solvers.knapsack import starts_of
from solvers.lagrange import Dual
from solvers.search import best_pair, list_choices

_SHIFTS = (1.0, 4.0)  # of the slack, in mean widths of a unit
_MAX_SHIFTED = 8  # prices for each of them
_MAX_STRIPS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The best choice of entries of the whole that was found, or None, and what it is worth.

    `complete`: no choice of the core that fits is worth less than both that and the threshold;
    `listed` is the number of choices of the longer half.
    """

    choice: Indices | None
    worth: float
    complete: bool
    listed: int


def search_halves(
    core: Core, dual: Dual, limits: Limits, threshold: float, worth: float, *, most_listed: int
) -> Found:
    """Find what is worth less than `threshold`, and more that is worth less than `worth`.

    Listed are the choices of each half of the units that the bounds do not rule out; of their
    pairs (Horowitz and Sahni 1974) few take nearly all of each budget, as they must. Besides
    `dual` there are bounds for slacks somewhat larger and smaller: one that is good for the
    whole core is weak for a half. Above the threshold not all choices are looked at, only pairs
    of those listed.
    """
    search = _Halves(core, dual, limits)
    lists = []
    for number in (0, 1):
        listed = np.empty((most_listed, 2 + 2 * len(core.slack)))
        count = search.list_half(number, threshold, listed)
        if count > most_listed:
            return Found(choice=None, worth=math.inf, complete=False, listed=count)
        lists.append(listed[:count])
    most = max(map(len, lists))
    best, rows = search.pair(lists[0], lists[1], worth)
    if rows is None:
        return Found(choice=None, worth=math.inf, complete=True, listed=most)
    taken = [search.read(number, threshold, row) for number, row in enumerate(rows)]
    choice = core.choice(np.concatenate(taken))
    return Found(choice=choice, worth=best, complete=True, listed=most)


class _Halves:
    def __init__(self, core: Core, dual: Dual, limits: Limits) -> None:
        self.core, self.dual, self.limits = core, dual, limits
        self.units = np.repeat(np.arange(len(core.starts) - 1), np.diff(core.starts))
        duals = [dual]
        if len(core.entries):
            duals += [core.dual(prices) for prices in self.shifted()]
        self.roots = np.array([some.bound for some in duals])
        self.reduced = np.column_stack([some.reduced for some in duals])
        self.halves = self.split()

    def shifted(self) -> list[Floats]:
        """Return prices that are good for other slacks."""
        wide = self.core.widths().mean(axis=1)
        signs = [s for s in itertools.product((-1, 0, 1), repeat=len(wide)) if any(s)]
        signs = sorted(signs, key=lambda sign: sum(map(abs, sign)))[:_MAX_SHIFTED]
        shifts = [wide * by * np.array(sign) for by in _SHIFTS for sign in signs]
        return [self.core.better_prices(self.dual.prices, shift) for shift in shifts]

    def split(self) -> list[tuple[Indices, Indices]]:
        """Return for both halves where each unit begins, and the entries in order.

        Units alternate by how much their second entry loses, and those that lose most come
        first; entries of a unit come by what they lose.
        """
        loss, begins = self.reduced[:, 0], self.core.starts[:-1]
        order = np.lexsort((loss, self.units))
        by_loss = np.argsort(-loss[order[begins + 1]], kind="stable")
        halves = []
        for part in (by_loss[0::2], by_loss[1::2]):
            rank = np.full(len(by_loss), -1)
            rank[part] = np.arange(len(part))
            inside = np.flatnonzero(rank[self.units] >= 0)
            ordered = inside[np.lexsort((loss[inside], rank[self.units[inside]]))]
            halves.append((starts_of(rank[self.units[ordered]]), ordered))
        return halves

    def list_half(self, number: int, threshold: float, listed: Floats) -> int:
        """Fill in the rows of a half, the settled units counted in the first; see the kernel."""
        return self._list(number, threshold, listed, -1)[0]

    def read(self, number: int, threshold: float, row: int) -> Indices:
        """Return the entries of a row."""
        listed = np.empty((row + 1, 2 + 2 * len(self.core.slack)))
        return self._list(number, threshold, listed, row)[1]

    def _list(
        self, number: int, threshold: float, listed: Floats, wanted: int
    ) -> tuple[int, Indices]:
        starts, ordered = self.halves[number]
        depth = len(starts)
        sums = np.zeros((depth, listed.shape[1]))
        if number == 0:
            sums[0] = [self.core.worth, 0.0, *self.core.sums.ravel()]
        if depth == 1:
            listed[0] = sums[0]
            return 1, ordered
        place = np.zeros(depth, np.int64)
        count = list_choices(
            starts,
            self.core.objective[ordered],
            np.ascontiguousarray(self.core.costs[:, ordered].T),
            self.reduced[ordered],
            self.roots,
            threshold,
            place,
            np.empty((depth, len(self.roots))),
            sums,
            listed,
            wanted,
        )
        return count, ordered[place[:-1] - 1]

    def pair(
        self, first: Floats, second: Floats, worth: float
    ) -> tuple[float, tuple[int, int] | None]:
        """Return the least worth of two rows that fit together, and the rows, if below `worth`."""
        if not len(first) or not len(second) or worth <= self.dual.bound:
            return worth, None
        prices, limits = self.dual.prices, self.limits
        needed = limits.limits - limits.fixed
        widths = np.ptp(second[:, 2::2], axis=0)
        keys = np.argsort(-prices * widths, kind="stable")[:2]
        key, other = int(keys[0]), int(keys[-1])
        column, widest = second[:, 2 * key + 2], float(widths[key])
        width = (worth - self.dual.bound) / prices[key] if prices[key] > 0 else math.inf
        width = max(min(width, 2 * widest + 1e-300), widest / _MAX_STRIPS, 1e-300)
        origin = float(column.min())
        strip = ((column - origin) / width).astype(np.int64)
        order = np.lexsort((second[:, 2 * other + 2], strip))
        best, one, two = best_pair(
            first,
            second[order],
            np.searchsorted(strip[order], np.arange(int(strip.max()) + 2)),
            origin,
            width,
            np.array([key, other]),
            prices,
            needed,
            self.dual.bound,
            limits.fixed,
            limits.limits,
            needed + 16 * np.spacing(limits.sizes),
            worth,
        )
        return best, None if one < 0 else (one, int(order[two]))
