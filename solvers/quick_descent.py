"""The local search of `solvers.descent` as machine code, for many cells."""

from __future__ import annotations

import numpy as np

from mpq.core.tables import Floats, Indices
from solvers.compiled import compiled
from solvers.knapsack import Knapsack


def repair_quickly(knapsack: Knapsack, choice: Indices) -> Indices | None:
    """Return what `repair` returns."""
    choice = choice.copy()
    used = knapsack.weights[:, choice].sum(axis=1)
    fits = make_fit(
        knapsack.objective,
        knapsack.weights,
        knapsack.slack,
        knapsack.units,
        choice,
        used,
        4 * len(choice) + 1,
    )
    return choice if fits else None


def descend_quickly(
    knapsack: Knapsack,
    choice: Indices,
    *,
    prices: Floats,
    cross: Floats,
    field: Floats,
    pool: int,
) -> Indices:
    """Return an end of the search that `descend` makes."""
    choice = choice.copy()
    size = float(np.abs(knapsack.objective).max(initial=0.0)) + float(np.abs(field).max())
    improve(
        knapsack.objective,
        knapsack.weights,
        knapsack.slack,
        knapsack.units,
        cross,
        prices,
        choice,
        field,
        knapsack.weights[:, choice].sum(axis=1),
        min(pool, len(field)),
        1e-12 * size,
        20 * len(choice) + 100,
    )
    return choice


@compiled
def make_fit(
    objective: Floats,
    weights: Floats,
    slack: Floats,
    units: Indices,
    choice: Indices,
    used: Floats,
    steps: int,
) -> bool:
    """Change single units in `choice`, least loss per excess first; tell whether it fits then."""
    m = len(slack)
    for _ in range(steps):
        now = 0.0
        for k in range(m):
            now += max(0.0, used[k] - slack[k]) / slack[k]
        if now == 0.0:
            return True
        best, best_relief, at = np.inf, 0.0, -1
        for i in range(len(objective)):
            old = choice[units[i]]
            relief = now
            for k in range(m):
                over = used[k] + weights[k, i] - weights[k, old] - slack[k]
                relief -= max(0.0, over) / slack[k]
            if relief <= 1e-15 * now:
                continue
            price = max(0.0, objective[i] - objective[old]) / relief
            if price < best or (price == best and relief > best_relief):
                best, best_relief, at = price, relief, i
        if at < 0:
            return False
        old = choice[units[at]]
        choice[units[at]] = at
        for k in range(m):
            used[k] += weights[k, at] - weights[k, old]
    return False


@compiled
def improve(
    objective: Floats,
    weights: Floats,
    slack: Floats,
    units: Indices,
    cross: Floats,
    prices: Floats,
    choice: Indices,
    field: Floats,
    used: Floats,
    pool: int,
    least_gain: float,
    steps: int,
) -> None:
    """Make the best single change, or where none helps the best swap, until none helps.

    `choice`, `field` (the sum of the chosen rows of `cross`) and `used` (their weights) follow.
    """
    n, m = len(objective), len(slack)
    change, priced = np.empty(n), np.empty(n)
    near = np.empty(pool, np.int64)
    for _ in range(steps):
        best, one, two = -least_gain, -1, -1
        for i in range(n):
            old = choice[units[i]]
            gain = objective[i] - objective[old] + 2.0 * (field[i] - field[old])
            change[i], price, fits = gain, gain, True
            for k in range(m):
                extra = weights[k, i] - weights[k, old]
                price += prices[k] * extra
                fits &= used[k] + extra <= slack[k]
            priced[i] = np.inf if i == old else price
            if fits and gain < best:
                best, one = gain, i
        if one < 0:
            limit, count = np.partition(priced, pool - 1)[pool - 1], 0
            for i in range(n):
                if priced[i] <= limit and priced[i] < np.inf and count < pool:
                    near[count] = i
                    count += 1
            for a in range(count):
                i = near[a]
                old_i = choice[units[i]]
                for b in range(a):
                    j = near[b]
                    old_j = choice[units[j]]
                    if units[i] == units[j]:
                        continue
                    fits = True
                    for k in range(m):
                        total = used[k] + weights[k, i] - weights[k, old_i]
                        fits &= total + weights[k, j] - weights[k, old_j] <= slack[k]
                    if not fits:
                        continue
                    both = cross[i, j] - cross[i, old_j] - cross[old_i, j] + cross[old_i, old_j]
                    gain = change[i] + change[j] + 2.0 * both
                    if gain < best:
                        best, one, two = gain, i, j
        if one < 0:
            return
        for step in range(2):
            entry = one if step == 0 else two
            if entry < 0:
                continue
            old = choice[units[entry]]
            for k in range(m):
                used[k] += weights[k, entry] - weights[k, old]
            for c in range(n):
                field[c] += cross[entry, c] - cross[old, c]
            choice[units[entry]] = entry
