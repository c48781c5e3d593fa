"""Local search: change one unit or two at once while that lowers the score and fits."""

from __future__ import annotations

import numpy as np

from mpq.core.tables import Floats, Indices
from solvers.knapsack import Knapsack

POOL = 200  # entries whose pairs are all tried; the square of it is the work of a step


def repair(knapsack: Knapsack, choice: Indices, *, steps: int = 0) -> Indices | None:
    """Change single units, least loss per excess weight first, until the choice fits.

    `choice` holds an entry of the knapsack for each unit. None where that does not succeed
    in so many `steps`, or, if 0, four for each unit.
    """
    choice = choice.copy()
    scale = knapsack.slack[:, None]

    def excess(use: Floats) -> Floats:
        return np.asarray(np.maximum(0.0, (use - scale) / scale).sum(axis=0))

    for _ in range(steps or 4 * len(choice) + 1):
        use = knapsack.weights[:, choice].sum(axis=1, keepdims=True)
        now = float(excess(use)[0])
        if now == 0.0:
            return choice
        current = choice[knapsack.units]
        relief = now - excess(use + knapsack.weights - knapsack.weights[:, current])
        loss = np.maximum(0.0, knapsack.objective - knapsack.objective[current])
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            price = np.where(relief > 1e-15 * now, loss / relief, np.inf)
        best = np.flatnonzero(price == price.min())
        if not np.isfinite(price[best[0]]):
            return None
        best_relief = best[np.argmax(relief[best])]
        choice[knapsack.units[best_relief]] = best_relief
    return None


def descend(
    knapsack: Knapsack,
    choice: Indices,
    *,
    prices: Floats,
    cross: Floats | None = None,
    pool: int = POOL,
) -> Indices:
    """Return the choice after the best single changes and swaps, none of which helps any more.

    The score is sum_u objective + sum_{u != v} cross[a(u), a(v)]; `cross` is symmetric and zero
    within a unit. Each step takes the best single change or, where none helps, the best pair of
    changes among the `pool` entries of least change in score plus `prices` . weights.
    """
    choice, units = choice.copy(), knapsack.units
    objective, weights = knapsack.objective, knapsack.weights
    field = np.zeros(len(units)) if cross is None else cross[:, choice].sum(axis=1)
    least_gain = 1e-12 * (float(np.abs(objective).max(initial=0.0)) + float(np.abs(field).max()))
    for _ in range(20 * len(choice) + 100):
        current = choice[units]
        room = knapsack.slack - weights[:, choice].sum(axis=1)
        change = objective - objective[current] + 2.0 * (field - field[current])
        extra = weights - weights[:, current]
        single = np.where((extra <= room[:, None]).all(axis=0), change, np.inf)
        step = [int(single.argmin())]
        if not single[step[0]] < -least_gain:
            priced = change + prices @ extra
            priced[choice] = np.inf
            near = np.sort(np.argsort(priced, kind="stable")[:pool])
            both = change[near][:, None] + change[near]
            if cross is not None:
                old = current[near]
                mixed = cross[np.ix_(near, old)]
                both = both + 2.0 * (
                    cross[np.ix_(near, near)] - mixed - mixed.T + cross[np.ix_(old, old)]
                )
            fits = units[near][:, None] != units[near]
            for k, row in enumerate(extra[:, near]):
                fits &= row[:, None] + row <= room[k]
            both[~fits] = np.inf
            i, j = divmod(int(both.argmin()), len(near)) if len(near) else (0, 0)
            if not len(near) or not both[i, j] < -least_gain:
                return choice
            step = [int(near[i]), int(near[j])]
        for entry in step:
            if cross is not None:
                field += cross[:, entry] - cross[:, choice[units[entry]]]
            choice[units[entry]] = entry
    return choice
