"""A convex form of the pairwise score of many cells, and the least point of its relaxation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mpq.core.tables import Floats, Indices
from solvers.compiled import compiled
from solvers.convex import Proof, is_convex, prove
from solvers.lagrange import maximise_dual
from solvers.pairwise import Interacting, same_unit

_STEPS = 12  # of Lanczos
_TRIES = (0.9, 0.75, 0.5, 0.0, -0.5, -2.0)  # shares of it; Lanczos ends a little above it
_PASSES = 60  # over the units, between two changes of the prices
_ROUNDS = 12
_PRECISION = 1e-4  # of the score


def shift_pairs(form: Interacting, best: Indices, score: float) -> Proof | None:
    """Return the bound of the form made convex by one shift, None where none is found.

    G with all that it has within units is convex almost or more than that, so that an equal
    share of each own score moves from the square to the linear term (Hammer and Rubin 1970):
    as much as leaves it convex, or as little as makes it so. `best` (entry of each unit), a good
    choice, is where the search for the least point begins.
    """
    rows, columns = same_unit(form.knapsack.starts)
    whole = form.cross.copy()
    whole[rows, columns] = form.inner
    diagonal = np.diagonal(whole).copy()
    root = np.sqrt(diagonal)
    least = _least_eigenvalue(whole, root)
    for share in _TRIES:
        shift = share * least if least > 0 else least * (2.0 - share) - 0.01
        whole.flat[:: len(whole) + 1] = diagonal * (1.0 - shift)
        if is_convex(whole):
            break
    else:
        return None
    curvature = np.zeros_like(whole)
    curvature[rows, columns] = whole[rows, columns]
    point = _least_point(form, whole, best, score)
    return prove(form, curvature, point, _prices(form, whole, point))


def _least_eigenvalue(matrix: Floats, root: Floats) -> float:
    """Return about the least eigenvalue of the matrix scaled to a unit diagonal (Lanczos)."""
    some = np.flatnonzero(root > 0)
    if not len(some):
        return 0.0
    scaled = (matrix[np.ix_(some, some)] / root[some] / root[some][:, None]).astype(np.float32)
    vector = np.random.default_rng(0).normal(size=len(some)).astype(np.float32)
    basis = [vector / np.linalg.norm(vector)]
    along, across = [], []
    for _ in range(min(_STEPS, len(some))):
        product = scaled @ basis[-1]
        along.append(float(product @ basis[-1]))
        for earlier in basis:
            product -= (earlier @ product) * earlier
        across.append(float(np.linalg.norm(product)))
        if across[-1] < 1e-5:
            break
        basis.append(product / across[-1])
    off = across[: len(along) - 1]
    return float(np.linalg.eigvalsh(np.diag(along) + np.diag(off, 1) + np.diag(off, -1))[0])


def _least_point(form: Interacting, whole: Floats, best: Indices, score: float) -> Floats:
    """Return almost the least point of the relaxed form under the budgets."""
    knapsack = form.knapsack
    point = np.zeros(len(form.own))
    point[best] = 1.0
    linear = form.own - np.diagonal(whole)
    slope = 2.0 * whole[best].sum(axis=0) + linear
    rows = np.flatnonzero(knapsack.weights.any(axis=1))
    weights = knapsack.weights[rows] / knapsack.slack[rows, None]
    scale = abs(score) or float(np.abs(form.own).max()) or 1.0
    prices, room = np.zeros(len(rows)), weights @ point - 1.0
    for _ in range(_ROUNDS):
        moved = balance(
            whole,
            weights,
            knapsack.starts,
            point,
            slope,
            room,
            prices,
            10.0 * scale,
            _PASSES,
            _PRECISION * scale / len(best),
        )
        before = prices
        prices = np.maximum(0.0, prices + 10.0 * scale * room)
        if not moved or np.abs(prices - before).max(initial=0.0) < 1e-3 * scale:
            break
    return point


def _prices(form: Interacting, whole: Floats, point: Floats) -> Floats:
    """Return the best prices for the tangent at a point."""
    knapsack = form.knapsack
    tangent = 2.0 * (whole @ point) + form.own - np.diagonal(whole)
    least = np.minimum.reduceat(tangent, knapsack.starts[:-1])
    prices = np.zeros(len(knapsack.slack))
    rows = np.flatnonzero(knapsack.weights.any(axis=1))
    if len(rows):
        linear = replace(
            knapsack,
            objective=tangent - least[knapsack.units],
            weights=knapsack.weights[rows],
            slack=knapsack.slack[rows],
        )
        dual = maximise_dual(linear)
        if dual is not None:
            prices[rows] = dual.prices
    return prices


@compiled
def balance(
    whole: Floats,
    weights: Floats,
    starts: Indices,
    point: Floats,
    slope: Floats,
    room: Floats,
    prices: Floats,
    penalty: float,
    passes: int,
    precision: float,
) -> int:
    """Move shares between two entries of a unit while that lowers the penalised form.

    `slope` is the gradient of the form at the `point`, `room` what the weights are above 1; all
    three are kept so. Beside the form stand `prices` . room and penalty/2 room^2, where they rise
    (augmented Lagrangian). The two are the entry of least slope and the one of largest among
    those that have a share. Returns how many moves were made; none promises `precision` or more.
    """
    moves, m = 0, len(prices)
    dear = np.empty(m)
    for _ in range(passes):
        moved = 0
        for u in range(len(starts) - 1):
            for k in range(m):
                dear[k] = max(0.0, prices[k] + penalty * room[k])
            low, high, low_at, high_at = np.inf, -np.inf, -1, -1
            for i in range(starts[u], starts[u + 1]):
                value = slope[i]
                for k in range(m):
                    value += dear[k] * weights[k, i]
                if value < low:
                    low, low_at = value, i
                if point[i] > 0.0 and value > high:
                    high, high_at = value, i
            if low_at == high_at or (high - low) * point[high_at] <= precision:
                continue
            i, j = low_at, high_at
            bend = 2.0 * (whole[i, i] + whole[j, j] - 2.0 * whole[i, j])
            for k in range(m):
                if dear[k] > 0.0:
                    bend += penalty * (weights[k, i] - weights[k, j]) ** 2
            share = point[j]
            if bend * share > high - low:
                share = (high - low) / bend
                point[j] -= share
            else:
                point[j] = 0.0
            point[i] += share
            for c in range(len(slope)):
                slope[c] += 2.0 * share * (whole[i, c] - whole[j, c])
            for k in range(m):
                room[k] += share * (weights[k, i] - weights[k, j])
            moved += 1
        moves += moved
        if moved == 0:
            break
    return moves
