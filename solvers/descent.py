"""Local search: change one unit or two at once while that lowers the score and fits."""

from __future__ import annotations

import numpy as np

from mpq.core.tables import Floats, Indices
from solvers.joint_descent import descend_with_terms, repair_with_terms
from solvers.knapsack import Knapsack

POOL = 200  # entries whose pairs are all tried; the square of it is the work of a step


def repair(knapsack: Knapsack, choice: Indices, *, steps: int = 0) -> Indices | None:
    """Change single units, least loss per excess weight first, until the choice fits.

    `choice` holds an entry of the knapsack for each unit. None where that does not succeed
    in so many `steps`, or, if 0, four for each unit.
    """
    if knapsack.terms is not None:
        return repair_with_terms(knapsack, choice, steps=steps)
    choice, starts = choice.copy(), knapsack.starts
    objective, weights = knapsack.objective, knapsack.weights
    scale = knapsack.slack[:, None]
    current = choice[knapsack.units]
    extra = weights - weights[:, current]
    for _ in range(steps or 4 * len(choice) + 1):
        over = weights[:, choice].sum(axis=1, keepdims=True) - scale
        now = float((np.maximum(0.0, over) / scale).sum())
        if now == 0.0:
            return choice
        after = extra + over
        np.maximum(0.0, after, out=after)
        after /= scale
        relief = now - after.sum(axis=0)
        useful = np.flatnonzero(relief > 1e-15 * now)
        if not len(useful):
            return None
        loss = np.maximum(0.0, objective[useful] - objective[current[useful]])
        with np.errstate(over="ignore"):
            price = loss / relief[useful]
        best = useful[price == price.min()]
        entry = int(best[np.argmax(relief[best])])
        unit = knapsack.units[entry]
        mine = slice(starts[unit], starts[unit + 1])
        choice[unit] = current[mine] = entry
        extra[:, mine] = weights[:, mine] - weights[:, entry, None]
    return None


def descend(
    knapsack: Knapsack,
    choice: Indices,
    *,
    prices: Floats,
    cross: Floats | None = None,
    field: Floats | None = None,
    pool: int = POOL,
) -> Indices:
    """Return the choice after the best single changes and swaps, none of which helps any more.

    The score is sum_u objective + sum_{u != v} cross[a(u), a(v)]; `cross` is symmetric and zero
    within a unit. Each step takes the best single change or, where none helps, the best pair of
    changes among the `pool` entries of least change in score plus `prices` . weights. `field` is
    the sum of the rows of `cross` that are chosen; it is kept so.
    """
    if knapsack.terms is not None:
        return descend_with_terms(
            knapsack, choice, prices=prices, cross=cross, field=field, pool=pool
        )
    choice, units, starts = choice.copy(), knapsack.units, knapsack.starts
    objective, weights = knapsack.objective, knapsack.weights
    if field is None:
        field = field_of(cross, choice) if cross is not None else np.zeros(len(units))
    least_gain = 1e-12 * (float(np.abs(objective).max(initial=0.0)) + float(np.abs(field).max()))
    current, used = choice[units], weights[:, choice].sum(axis=1)
    extra = weights - weights[:, current]
    for _ in range(20 * len(choice) + 100):
        room = knapsack.slack - used
        level = objective + 2.0 * field
        change = level - level[current]
        fits = extra[0] <= room[0] if len(room) else np.ones(len(units), np.bool_)
        for k in range(1, len(room)):
            fits &= extra[k] <= room[k]
        single = np.where(fits, change, np.inf)
        step = [int(single.argmin())]
        if not single[step[0]] < -least_gain:
            pair = _best_pair(knapsack, choice, cross, change, extra, room, prices, pool)
            if pair is None or not pair[0] < -least_gain:
                return choice
            step = [pair[1], pair[2]]
        for entry in step:
            unit = units[entry]
            if cross is not None:
                field += cross[entry]
                field -= cross[choice[unit]]
            choice[unit] = entry
            mine = slice(starts[unit], starts[unit + 1])
            current[mine] = entry
            extra[:, mine] = weights[:, mine] - weights[:, entry, None]
        used = weights[:, choice].sum(axis=1)
    return choice


def field_of(cross: Floats, choice: Indices) -> Floats:
    """Return the sum of the rows of `cross` that are chosen."""
    total: Floats = cross[choice].sum(axis=0)
    return total


def _best_pair(
    knapsack: Knapsack,
    choice: Indices,
    cross: Floats | None,
    change: Floats,
    extra: Floats,
    room: Floats,
    prices: Floats,
    pool: int,
) -> tuple[float, int, int] | None:
    """Return the change in score of the best two changes at once that fit, and the entries."""
    units = knapsack.units
    priced = change + prices @ extra
    priced[choice] = np.inf
    if pool < len(priced):
        near = np.sort(np.argpartition(priced, pool)[:pool])
    else:
        near = np.arange(len(priced))
    near = near[np.isfinite(priced[near])]
    if not len(near):
        return None
    both = change[near][:, None] + change[near]
    if cross is not None:
        old = choice[units[near]]
        ends = np.concatenate([near, old])
        rows = cross[near[:, None], ends] - cross[old[:, None], ends]
        both += 2.0 * (rows[:, : len(near)] - rows[:, len(near) :])
    fits = units[near][:, None] != units[near]
    for k, row in enumerate(extra[:, near]):
        fits &= row[:, None] + row <= room[k]
    both[~fits] = np.inf
    i, j = divmod(int(both.argmin()), len(near))
    return float(both[i, j]), int(near[i]), int(near[j])
