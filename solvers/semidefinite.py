"""The semidefinite relaxation of the pairwise score, by an interior-point method."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpq.core.tables import Floats, Indices
from solvers.convex import Proof, is_convex, prove
from solvers.interior import Relaxation
from solvers.pairwise import Interacting, same_unit

_UNIT = float(np.finfo(np.float64).eps)


def size_of(form: Interacting) -> int:
    """Return how many equations the relaxation has."""
    free = np.diff(form.knapsack.starts) - 1
    return 1 + int((free * (free + 1) // 2).sum()) + len(form.knapsack.slack)


def relax_pairs(form: Interacting, best: Indices, score: float) -> Proof | None:
    """Return almost the best bound that a convex form of the score gives.

    `best` (entry of each unit) is a good choice and `score` what it scores; entries are counted
    from it, z_i = x_i for all others, so that a unit's sum is no condition. The relaxation has a
    matrix Z >= z z^T in place of z z^T, Z_ii = z_i, and zeros within a unit; its dual is the best
    `curvature` within units and the best prices (Poljak, Rendl and Wolkowicz 1995). Solved by
    the primal-dual predictor-corrector method of Helmberg, Rendl, Vanderbei and Wolkowicz (1996);
    each iterate proves a bound by itself (`prove`), so nothing hangs on its precision. None where
    rounding leaves none of them convex.
    """
    counted = _Counted.of(form, best, score)
    start = counted.start()
    found = counted.proof(*start)
    relaxation = Relaxation(
        quadratic=counted.quadratic,
        linear=counted.linear,
        units=counted.units,
        weights=counted.weights,
        slack=counted.slack,
    )
    for iterate in relaxation.iterates(*start):
        proof = counted.proof(*iterate)
        if proof is not None and (found is None or proof.bound > found.bound):
            found = proof
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counted:
    """The form counted from a choice: `quadratic` and `linear` of z, in units of `scale`."""

    form: Interacting
    entries: Indices  # of z in the form
    reference: Indices  # the chosen entry of the unit of each
    units: Indices
    quadratic: Floats
    inner: Floats
    linear: Floats
    weights: Floats
    slack: Floats
    squares: Floats  # the larger own score of each and its reference, without slopes
    price_unit: Floats
    scale: float

    @classmethod
    def of(cls, form: Interacting, best: Indices, score: float) -> _Counted:
        knapsack = form.knapsack
        entries = np.setdiff1d(np.arange(len(form.own)), best)
        reference = best[knapsack.units[entries]]
        whole = form.cross.copy()
        whole[same_unit(knapsack.starts)] = form.inner
        quadratic, inner = (
            m[np.ix_(entries, entries)]
            - m[np.ix_(entries, reference)]
            - m[np.ix_(reference, entries)]
            + m[np.ix_(reference, reference)]
            for m in (form.cross, whole)
        )
        units = np.unique(knapsack.units[entries], return_inverse=True)[1]
        same = units[:, None] == units
        quadratic[same], inner[~same] = 0.0, 0.0
        field = form.cross[best].sum(axis=0)
        own = form.own - form.doubt
        linear = own[entries] - own[reference] + 2.0 * (field[entries] - field[reference])
        weights = knapsack.weights[:, entries] - knapsack.weights[:, reference]
        slack = knapsack.slack - knapsack.weights[:, best].sum(axis=1)
        width = np.abs(weights).max(axis=1)
        rows = np.flatnonzero(width > 0)
        scale = abs(score) or float(np.abs(own).max()) or 1.0
        price_unit = np.zeros((len(width), len(rows)))
        price_unit[rows, np.arange(len(rows))] = scale / width[rows]
        return cls(
            form=form,
            entries=entries,
            reference=reference,
            units=units,
            quadratic=quadratic / scale,
            inner=inner / scale,
            linear=linear / scale,
            weights=weights[rows] / width[rows, None],
            slack=slack[rows] / width[rows],
            squares=np.maximum(np.diagonal(whole)[entries], np.diagonal(whole)[reference]) / scale,
            price_unit=price_unit,
            scale=scale,
        )

    def start(self) -> tuple[Floats, Floats, Floats]:
        """Return a curvature that makes the form strictly convex, a point and prices."""
        inner = self.inner.copy()
        diagonal = np.maximum(np.diagonal(inner), 1e-9 * (float(np.diagonal(inner).max()) or 1.0))
        root = np.sqrt(diagonal)
        least = float(np.linalg.eigvalsh((self.quadratic + inner) / root / root[:, None])[0])
        inner.flat[:: len(inner) + 1] += diagonal * max(0.05, 0.05 - least)
        sizes = np.bincount(self.units)
        point = np.asarray(1.0 / (sizes[self.units] + 1.0), np.float64)
        return inner, point, np.full(len(self.slack), 1e-2)

    def proof(self, curvature: Floats, point: Floats, prices: Floats) -> Proof | None:
        """Return what they prove, with the sharper `reduced` that the curvature gives.

        A step by d_i = 1 - z_i in one entry adds at least d_i^2 / (Q^-1)_ii to the tangent.
        """
        n, size = len(self.form.own), len(self.entries)
        lifted = curvature.copy()
        safe = 1e-7 * np.abs(np.diagonal(curvature)) + 64.0 * size * _UNIT * self.squares
        lifted.flat[:: size + 1] += safe
        total = self.quadratic + lifted
        root = np.sqrt(np.maximum(np.diagonal(total), 1e-300))
        scaled = total / root / root[:, None]
        if not is_convex(scaled):
            return None
        whole, everywhere = np.zeros((n, n)), np.zeros(n)
        whole[np.ix_(self.entries, self.entries)] = lifted * self.scale
        everywhere[self.entries] = point
        chosen = np.ones(n, np.bool_)
        chosen[self.entries] = False
        starts = self.form.knapsack.starts
        everywhere[chosen] = 1.0 - np.add.reduceat(everywhere, starts[:-1])
        found = prove(self.form, whole, everywhere, self.price_unit @ prices)
        with np.errstate(divide="ignore", over="ignore"):
            away = np.square((1.0 - point) * root) / np.diagonal(np.linalg.inv(scaled))
        reduced = found.reduced.copy()
        reduced[self.entries] += (1.0 - 1e-3) * self.scale * away
        return Proof(bound=found.bound, reduced=reduced)
