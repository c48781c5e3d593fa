"""A wrong answer never passes as a right one."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from mpq.core.errors import RunFailedError
from mpq.core.formats import parse_scheme
from mpq.core.problem import Allocation, Solution, Status
from solvers import solve
from solvers.check import check, finish, relative_gap
from tests.test_solvers import drawn, made

PROBLEM = drawn(6, 4)
RIGHT = solve(PROBLEM)
NOTHING = solve(drawn(6, 4, tight=-0.3))


def wrong(**changes: object) -> Solution:
    return dataclasses.replace(RIGHT, **changes)  # type: ignore[arg-type]


def moved(unit: str, scheme: str | None = None) -> Allocation:
    """The right allocation with one unit elsewhere: in its first other scheme, or in `scheme`."""
    allocation = dict(RIGHT.allocation or {})
    choices = PROBLEM.cells.schemes[PROBLEM.cells.unit_number(unit)]
    other = next(s for s in choices if s != allocation[unit])
    allocation[unit] = parse_scheme(scheme) if scheme else other
    return Allocation(allocation)


def test_the_right_answer_passes() -> None:
    assert check(PROBLEM, RIGHT) is RIGHT


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (wrong(score=RIGHT.score * 0.999), "its score is not"),
        (wrong(score=math.nan), "its score is not"),
        (wrong(totals={**(RIGHT.totals or {}), "memory": 1.0}), "its totals are not"),
        (wrong(totals=None), "its totals are not"),
        (wrong(allocation=moved("unit0")), "its totals are not"),
        (wrong(allocation=moved("unit0", "bf16")), "unknown scheme 'bf16'"),
        (wrong(allocation=Allocation({})), "other units"),
        (wrong(bound=RIGHT.score * 2), "is over score"),
        (wrong(bound=-math.inf), "its gap is not"),
        (wrong(gap=0.1), "its gap is not"),
        (wrong(status=Status.FEASIBLE), "feasible with a gap of 0.0"),
        (wrong(bound=0.0, gap=1.0), "optimal with a gap of 1.0"),
        (wrong(allocation=None), "its status and its allocation"),
        (wrong(status=Status.INFEASIBLE), "its status and its allocation"),
        (wrong(status=Status.INFEASIBLE, allocation=None), "only an infeasible answer"),
        (wrong(infeasibility=NOTHING.infeasibility), "only an infeasible answer"),
        (wrong(budgets=()), "other budgets"),
    ],
)
def test_anything_inconsistent_is_named(answer: Solution, complaint: str) -> None:
    with pytest.raises(RunFailedError, match=complaint) as error:
        check(PROBLEM, answer)
    assert error.value.code == "inconsistent_solution"
    assert "solver 'auto'" in str(error.value)


def test_a_choice_over_budget_is_never_returned() -> None:
    problem = made([[2, 1]], {"memory": [[1, 2]]}, {"memory": 1.0})
    with pytest.raises(RunFailedError, match=r"memory is 2\.0, over the budget of 1\.0"):
        finish(problem, "ilp", np.array([1]), proven=True, seconds=0.0)


def test_a_bound_that_reaches_the_score_is_a_proof() -> None:
    problem = made([[2, 1]], {"memory": [[1, 2]]}, {"memory": 2.0})
    stopped = finish(problem, "ilp", np.array([0]), proven=False, bound=1.0, seconds=0.0)
    assert (stopped.status, stopped.gap, stopped.bound) == (Status.FEASIBLE, 0.5, 1.0)
    reached = finish(problem, "ilp", np.array([1]), proven=False, bound=1.0, seconds=0.0)
    assert (reached.status, reached.gap) == (Status.OPTIMAL, 0.0)


def test_stopped_before_anything_was_found_is_unknown() -> None:
    problem = made([[2, 1]], {"memory": [[1, 2]]}, {"memory": 2.0})
    solution = finish(problem, "ilp", None, proven=False, bound=0.5, seconds=0.0)
    assert (solution.status, solution.bound, solution.allocation) == (Status.UNKNOWN, 0.5, None)


def test_an_infeasible_answer_has_its_reason() -> None:
    problem = drawn(6, 4, tight=-0.3)
    assert check(problem, NOTHING).status is Status.INFEASIBLE
    with pytest.raises(RunFailedError, match="only an infeasible answer"):
        finish(problem, "ilp", None, proven=True, seconds=0.0)


@pytest.mark.parametrize(
    ("score", "bound", "gap"),
    [(2.0, 1.0, 0.5), (-1.0, -2.0, 1.0), (0.0, 0.0, 0.0), (1e-320, 1e-320, 0.0), (1, 0, 1)],
)
def test_the_gap_is_relative_and_never_negative(score: float, bound: float, gap: float) -> None:
    assert relative_gap(score, bound) == gap
