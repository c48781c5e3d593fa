"""Rank correlation: does what was predicted order things as what was measured does?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LEAST_PAIRS = 5  # pairs: with fewer there is no error bar


@dataclass(frozen=True, slots=True)
class RankCorrelation:
    """A rank correlation between -1 and 1 and its standard error over the pairs."""

    value: float
    stderr: float


def spearman(groups: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]]) -> RankCorrelation | None:
    """Return Spearman's rho of (predicted, measured), averaged over groups.

    Pairs are compared within their group only. Ties get the mean of their ranks, and what does
    not vary correlates with nothing: 0. None where no group has 5 pairs. The standard error of a
    group of n is that of Fisher's z, sqrt(1.06 / (n - 3)) (Fieller, Hartley and Pearson 1957).
    """
    return _mean([(_pearson(ranks(p), ranks(m)), len(ranks(p))) for p, m in groups], 1.06, 3)


def kendall(groups: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]]) -> RankCorrelation | None:
    """Return Kendall's tau-b of (predicted, measured), averaged over groups; see `spearman`.

    The standard error of Fisher's z is sqrt(0.437 / (n - 4)).
    """
    found = []
    for predicted, measured in groups:
        above = [np.sign(np.subtract.outer(ranks(x), ranks(x))) for x in (predicted, measured)]
        found.append((_pearson(above[0].ravel(), above[1].ravel()), len(above[0])))
    return _mean(found, 0.437, 4)


def ranks(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return the rank of each value from 1 on, equal ones sharing their mean; NaN is largest."""
    given = np.asarray(values, np.float64)
    ordered, place, count = np.unique(
        np.where(np.isnan(given), np.inf, given), return_inverse=True, return_counts=True
    )
    del ordered
    last = np.cumsum(count)
    found: npt.NDArray[np.float64] = (last - (count - 1) / 2)[place]
    return found


def _pearson(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else 0.0


def _mean(
    found: Sequence[tuple[float, int]], variance: float, freedom: int
) -> RankCorrelation | None:
    known = [(r, n) for r, n in found if n >= LEAST_PAIRS]
    if not known:
        return None
    errors = []
    for r, n in known:
        near = min(abs(r), 1 - 1 / n)  # a perfect order of few is no proof of a perfect one
        errors.append((1 - near**2) * math.sqrt(variance / (n - freedom)))
    return RankCorrelation(
        math.fsum(r for r, _ in known) / len(known), math.hypot(*errors) / len(known)
    )
