"""The local search of `solvers.descent` in a knapsack with terms of pairs of entries."""

from __future__ import annotations

import numpy as np

from mpq.core.tables import Floats, Indices
from solvers.joint import OBJECTIVE, Terms
from solvers.knapsack import Knapsack


def repair_with_terms(knapsack: Knapsack, choice: Indices, *, steps: int = 0) -> Indices | None:
    """Change single units, least loss per excess first, until the choice fits (see `repair`)."""
    choice, scale = choice.copy(), knapsack.slack[:, None]
    for _ in range(steps or 4 * len(choice) + 1):
        state = _State(knapsack, choice)
        over = -state.room[:, None]
        now = float((np.maximum(0.0, over) / scale).sum())
        if now == 0.0:
            return choice
        relief = now - (np.maximum(0.0, state.extra + over) / scale).sum(axis=0)
        useful = np.flatnonzero(relief > 1e-15 * now)
        if not len(useful):
            return None
        with np.errstate(over="ignore"):
            price = np.maximum(0.0, state.change[useful]) / relief[useful]
        best = useful[price == price.min()]
        entry = int(best[np.argmax(relief[best])])
        choice[knapsack.units[entry]] = entry
    return None


def descend_with_terms(
    knapsack: Knapsack,
    choice: Indices,
    *,
    prices: Floats,
    cross: Floats | None,
    field: Floats | None,
    pool: int,
) -> Indices:
    """Return the choice after the best single changes and swaps (see `descend`)."""
    choice, units = choice.copy(), knapsack.units
    if field is None:
        field = np.zeros(len(units)) if cross is None else cross[choice].sum(axis=0)
    least_gain = 1e-12 * (knapsack.largest + float(np.abs(field).max(initial=0.0)))
    for _ in range(20 * len(choice) + 100):
        state = _State(knapsack, choice, field)
        fits = (state.extra <= state.room[:, None]).all(axis=0)
        single = np.where(fits, state.change, np.inf)
        step = [int(single.argmin())]
        if not single[step[0]] < -least_gain:
            pair = state.best_pair(cross, prices, pool)
            if pair is None or not pair[0] < -least_gain:
                return choice
            step = [pair[1], pair[2]]
        for entry in step:
            unit = units[entry]
            if cross is not None:
                field += cross[entry]
                field -= cross[choice[unit]]
            choice[unit] = entry
    return choice


class _State:
    """What each single change from a choice of entries does to the score and to the rows."""

    def __init__(self, knapsack: Knapsack, choice: Indices, field: Floats | None = None) -> None:
        assert knapsack.terms is not None
        self.knapsack, self.choice, self.terms = knapsack, choice, knapsack.terms
        n, rows = len(knapsack.cells), len(knapsack.slack)
        current = choice[knapsack.units]
        fields = self.terms.fields(choice, n, rows)
        level = knapsack.objective + fields[-1]
        if field is not None:
            level = level + 2.0 * field
        self.change = level - level[current]
        together = knapsack.weights + fields[:-1]
        self.extra = together - together[:, current]
        used = knapsack.weights[:, choice].sum(axis=1) + fields[:-1, choice].sum(axis=1) / 2
        self.room: Floats = knapsack.slack - used - self.terms.granted[:-1]

    def best_pair(
        self, cross: Floats | None, prices: Floats, pool: int
    ) -> tuple[float, int, int] | None:
        """Return the change in score of the best two changes at once that fit, and the entries."""
        units = self.knapsack.units
        priced = self.change + prices @ self.extra
        priced[self.choice] = np.inf
        if pool < len(priced):
            near = np.sort(np.argpartition(priced, pool)[:pool])
        else:
            near = np.arange(len(priced))
        near = near[np.isfinite(priced[near])]
        if not len(near):
            return None
        old = self.choice[units[near]]
        both = self.change[near][:, None] + self.change[near]
        if cross is not None:
            ends = np.concatenate([near, old])
            rows = cross[near[:, None], ends] - cross[old[:, None], ends]
            both += 2.0 * (rows[:, : len(near)] - rows[:, len(near) :])
        both += _second(self.terms, OBJECTIVE, near, old, len(units))
        fits = units[near][:, None] != units[near]
        for k, row in enumerate(self.extra[:, near]):
            second = _second(self.terms, k, near, old, len(units))
            fits &= row[:, None] + row + second <= self.room[k]
        both[~fits] = np.inf
        i, j = divmod(int(both.argmin()), len(near))
        return float(both[i, j]), int(near[i]), int(near[j])


def _second(terms: Terms, row: int, near: Indices, old: Indices, size: int) -> Floats:
    """Return what two changes, old to near, add to a row beyond what each adds alone."""
    ends, places = np.unique(np.concatenate([near, old]), return_inverse=True)
    place = np.full(size, -1)
    place[ends] = np.arange(len(ends))
    one, other = place[terms.first], place[terms.second]
    inside = (terms.rows == row) & (one >= 0) & (other >= 0)
    table = np.zeros((len(ends), len(ends)))
    table[one[inside], other[inside]] = table[other[inside], one[inside]] = terms.values[inside]
    new, was = places.ravel()[: len(near)], places.ravel()[len(near) :]
    change = table[new] - table[was]
    return np.asarray(change[:, new] - change[:, was], np.float64)
