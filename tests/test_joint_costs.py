"""Costs of pairs of cells: what they come to, and that every solver sees them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from mpq.core.budgets import BudgetText
from mpq.core.constraints import Constraint
from mpq.core.errors import InvalidInputError
from mpq.core.formats import parse_scheme
from mpq.core.joint import JointCosts, joint_lines
from mpq.core.problem import Budget, Problem
from mpq.core.risk import quantile
from mpq.core.tables import Cells, CostTable, SensitivityTable

INT8, INT4 = parse_scheme("int8:int8"), parse_scheme("int4")
CELLS = Cells(units=("a", "b", "c"), schemes=((INT8, INT4),) * 3)


def joint(first: list[int], second: list[int], values: list[float]) -> JointCosts:
    return JointCosts(
        cells=CELLS, first=np.array(first), second=np.array(second), values=np.array(values)
    )


def latency() -> CostTable:
    table = CostTable.exact("latency", "s", CELLS, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], fixed=0.5)
    return replace(table, joint=joint([0, 4, 1], [2, 2, 2], [-0.25, -0.5, 0.125]))


def test_a_pair_counts_where_both_cells_are_chosen() -> None:
    table = latency()
    assert table.total(np.array([0, 2, 4])) == 0.5 + 9.0 - 0.75
    assert table.total(np.array([1, 2, 5])) == 0.5 + 11.0 + 0.125
    assert table.total(np.array([0, 3, 5])) == 0.5 + 11.0


def test_pairs_are_kept_in_order_and_added_up() -> None:
    made = joint([4, 0, 2], [0, 2, 0], [1.0, 0.25, 0.5])
    assert made.first.tolist() == [0, 0]
    assert made.second.tolist() == [2, 4]
    assert made.values.tolist() == [0.75, 1.0]


def test_a_mapping_names_the_cells() -> None:
    made = JointCosts.from_cells(CELLS, {(("b", INT8), ("a", INT8)): -0.25})
    assert (made.first.tolist(), made.second.tolist(), made.values.tolist()) == ([0], [2], [-0.25])


@pytest.mark.parametrize(
    ("first", "second", "values", "told"),
    [
        ([0], [1], [1.0], "got unit 'a' twice"),
        ([0], [6], [1.0], "cell 6"),
        ([-1], [2], [1.0], "cell -1"),
        ([0], [2, 3], [1.0], "as many"),
        ([0, 2], [2, 5], [1.0, math.nan], "'b' and 'c' is nan"),
        ([0.5], [2], [1.0], "whole numbers"),
    ],
)
def test_what_is_no_pair_is_refused(
    first: list[int], second: list[int], values: list[float], told: str
) -> None:
    with pytest.raises(InvalidInputError, match=told):
        joint(first, second, values)


def test_other_cells_are_refused() -> None:
    other = Cells(units=("a", "b", "d"), schemes=CELLS.schemes)
    table = CostTable.exact("latency", "s", other, np.ones(6))
    with pytest.raises(InvalidInputError, match="joint costs of cost 'latency' are over other"):
        replace(table, joint=joint([0], [2], [1.0]))


def test_fewer_cells_keep_the_pairs_among_them() -> None:
    cells, numbers = CELLS.restrict({"a": [INT4]})
    kept = latency().restrict(cells, numbers).joint
    assert kept is not None
    assert (kept.first.tolist(), kept.second.tolist()) == ([0, 1], [1, 3])
    assert kept.values.tolist() == [0.125, -0.5]
    cells, numbers = CELLS.restrict({"b": [INT4]})
    assert latency().restrict(cells, numbers).joint is None


def test_a_problem_counts_the_pairs() -> None:
    problem = Problem(
        sensitivity=SensitivityTable(
            metric="m", cells=CELLS, values=np.zeros(6), stderr=np.zeros(6)
        ),
        costs={"latency": latency()},
        budgets=(Budget("latency", 8.75),),
    )
    assert problem.total("latency", np.array([0, 2, 4])) == 8.75
    assert problem.meets(np.array([0, 2, 4]))
    assert not problem.with_budgets([Budget("latency", 8.7)]).meets(np.array([0, 2, 4]))
    row = Constraint.at_least(latency(), 9.0)
    assert not row.met(np.array([0, 2, 4]))
    assert row.met(np.array([0, 3, 4]))


def test_a_uniform_limit_and_a_quantile_count_the_pairs() -> None:
    table = latency()
    limit = BudgetText.parse("latency <= uniform int8:int8").resolve({"latency": table}).limit
    assert limit == table.total(np.array([0, 2, 4]))
    assert quantile(table, np.array([0, 2, 4]), 0.95) == limit
    wide = replace(table, low=table.values / 2, high=2 * table.values)
    bare = replace(wide, joint=None)
    choice = np.array([0, 2, 4])
    assert quantile(wide, choice, 0.9) == pytest.approx(quantile(bare, choice, 0.9) - 0.75)


def test_what_pairs_add_is_told() -> None:
    choice = np.array([0, 2, 4])
    assert joint_lines(latency(), choice) == [
        "latency: 2 of 3 pairs of cells are taken, -750.0 ms",
        "  b in int8:int8 with c in int8:int8: -500.0 ms",
        "  a in int8:int8 with b in int8:int8: -250.0 ms",
    ]
    assert joint_lines(latency(), choice, most=1)[2:] == ["  and 1 more"]
    assert joint_lines(replace(latency(), joint=None), choice) == []


def test_no_pair_is_the_same_as_none() -> None:
    assert replace(latency(), joint=joint([], [], [])).joint is None
    assert JointCosts.summed([None, joint([], [], [])]) is None
    both = JointCosts.summed([latency().joint, None, joint([0], [2], [1.0])])
    assert both is not None
    assert both.values.tolist() == [0.75, 0.125, -0.5]
