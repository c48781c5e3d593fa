"""A semidefinite program over 0/1 vectors with at most one 1 per unit, by an interior point."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mpq.core.tables import Floats, Indices

_ITERATIONS = 40
_CLOSE = 5e-3  # difference of the two objectives that is near enough
_STEP = 0.95  # of the way to the edge


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxation:
    """Minimise z^T quadratic z + linear . z, weights . z <= slack, over z_i in {0, 1}, relaxed.

    X = [[1, z^T], [z, Z]] is positive semidefinite, Z_ii = z_i, and Z_ij = 0 within `units`
    (ascending); `quadratic` is zero there. All numbers should be about 1 in size.
    """

    quadratic: Floats
    linear: Floats
    units: Indices
    weights: Floats
    slack: Floats

    def iterates(
        self, curvature: Floats, point: Floats, prices: Floats
    ) -> Iterator[tuple[Floats, Floats, Floats]]:
        """Yield better and better multipliers of the zeros and of Z_ii = z_i, z, and prices.

        They begin at a `curvature` (n, n), zero between units, that makes the quadratic form
        positive definite. The primal-dual predictor-corrector method of Helmberg, Rendl,
        Vanderbei and Wolkowicz (1996).
        """
        same = self.units[:, None] == self.units
        path = None
        for _ in range(_ITERATIONS):
            try:
                path = path or _Path(self, curvature, point, prices)
                if path.gap() < _CLOSE:
                    return
                path.advance()
            except np.linalg.LinAlgError:
                return
            yield np.where(same, path.s[1:, 1:], 0.0), path.x[0, 1:], path.prices


class _Path:
    """X, its dual S, what is left of the slacks, and the multipliers of all equations."""

    def __init__(
        self, relaxation: Relaxation, curvature: Floats, point: Floats, prices: Floats
    ) -> None:
        size = len(point)
        self.equations = _Equations(relaxation.units, relaxation.weights)
        self.right = np.zeros(self.equations.count)
        self.right[0] = 1.0
        self.right[self.equations.rows :] = relaxation.slack
        self.x = np.ones((size + 1, size + 1))
        self.x[0, 1:] = self.x[1:, 0] = point
        same = relaxation.units[:, None] == relaxation.units
        product = np.outer(point, point)
        self.x[1:, 1:] = np.where(same, np.diag(point), product)
        objective = np.zeros((size + 1, size + 1))
        objective[1:, 1:] = relaxation.quadratic
        objective[0, 1:] = objective[1:, 0] = relaxation.linear / 2
        self.dual = self.equations.multipliers(curvature, prices)
        self.s = objective - self.equations.combine(self.dual)
        cut = self.s[0, 1:]
        self.dual[0] = -float(cut @ np.linalg.solve(self.s[1:, 1:], cut)) - 1.0
        self.s[0, 0] = -self.dual[0]
        away = relaxation.slack - relaxation.weights @ point
        self.left = np.maximum(away, 0.1 + 0.1 * np.abs(relaxation.slack))

    @property
    def prices(self) -> Floats:
        return -self.dual[self.equations.rows :]

    def gap(self) -> float:
        """Return X . S, the difference of the two objectives once X meets the equations."""
        return float((self.x * self.s).sum() + self.left @ self.prices)

    def advance(self) -> None:
        """Take one step; raises LinAlgError at the end of what the precision allows."""
        inverse = np.linalg.inv(self.s)
        inverse = (inverse + inverse.T) / 2
        matrix = self.equations.schur(self.x, inverse)
        slacks = np.arange(self.equations.rows, self.equations.count)
        matrix[slacks, slacks] += self.left / self.prices
        root = np.sqrt(np.diagonal(matrix))
        matrix /= root
        matrix /= root[:, None]
        missing = self.right - self.equations.apply(self.x)
        missing[slacks] -= self.left
        centre = self.gap() / (len(self.x) + len(self.left))

        def direction(target: float, second: Floats, second_left: Floats) -> _Step:
            wanted = target * inverse - self.x - second
            wanted_left = target / self.prices - self.left - second_left
            right = missing - self.equations.apply(wanted)
            right[slacks] -= wanted_left
            dual = np.linalg.solve(matrix, right / root) / root
            s = -self.equations.combine(dual)
            x = wanted - self.x @ s @ inverse
            left = wanted_left + self.left / self.prices * dual[slacks]
            return _Step(x=(x + x.T) / 2, s=s, dual=dual, left=left)

        first = direction(0.0, np.zeros_like(self.x), np.zeros_like(self.left))
        far, far_dual = self._reach(first)
        after = float(((self.x + far * first.x) * (self.s + far_dual * first.s)).sum())
        after += float(
            (self.left + far * first.left) @ (self.prices - far_dual * first.dual[slacks])
        )
        share = after / self.gap()
        target = centre * min(1.0, max(1e-3, share * share))
        mixed = first.x @ first.s @ inverse
        bent = -first.left * first.dual[slacks] / self.prices
        step = direction(target, (mixed + mixed.T) / 2, bent)
        far, far_dual = self._reach(step)
        self.x, self.left = self.x + far * step.x, self.left + far * step.left
        self.s, self.dual = self.s + far_dual * step.s, self.dual + far_dual * step.dual

    def _reach(self, step: _Step) -> tuple[float, float]:
        """Return how far X and S can go and stay positive definite, at most 1."""
        rows = self.equations.rows
        return (
            min(_until_singular(self.x, step.x), _until_zero(self.left, step.left)),
            min(_until_singular(self.s, step.s), _until_zero(self.prices, -step.dual[rows:])),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    x: Floats
    s: Floats
    dual: Floats
    left: Floats


class _Equations:
    """A_k . X = (a_k^T X b_k + b_k^T X a_k) / 2, then weights . diag X.

    First e_0 e_0^T, then e_i (e_i - e_0)^T for each i, then e_i e_j^T for pairs within units.
    """

    def __init__(self, units: Indices, weights: Floats) -> None:
        self.size, self.weights = len(units), weights
        i, j = np.nonzero(np.triu(units[:, None] == units, 1))
        arrows = np.arange(self.size + 1)
        self.first, self.second = np.r_[arrows, i + 1], np.r_[arrows, j + 1]
        self.rows = len(self.first)
        self.count = self.rows + len(weights)

    def apply(self, matrix: Floats) -> Floats:
        """Return A_k . matrix for all k."""
        found = matrix[self.first, self.second]
        diagonal = np.diagonal(matrix)[1:]
        found[1 : self.size + 1] = diagonal - matrix[0, 1:]
        return np.concatenate([found, self.weights @ diagonal])

    def combine(self, dual: Floats) -> Floats:
        """Return sum_k dual_k A_k."""
        found = np.zeros((self.size + 1, self.size + 1))
        found[self.first, self.second] = dual[: self.rows] / 2
        found[self.second, self.first] = dual[: self.rows] / 2
        arrows = dual[1 : self.size + 1]
        found[0, 1:] = found[1:, 0] = -arrows / 2
        place = np.arange(1, self.size + 1)
        found[place, place] = arrows + dual[self.rows :] @ self.weights
        found[0, 0] = dual[0]
        return found

    def multipliers(self, curvature: Floats, prices: Floats) -> Floats:
        """Return the multipliers that leave a curvature and prices; the first is 0."""
        dual = np.zeros(self.count)
        pairs = slice(self.size + 1, self.rows)
        dual[pairs] = -2.0 * curvature[self.first[pairs] - 1, self.second[pairs] - 1]
        dual[1 : self.size + 1] = prices @ self.weights - np.diagonal(curvature)
        dual[self.rows :] = -prices
        return dual

    def schur(self, x: Floats, inverse: Floats) -> Floats:
        """Return M with M[k, l] = A_k . (X A_l S^-1), which is symmetric."""
        xa, xb = x[self.first], self._seconds(x)  # rows a_k^T X and b_k^T X
        sa, sb = inverse[self.first], self._seconds(inverse)
        x_ba, s_ba = xb[:, self.first], sb[:, self.first]
        found = np.empty((self.count, self.count))
        square = found[: self.rows, : self.rows]
        np.multiply(x_ba, s_ba.T, out=square)
        square += square.T.copy()
        square += self._seconds(xb.T).T * sa[:, self.first]
        square += xa[:, self.first] * self._seconds(sb.T).T
        square *= 0.25
        diagonal = self.weights @ ((xa * sb + xb * sa)[:, 1:].T / 2)
        found[self.rows :, : self.rows] = diagonal
        found[: self.rows, self.rows :] = diagonal.T
        both = (x * inverse)[1:, 1:]
        found[self.rows :, self.rows :] = self.weights @ both @ self.weights.T
        return found

    def _seconds(self, matrix: Floats) -> Floats:
        """Return the rows b_k^T matrix."""
        found = matrix[self.second]
        found[1 : self.size + 1] -= matrix[0]
        return found


def _until_singular(matrix: Floats, step: Floats) -> float:
    """Return how far a positive definite matrix can go along a step, within a factor."""
    factor = np.linalg.inv(np.linalg.cholesky(matrix))
    least = float(np.linalg.eigvalsh(factor @ step @ factor.T)[0])
    return 1.0 if least >= -_STEP else -_STEP / least


def _until_zero(values: Floats, step: Floats) -> float:
    falling = step < 0
    ratios = -_STEP * values[falling] / step[falling]
    return min(1.0, float(ratios.min(initial=1.0)))
