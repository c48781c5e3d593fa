"""What a measured cost comes to with a probability."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from statistics import NormalDist

import numpy as np

from mpq.core.errors import InvalidInputError
from mpq.core.joint import joined_sum
from mpq.core.tables import CostTable, Floats, Indices

_SIGMAS = NormalDist().inv_cdf(0.975)  # half the width of a 95 % interval


_RISK = 0.95  # that a budget on a measured cost holds with, where none is asked for


def risk_of(
    asked: float | None, costs: Mapping[str, CostTable], limited: Iterable[str]
) -> float | None:
    """Return the probability that budgets on the `limited` costs hold with.

    It is what was asked; otherwise 0.95 where one of them is measured, None where all are exact.
    """
    if asked is not None:
        return asked
    is_measured = any((costs[name].high > costs[name].values).any() for name in limited)
    return _RISK if is_measured else None


def check_risk(risk: object, code: str = "risk") -> float:
    """Return the probability that budgets shall hold with; raises InvalidInputError (`code`)."""
    number = float(risk) if isinstance(risk, Real) and not isinstance(risk, bool) else math.nan
    if not 0.5 <= number < 1:
        raise InvalidInputError(
            code,
            "risk: the probability that each budget holds with, from 0.5 up to below 1 such as "
            f"0.95, got {risk!r}",
        )
    return number


def upper_values(table: CostTable, risk: float) -> Floats:
    """Return the `risk` quantile of each cell: value + z sd of a normal error.

    sd = (high - low) / (2 * 1.96), or (high - value) / 1.96 where that is more: intervals of
    times are even in the logarithm and lean upwards. At 0.5 and where exact it is the value.
    """
    half = np.maximum((table.high - table.low) / 2, table.high - table.values)
    upper: Floats = table.values + NormalDist().inv_cdf(risk) / _SIGMAS * np.maximum(half, 0.0)
    return upper


def quantile(table: CostTable, choice: Indices, risk: float) -> float:
    """Return the `risk` quantile of the total of a choice when the errors move together.

    Joint terms have no interval: they count with their value.
    """
    return table.fixed + joined_sum(upper_values(table, risk)[choice], table.joint, choice)
