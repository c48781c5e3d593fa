"""The linear relaxation: a lower bound and a price for each budget, in milliseconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mpq.core.errors import RunFailedError
from mpq.core.tables import Floats
from solvers.knapsack import Knapsack
from solvers.threads import highs_threads

_ROUNDING = 1e-14  # of a sum of a few products of positive numbers


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
    unit_value = float(knapsack.objective.max(initial=0.0)) or 1.0
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
    highs.run()
    status = highs.getModelStatus()
    if status == highspy.HighsModelStatus.kInfeasible:
        return None
    if status != highspy.HighsModelStatus.kOptimal:
        raise RunFailedError("solver_failed", f"HiGHS ended the linear relaxation with {status}")
    solution = highs.getSolution()
    duals = np.maximum(0.0, -np.asarray(solution.row_dual)[num_units:])
    prices = duals * row_scale * (unit_value / 1e3)
    priced = knapsack.objective + prices @ knapsack.weights
    least = np.minimum.reduceat(priced, knapsack.starts[:-1])
    spent = float(prices @ knapsack.slack)
    return Relaxation(
        shares=np.asarray(solution.col_value),
        prices=prices,
        reduced=priced - least[knapsack.units] - _ROUNDING * priced,
        bound=math.fsum([*least, -spent]) - _ROUNDING * (float(least.sum()) + spent),
    )
