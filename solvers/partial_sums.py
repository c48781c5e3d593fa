"""Layer by layer: all partial sums of several values that no other partial sum dominates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mpq.core.errors import InvalidInputError
from mpq.core.tables import Cells, Floats, Indices
from solvers.dominance import Sums, undominated

_ROUNDING = 1e-12  # of the numbers that are added up to be compared with a limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What every sum is to end within: sum_k weights[k] * value k <= most."""

    weights: Floats
    most: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What a choice comes to (values, n), correctly rounded, and how each came about.

    `parents[u][i]` tells of sum i after unit u which place of the unit it took beside which of
    the `num_sums[u]` sums before: place * num_sums[u] + sum.
    """

    cells: Cells
    totals: Floats
    num_sums: tuple[int, ...]
    parents: tuple[npt.NDArray[np.integer], ...]

    def cells_of(self, numbers: Indices) -> Indices:
        """Return the cell of every unit (numbers, units) of some of the choices."""
        found = np.empty((len(numbers), len(self.parents)), np.int64)
        for u in reversed(range(len(self.parents))):
            places, numbers = np.divmod(self.parents[u][numbers], self.num_sums[u])
            found[:, u] = self.cells.offsets[u] + places
        return found


def undominated_choices(
    cells: Cells, values: Floats, cuts: Sequence[Cut], max_states: int
) -> Choices:
    """Return one choice for each vector of totals of `values` that no other dominates.

    `values` (values, num_cells). Sums are exact but for about 2^-104 of the largest number in
    them, so it is the totals as `math.fsum` rounds them that are compared. Partial sums that
    cannot end within a cut are dropped; a total may exceed it by rounding.
    Raises InvalidInputError (`too_many_states`) where more than `max_states` sums are left.
    """
    sums: Sums = np.zeros((len(values), 1), np.complex128)
    bounds = [_least_of_rest(cells, values, cut) for cut in cuts]
    num_sums: list[int] = []
    parents: list[npt.NDArray[np.integer]] = []
    for u, unit in enumerate(cells.units):
        own = range(cells.offsets[u], cells.offsets[u + 1])
        longer = np.concatenate([_plus(sums, values[:, i]) for i in own], axis=1)
        alive = np.ones(longer.shape[1], np.bool_)
        for cut, (least, most) in zip(cuts, bounds, strict=True):
            alive &= cut.weights @ longer.real <= most - least[u]
        living = np.flatnonzero(alive)
        kept = living[undominated(longer[:, living])]
        if len(kept) > max_states:
            raise InvalidInputError(
                "too_many_states",
                f"{len(kept):,} sums of cost and score are left after unit {unit!r} ({u + 1} of "
                f"{len(cells.units)}), more than the {max_states:,} that solver 'dp' keeps: raise "
                "max_states, tighten a budget, or use solver 'auto'",
            )
        num_sums.append(sums.shape[1])
        parents.append(kept.astype(np.int32) if longer.shape[1] < 2**31 else kept)
        sums = longer[:, kept]
    return Choices(
        cells=cells,
        totals=np.ascontiguousarray(sums.real),
        num_sums=tuple(num_sums),
        parents=tuple(parents),
    )


def _plus(sums: Sums, values: Floats) -> Sums:
    """Add a number to each row; a sum is a double and what it leaves of the exact one (Knuth)."""
    high, low, value = sums.real, sums.imag, values[:, None]
    total = high + value
    back = total - high
    low = low + ((high - (total - back)) + (value - back))
    exact: Sums = np.empty_like(sums)
    exact.real = total + low
    exact.imag = low - (exact.real - total)
    return exact


def _least_of_rest(cells: Cells, values: Floats, cut: Cut) -> tuple[Floats, float]:
    """Return the least that the units after each one add, and the limit widened by rounding."""
    together = cut.weights @ values
    begins = cells.offsets[:-1]
    if not len(begins):
        return np.zeros(0), cut.most
    least = np.minimum.reduceat(together, begins)
    size = np.abs(cut.weights) @ np.maximum.reduceat(np.abs(values), begins, axis=1).sum(axis=1)
    rest = np.append(np.cumsum(least[:0:-1])[::-1], 0.0)
    return rest, cut.most + _ROUNDING * (abs(cut.most) + float(size))
