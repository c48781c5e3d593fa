"""How much of an allocation is left when its scores are drawn anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mpq.core.formats import Scheme
from mpq.core.layers import UnitName

SURE = 0.8  # of the draws that a unit keeps its scheme in; it is unsure below


@dataclass(frozen=True, slots=True, kw_only=True)
class Stability:
    """An allocation beside the optima of scores drawn within their error bars.

    `kept` is the share of the draws whose optimum gives a unit the scheme it has in `schemes`;
    `unsure` are the units kept in less than 80 % of them, the least sure first, `runner_up` the
    scheme that each of those takes most often instead. `score` is the score of the allocation,
    `spread` the standard deviation of it over the draws. `lost` is what it loses on average
    against the optimum of the draw, relative to that: an upper bound of what better scores could
    gain, since that optimum is luck in part.
    """

    num_draws: int
    schemes: Mapping[UnitName, Scheme]
    kept: Mapping[UnitName, float]
    unsure: tuple[UnitName, ...]
    runner_up: Mapping[UnitName, Scheme]
    score: float
    spread: float
    lost: float
