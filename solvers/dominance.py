"""The vectors that no other vector dominates, of many at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mpq.core.tables import Indices
from solvers.knapsack import Mask

# Exact sums: a double, and as the imaginary part what the sum exceeds it by. NumPy orders complex
# numbers by their real parts, then by their imaginary parts: by the exact sums.
Sums = npt.NDArray[np.complex128]

_FEW = 64  # vectors of which all pairs are compared
_EARLIER = np.triu(np.ones((_FEW, _FEW), np.bool_), 1)
_PAIRS = 2**22  # compared at once


def undominated(values: Sums) -> Indices:
    """Return the columns of (dimensions, n) that no other is nowhere above and somewhere below.

    In ascending order of the first value, then of the others; of equal columns the first.
    """
    if len(values) == 2:
        return _staircase(values[0], values[1])
    ranks = np.array([_ranks(row) for row in values])
    order = np.lexsort(ranks[::-1])
    kept: Indices = order[_thinned(ranks[1:, order])]
    return kept


def _ranks(row: Sums) -> Indices:
    order = np.argsort(row, kind="stable")
    ranks = np.empty(len(row), np.int64)
    ranks[order] = np.cumsum(np.diff(row[order], prepend=row[order[:1]]) != 0)
    return ranks


def _staircase(x: Sums, y: Sums) -> Indices:
    order = np.argsort(x, kind="stable")  # merges the ascending runs that it is made of
    steps = y[order]
    lower = np.ones(len(order), np.bool_)
    lower[1:] = steps[1:] < np.minimum.accumulate(steps)[:-1]
    kept: Indices = order[lower]
    last = np.ones(len(kept), np.bool_)  # of equal x the last is the lowest
    last[:-1] = x[kept][1:] != x[kept][:-1]
    return kept[last]


def _thinned(values: Indices) -> Mask:
    """Mark the undominated of columns none of which can be beaten by a later one.

    Each half is thinned, then the later one by the earlier one (Kung, Luccio and Preparata 1975).
    """
    n = values.shape[1]
    if n <= _FEW:
        beats = _EARLIER[:n, :n].copy()
        for row in values:
            beats &= row[:, None] <= row
        return np.asarray(~beats.any(axis=0))
    middle = n // 2
    keep = np.concatenate([_thinned(values[:, :middle]), _thinned(values[:, middle:])])
    early, late = np.flatnonzero(keep[:middle]), middle + np.flatnonzero(keep[middle:])
    keep[late] = ~_beaten(values[:, late], values[:, early])
    return keep


def _beaten(values: Indices, by: Indices) -> Mask:
    """Tell which columns some column of `by` is nowhere above."""
    if len(values) == 2:
        order = np.argsort(by[0], kind="stable")
        lowest = np.minimum.accumulate(by[1, order])
        place = np.searchsorted(by[0, order], values[0], side="right")
        found: Mask = (place > 0) & (lowest[np.maximum(place, 1) - 1] <= values[1])
        return found
    beaten = np.zeros(values.shape[1], np.bool_)
    step = max(1, _PAIRS // max(1, by.shape[1]))
    for start in range(0, len(beaten), step):
        block = values[:, start : start + step]
        below = (by[:, :, None] <= block[:, None, :]).all(axis=0)
        beaten[start : start + step] = below.any(axis=0)
    return beaten
