"""What a convex form of the pairwise score proves at a point."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpq.core.sums import exact_sum
from mpq.core.tables import Floats
from solvers.pairwise import Interacting

_UNIT = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """No choice that fits scores below `bound`, none that takes entry i below bound + reduced[i].

    Both are lowered by what rounding could add.
    """

    bound: float
    reduced: Floats


def is_convex(matrix: Floats) -> bool:
    """Tell whether a symmetric matrix surely has no negative eigenvalue.

    Scaled to a unit diagonal, a Cholesky factor that is found proves all eigenvalues to be above
    -(n + 2) u trace (Higham 2002, theorem 10.3); so much is taken off first.
    """
    diagonal = np.diagonal(matrix)
    if (diagonal < 0).any():
        return False
    some = np.flatnonzero(diagonal > 0)
    if matrix[diagonal == 0].any():
        return False
    if not len(some):
        return True
    root = np.sqrt(diagonal[some])
    scaled = matrix[np.ix_(some, some)] if len(some) < len(matrix) else matrix.copy()
    scaled /= root[:, None]
    scaled /= root
    scaled.flat[:: len(some) + 1] -= 2.0 * (len(some) + 8) ** 2 * _UNIT
    try:
        np.linalg.cholesky(scaled)
    except np.linalg.LinAlgError:
        return False
    return True


def prove(form: Interacting, curvature: Floats, point: Floats, prices: Floats) -> Proof:
    """Return what the tangent at a point proves.

    `curvature` (n, n) is zero between units. As x^2 = x for a one-hot x, the score is
    x^T (cross + curvature) x + (own - diag curvature) . x. Where that is convex, at least for
    steps that keep the sum 1 of each unit, it is above its tangent at the `point` of the
    relaxation (sums 1, any sign), and the least of the tangent is bounded by any `prices` >= 0
    (Lagrange).
    """
    knapsack, n = form.knapsack, len(form.own)
    shift = np.diagonal(curvature)
    slope = form.cross @ point + curvature @ point
    priced = prices @ knapsack.weights
    tangent = form.own - form.doubt - shift + 2.0 * slope + priced
    size = np.abs(point)
    around = np.abs(form.cross) @ size + np.abs(curvature) @ size
    error = 4.0 * (n + 8) * _UNIT
    lowered = tangent - error * (np.abs(form.own) + np.abs(shift) + 2.0 * around + priced)
    least = np.minimum.reduceat(lowered, knapsack.starts[:-1])
    spent = prices * knapsack.slack
    rest = exact_sum(np.concatenate([least, -spent, [-float(point @ slope)]]))
    lost = float(size @ around) + float(np.abs(least).sum() + np.abs(spent).sum())
    return Proof(
        bound=rest - error * lost,
        reduced=np.maximum(0.0, lowered - least[knapsack.units]),
    )
