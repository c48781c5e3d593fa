"""Partial choices that may be worth less than a threshold, and the best pair of two lists."""

from __future__ import annotations

import numpy as np

from mpq.core.tables import Floats, Indices
from solvers.compiled import compiled


@compiled
def exact_sum(values: Floats, high: float, low: float) -> tuple[float, float]:
    """Return `high` + `low` + the sum of the values in two doubles (Knuth's two-sum)."""
    for value in values:
        total = high + value
        part = total - high
        low += (high - (total - part)) + (value - part)
        high = total
    return high, low


@compiled
def nearest(reduced: Floats, least: Indices, found: Floats) -> float:
    """Return the largest of the `found` smallest values of entries that are not `least`.

    `found` is room for them, filled with infinity; of fewer entries the largest finite one, 0 of
    none.
    """
    count, u = len(found), 0
    for i in range(len(reduced)):
        if u < len(least) and i == least[u]:
            u += 1
            continue
        value = reduced[i]
        if value < found[count - 1]:
            place = count - 1
            while place > 0 and found[place - 1] > value:
                found[place] = found[place - 1]
                place -= 1
            found[place] = value
    largest = 0.0
    for place in range(count):
        if found[place] < np.inf:
            largest = found[place]
    return largest


@compiled
def list_choices(
    starts: Indices,
    objective: Floats,
    costs: Floats,
    reduced: Floats,
    roots: Floats,
    threshold: float,
    place: Indices,
    reached: Floats,
    sums: Floats,
    listed: Floats,
    wanted: int,
) -> int:
    """List the choices that no bound rules out, and return their number.

    Entries of a unit stand together in the order of `reduced[:, 0]`. A choice is ruled out where
    one of the Lagrangian bounds, `roots[j]` plus the `reduced[:, j]` of what it takes, is not
    below the threshold. A row of `listed` becomes the objective, the reduced value, and for
    each budget the cost in two doubles, which is its exact sum; `sums[0]` is what they begin
    with. Depth first and always in the same order; it ends with one more than fit into `listed`,
    which it also says after trying very many entries for few choices, or at choice number
    `wanted`, whose entries, each plus one, are left in `place`.
    """
    units, num_bounds, rows = len(starts) - 1, len(roots), costs.shape[1]
    found, t, tries = 0, 0, 64 * len(listed) + 4096
    place[0] = starts[0]
    for j in range(num_bounds):
        reached[0, j] = roots[j]
    while t >= 0:
        i = place[t]
        tries -= 1
        if tries < 0 and wanted < 0:
            return len(listed) + 1
        if i == starts[t + 1]:
            t -= 1
            continue
        place[t] = i + 1
        if reached[t, 0] + reduced[i, 0] >= threshold:
            t -= 1  # and so would all that follow in this unit
            continue
        cut = False
        for j in range(num_bounds):
            bound = reached[t, j] + reduced[i, j]
            reached[t + 1, j] = bound
            cut |= bound >= threshold
        if cut:
            continue
        sums[t + 1, 0] = sums[t, 0] + objective[i]
        sums[t + 1, 1] = sums[t, 1] + reduced[i, 0]
        for k in range(rows):
            value, high = costs[i, k], sums[t, 2 * k + 2]
            total = high + value
            part = total - high
            sums[t + 1, 2 * k + 2] = total
            sums[t + 1, 2 * k + 3] = sums[t, 2 * k + 3] + ((high - (total - part)) + (value - part))
        if t + 1 < units:
            t += 1
            place[t] = starts[t]
            continue
        if found == wanted:
            return found
        if found == len(listed):
            return found + 1
        for k in range(2 * rows + 2):
            listed[found, k] = sums[t + 1, k]
        found += 1
    return found


@compiled
def best_pair(
    first: Floats,
    second: Floats,
    strips: Indices,
    origin: float,
    width: float,
    keys: Indices,
    prices: Floats,
    needed: Floats,
    base: float,
    fixed: Floats,
    limits: Floats,
    generous: Floats,
    threshold: float,
) -> tuple[float, int, int]:
    """Return the least worth below `threshold` of two rows that together fit, and the rows.

    A pair is worth at least `base` plus both reduced values plus price times what it leaves of
    a budget; so it must take nearly all of a budget that has a price, and few pairs do. Of the
    second list, rows `strips[s]` to `strips[s + 1]` have costs of budget `keys[0]` in strip s
    from `origin` on, and are ordered by their costs of budget `keys[1]`. `needed[k]` is what
    both take where nothing is left, `generous[k]` somewhat above it: the limits themselves are
    compared with the exact sum. -1, -1 where there is no pair.
    """
    rows, num_strips = len(limits), len(strips) - 1
    best, one, two = threshold, -1, -1
    k1, k2 = keys[0], keys[1]
    for a in range(len(first)):
        room = best - base - first[a, 1]
        if room <= 0.0:
            continue
        high1, high2 = generous[k1] - first[a, 2 * k1 + 2], generous[k2] - first[a, 2 * k2 + 2]
        low1, low2 = -1e308, -1e308
        if prices[k1] > 0.0:
            low1 = needed[k1] - first[a, 2 * k1 + 2] - room / prices[k1]
        if prices[k2] > 0.0:
            low2 = needed[k2] - first[a, 2 * k2 + 2] - room / prices[k2]
        begin, end = (low1 - origin) / width, (high1 - origin) / width
        if end < 0.0 or begin >= num_strips:
            continue
        for s in range(int(max(begin, 0.0)), int(min(end, num_strips - 1.0)) + 1):
            low, high = strips[s], strips[s + 1]
            while low < high:
                middle = (low + high) // 2
                if second[middle, 2 * k2 + 2] < low2:
                    low = middle + 1
                else:
                    high = middle
            for b in range(low, strips[s + 1]):
                if second[b, 2 * k2 + 2] > high2:
                    break
                worth = first[a, 0] + second[b, 0]
                if worth >= best:
                    continue
                fits = True
                for k in range(rows):
                    high_a, high_b = first[a, 2 * k + 2], second[b, 2 * k + 2]
                    total = high_a + high_b
                    part = total - high_a
                    low_sum = (high_a - (total - part)) + (high_b - part)
                    low_sum += first[a, 2 * k + 3] + second[b, 2 * k + 3]
                    fits &= fixed[k] + (total + low_sum) <= limits[k]
                if fits:
                    best, one, two = worth, a, b
    return best, one, two
