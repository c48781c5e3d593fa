"""The linear relaxation: a lower bound and a price for each budget, in milliseconds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpq.core.errors import RunFailedError
from mpq.core.tables import Floats
from solvers.joint import Linked
from solvers.knapsack import Knapsack
from solvers.threads import highs_threads

_ROUNDING = 1e-14  # of a sum of a few products of positive numbers
_LINKED = 1e-13  # of such a sum of both signs


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxation:
    """What the linear relaxation of a knapsack proves.

    `shares[i]` is the fraction of entry i in the relaxed optimum, `prices[k]` >= 0 what a unit
    of weight k is worth. `bound` = sum_u min_i (objective + prices . weights) - prices . slack
    holds for any prices (Lagrange), whatever the solver's tolerances, but is below zero for bad
    ones; a choice that takes entry i is worth at least `bound + reduced[i]`. Both are lowered
    by what rounding could add.
    """

    shares: Floats
    prices: Floats
    reduced: Floats
    bound: float


def relax(knapsack: Knapsack) -> Relaxation | None:
    """Solve the linear relaxation; None where even that has no solution.

    Raises RunFailedError when the solver breaks.
    """
    import highspy

    n, num_units, num_rows = len(knapsack.cells), len(knapsack.starts) - 1, len(knapsack.slack)
    unit_value = knapsack.largest
    row_scale = 1e3 / knapsack.slack
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = n, num_units + num_rows
    model.col_cost_ = knapsack.objective / unit_value * 1e3
    model.col_lower_, model.col_upper_ = np.zeros(n), np.ones(n)
    model.row_lower_ = np.r_[np.ones(num_units), np.full(num_rows, -highspy.kHighsInf)]
    model.row_upper_ = np.r_[np.ones(num_units), knapsack.slack * row_scale]
    rows = np.tile(np.arange(num_units, num_units + num_rows), (n, 1))
    matrix = model.a_matrix_
    matrix.format_ = highspy.MatrixFormat.kColwise
    matrix.start_ = np.arange(n + 1) * (num_rows + 1)
    matrix.index_ = np.column_stack([knapsack.units, rows]).ravel()
    matrix.value_ = np.column_stack([np.ones(n), (knapsack.weights * row_scale[:, None]).T]).ravel()
    highs = highspy.Highs()
    for option, value in (
        ("output_flag", False),
        ("threads", highs_threads()),
        ("solver", "simplex"),
    ):
        highs.setOptionValue(option, value)
    highs.passModel(model)
    linked = knapsack.linked()
    if linked is not None:
        _link(highs, linked, num_units, 1e3 / unit_value, row_scale)
    highs.run()
    status = highs.getModelStatus()
    if status == highspy.HighsModelStatus.kInfeasible:
        return None
    if status != highspy.HighsModelStatus.kOptimal:
        raise RunFailedError("solver_failed", f"HiGHS ended the linear relaxation with {status}")
    solution = highs.getSolution()
    row_duals = np.asarray(solution.row_dual)[num_units:]
    prices = np.maximum(0.0, -row_duals[:num_rows]) * row_scale * (unit_value / 1e3)
    if linked is not None:
        link_prices = np.maximum(0.0, row_duals[num_rows:]) * (unit_value / 1e3)
        shares = np.asarray(solution.col_value)[:n]
        return _priced(knapsack, linked, shares, prices, link_prices)
    priced = knapsack.objective + prices @ knapsack.weights
    least = np.minimum.reduceat(priced, knapsack.starts[:-1])
    spent = float(prices @ knapsack.slack)
    return Relaxation(
        shares=np.asarray(solution.col_value),
        prices=prices,
        reduced=priced - least[knapsack.units] - _ROUNDING * priced,
        bound=math.fsum([*least, -spent]) - _ROUNDING * (float(least.sum()) + spent),
    )


def _link(
    highs: Any, linked: Linked, num_units: int, objective_scale: float, row_scale: Floats
) -> None:
    """Add the variables of joint terms to a model, and the rows that link them to the entries."""
    import highspy

    n, num_links = len(linked.rows), len(linked.links)
    in_row = np.flatnonzero(linked.rows >= 0)
    amounts = np.where(linked.rows < 0, linked.amounts * objective_scale, 0.0)
    highs.addCols(
        n,
        amounts,
        np.zeros(n),
        linked.most,
        len(in_row),
        np.searchsorted(in_row, np.arange(n)).astype(np.int32),
        (num_units + linked.rows[in_row]).astype(np.int32),
        linked.amounts[in_row] * row_scale[linked.rows[in_row]],
    )
    begin = highs.getNumCol() - n
    columns = [[*(begin + z for z in link.variables), *link.entries] for link in linked.links]
    factors = [
        [*[link.sign] * len(link.variables), *[-link.sign] * len(link.entries)]
        for link in linked.links
    ]
    sizes = [len(of_link) for of_link in columns]
    highs.addRows(
        num_links,
        np.array([link.least for link in linked.links]),
        np.full(num_links, highspy.kHighsInf),
        sum(sizes),
        np.r_[0, np.cumsum(sizes)][:-1].astype(np.int32),
        np.concatenate(columns).astype(np.int32),
        np.concatenate(factors),
    )


def _priced(
    knapsack: Knapsack, linked: Linked, shares: Floats, prices: Floats, link_prices: Floats
) -> Relaxation:
    """Return what prices of the rows and of the links prove (Lagrange).

    A variable takes what is best of its range, an entry pays for the links that it tightens.
    """
    priced = knapsack.objective + prices @ knapsack.weights
    size = priced.copy()
    of_row = np.append(prices, 1.0)  # the objective last, as row -1
    left = linked.amounts * of_row[linked.rows]
    parts = []
    for link, price in zip(linked.links, link_prices.tolist(), strict=True):
        if price:
            left[list(link.variables)] -= link.sign * price
            priced[list(link.entries)] += link.sign * price
            size[list(link.entries)] += price
            parts.append(price * link.least)
    least = np.minimum.reduceat(priced, knapsack.starts[:-1])
    largest = np.maximum.reduceat(size, knapsack.starts[:-1])
    spent = float(prices @ knapsack.slack)
    lost = float(largest.sum()) + spent + float(link_prices.sum() * len(knapsack.starts))
    parts += [*least, *np.minimum(left * linked.most, 0.0), -spent]
    return Relaxation(
        shares=shares,
        prices=prices,
        reduced=priced - least[knapsack.units] - _LINKED * (size + largest[knapsack.units]),
        bound=math.fsum(parts) - _LINKED * lost,
    )
