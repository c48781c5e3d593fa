"""The least of a cost at which a score can be had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mpq.core.problem import Allocation, Budget


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastCost:
    """The allocation of least `value` = sum of `weights` times totals with score <= `score_limit`.

    `budgets` are those that were kept. `bound` <= the least possible value, and gap =
    (value - bound) / value: 0 where it is proven.
    """

    weights: Mapping[str, float]
    score_limit: float
    budgets: tuple[Budget, ...]
    allocation: Allocation
    score: float
    totals: Mapping[str, float]
    value: float
    bound: float
    gap: float
    seconds: float = 0.0
