"""The Lagrangian dual of a knapsack: a price for each budget and a proven lower bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mpq.core.tables import Floats, Indices
from solvers.compiled import compiled
from solvers.knapsack import Knapsack
from solvers.search import exact_sum

_SAMPLE = 1000  # units that the first guess of the prices looks at
_ROUNDING = 1e-13  # of a sum of a few products of positive numbers
_PRECISION = 1e-14  # of the dual's value
_RESTARTS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Dual:
    """What prices of the budgets prove.

    `bound` = sum_u min_i (objective + prices . weights) - prices . slack is below every choice
    that fits, and a choice that takes entry i is worth at least `bound + reduced[i]` (Lagrange;
    Everett 1963). Both are lowered by what rounding could add. `least[u]` is the entry of unit u
    that takes the minimum.
    """

    prices: Floats
    bound: float
    reduced: Floats
    least: Indices


def maximise_dual(knapsack: Knapsack) -> Dual | None:
    """Return almost the best prices; None where the dual proves that nothing fits.

    The ellipsoid method with deep cuts (Shor 1977) in one dimension per budget, about 100
    evaluations; units whose cheapest entry is the same at all prices that are left are frozen.
    """
    scale = float(knapsack.objective.max(initial=0.0)) or 1.0
    objective = knapsack.objective / scale
    weights = knapsack.weights / knapsack.slack[:, None]
    most = float(np.maximum.reduceat(knapsack.objective, knapsack.starts[:-1]).sum()) * (1 + 1e-9)

    def at(prices: Floats) -> Dual:
        priced = prices / knapsack.slack * scale
        return at_prices(
            knapsack.objective, knapsack.weights, knapsack.starts, knapsack.slack, priced
        )

    prices, radius = _start(objective, weights, knapsack.starts)
    found, inside = at(prices), False
    for _ in range(_RESTARTS):
        prices, _, inside = climb(
            objective, weights, np.ones(len(weights)), knapsack.starts, prices, radius
        )
        found = at(prices)
        if inside or found.bound > most:
            break
        radius *= 16
    return None if found.bound > most else found


def at_prices(
    objective: Floats,
    weights: Floats,
    starts: Indices,
    slack: Floats,
    prices: Floats,
    worth: float = 0.0,
) -> Dual:
    """Return what these prices prove, beside what is `worth` something already."""
    units = len(starts) - 1
    least, lowest, reduced = np.empty(units, np.int64), np.empty(units), np.empty(len(objective))
    price_all(objective, weights, starts, prices, least, lowest, reduced)
    spent = prices * slack
    size = abs(worth) + float(lowest.sum()) + float(np.abs(spent).sum())
    high, low = exact_sum(lowest, worth - _ROUNDING * size, 0.0)
    bound = math.fsum([high, low, *(-spent)])
    return Dual(prices=prices, bound=bound, reduced=reduced, least=least)


def climb(
    objective: Floats,
    weights: Floats,
    slack: Floats,
    starts: Indices,
    start: Floats,
    radius: float,
) -> tuple[Floats, float, bool]:
    """Return the best prices within a ball, the dual there, and whether they are inside it."""
    m = len(slack)
    vectors = np.zeros((7, m))
    vectors[0] = start
    active, axes = np.empty(len(starts) - 1, np.int64), np.empty((m, m))
    value, inside = ascend(
        objective, weights, slack, starts, radius, _PRECISION, active, axes, vectors
    )
    return vectors[1], value, inside


def _start(objective: Floats, weights: Floats, starts: Indices) -> tuple[Floats, float]:
    """Return prices to begin with, of many units the best of a sample, and how far to look."""
    radius = 4.0 * _price_scale(objective, weights, starts)
    prices, step = np.full(len(weights), radius / 2), (len(starts) - 1) // (10 * _SAMPLE)
    if step < 2:
        return prices, radius
    sizes = np.diff(starts)
    units = np.arange(0, len(sizes), step)
    entries = np.concatenate([np.arange(starts[u], starts[u + 1]) for u in units])
    slack = np.full(len(weights), len(units) / len(sizes))
    begins = np.concatenate([[0], np.cumsum(sizes[units])])
    found, _, inside = climb(objective[entries], weights[:, entries], slack, begins, prices, radius)
    return (found, 0.1 * float(found.max())) if inside else (prices, radius)


def _price_scale(objective: Floats, weights: Floats, starts: Indices) -> float:
    """Return the largest price that a budget has when it is the only one."""
    sizes, step = np.diff(starts), max(1, (len(starts) - 1) // _SAMPLE)
    units = np.arange(0, len(sizes), step)
    entries = np.concatenate([np.arange(starts[u], starts[u + 1]) for u in units])
    begins = np.concatenate([[0], np.cumsum(sizes[units])])
    owner = np.repeat(np.arange(len(units)), sizes[units])
    some, share = objective[entries], len(units) / len(sizes)
    least, lowest = np.empty(len(units), np.int64), np.empty(len(units))
    reduced, found = np.empty(len(some)), 0.0
    for row in weights[:, entries]:

        def used(price: float, row: Floats = row) -> Floats:
            price_all(some, row[None], begins, np.array([price]), least, lowest, reduced)
            return row[least]

        free = used(0.0)
        saved = free[owner] - row
        breaks = np.sort(some[saved > 0] / saved[saved > 0])
        low, high = 0, len(breaks)
        while low < high:
            middle = (low + high) // 2
            fits = used(float(breaks[middle])).sum() <= share
            low, high = (low, middle) if fits else (middle + 1, high)
        if free.sum() > share and len(breaks):
            found = max(found, float(breaks[min(low, len(breaks) - 1)]))
    return found or float(some.max(initial=0.0)) or 1.0


@compiled
def price_all(
    objective: Floats,
    weights: Floats,
    starts: Indices,
    prices: Floats,
    least: Indices,
    lowest: Floats,
    reduced: Floats,
) -> None:
    """Fill in each unit's entry of least price, that price, and what other entries are above."""
    for u in range(len(starts) - 1):
        best, at = np.inf, starts[u]
        for i in range(starts[u], starts[u + 1]):
            price = objective[i]
            for k in range(len(prices)):
                price += prices[k] * weights[k, i]
            reduced[i] = price
            if price < best:
                best, at = price, i
        least[u], lowest[u] = at, best
        for i in range(starts[u], starts[u + 1]):
            reduced[i] = max(0.0, reduced[i] - best - 1e-14 * reduced[i])


@compiled
def ascend(
    objective: Floats,
    weights: Floats,
    slack: Floats,
    starts: Indices,
    radius: float,
    precision: float,
    active: Indices,
    axes: Floats,
    vectors: Floats,
) -> tuple[float, bool]:
    """Maximise the dual over prices >= 0, begun in a ball around `vectors[0]`.

    Returns the value at the best prices, which `vectors[1]` becomes, and whether they are
    clearly inside the ball. `active` (units,), `axes` (m, m) and `vectors` (7, m) are room to
    work in.
    """
    start, prices, centre, slope, step, frozen, turn = (
        vectors[0],
        vectors[1],
        vectors[2],
        vectors[3],
        vectors[4],
        vectors[5],
        vectors[6],
    )
    m, num_active = len(slack), len(active)
    ball = radius * float(m) ** 0.5
    for k in range(m):
        centre[k] = prices[k] = start[k]
        frozen[k] = 0.0
        for j in range(m):
            axes[k, j] = ball if j == k else 0.0
    for u in range(num_active):
        active[u] = u
    frozen_value, best, ceiling, freezing = 0.0, -1e308, 1e308, 0
    for _ in range(200 * m):
        worst = 0
        for k in range(m):
            if centre[k] < centre[worst]:
                worst = k
        inside = centre[worst] >= 0.0
        value, depth = best, 0.0
        if inside:
            value = frozen_value
            for k in range(m):
                slope[k] = frozen[k] - slack[k]
            freezing += 1
            kept = 0
            for a in range(num_active):
                u = active[a]
                least, at = 1e308, starts[u]
                for i in range(starts[u], starts[u + 1]):
                    price = objective[i]
                    for k in range(m):
                        price += centre[k] * weights[k, i]
                    if price < least:
                        least, at = price, i
                value += objective[at]
                for k in range(m):
                    slope[k] += weights[k, at]
                settled = freezing % (4 * m) == 0
                if settled:  # the cheapest entry at all prices in the ellipsoid?
                    for i in range(starts[u], starts[u + 1]):
                        above, spread = objective[i] - objective[at], 0.0
                        for k in range(m):
                            above += centre[k] * (weights[k, i] - weights[k, at])
                        for j in range(m):
                            along = 0.0
                            for k in range(m):
                                along += (weights[k, i] - weights[k, at]) * axes[k, j]
                            spread += along * along
                        unsure = above <= 1e-12 * least or above * above <= 1.001 * spread
                        if i != at and unsure:
                            settled = False
                            break
                if settled:
                    frozen_value += objective[at]
                    for k in range(m):
                        frozen[k] += weights[k, at]
                else:
                    active[kept] = u
                    kept += 1
            num_active = kept
            for k in range(m):
                value += centre[k] * slope[k]
            if value > best:
                best = value
                for k in range(m):
                    prices[k] = centre[k]
            depth = best - value
        else:
            for k in range(m):
                slope[k] = 1.0 if k == worst else 0.0
            depth = -centre[worst]
        length = 0.0
        for j in range(m):
            turn[j] = 0.0
            for k in range(m):
                turn[j] += axes[k, j] * slope[k]
            length += turn[j] * turn[j]
        length = length**0.5
        if inside:
            ceiling = min(ceiling, value + length)
            if ceiling - best <= precision * abs(best):
                break
        if depth >= length:
            break
        alpha = depth / length
        for j in range(m):
            turn[j] /= length
        for k in range(m):
            step[k] = 0.0
            for j in range(m):
                step[k] += axes[k, j] * turn[j]
            centre[k] += (1 + m * alpha) / (m + 1) * step[k]
        if m == 1:
            axes[0, 0] *= (1 - alpha) / 2
            continue
        grow = (m * m / (m * m - 1.0) * (1 - alpha * alpha)) ** 0.5
        shrink = 1 - max(0.0, 1 - 2 * (1 + m * alpha) / ((m + 1) * (1 + alpha))) ** 0.5
        for k in range(m):
            for j in range(m):
                axes[k, j] = grow * (axes[k, j] - shrink * step[k] * turn[j])
    far = 0.0
    for k in range(m):
        far += (prices[k] - start[k]) ** 2
    return best, far < (0.9 * ball) ** 2
