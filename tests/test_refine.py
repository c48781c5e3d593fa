"""Which steps of a refinement are kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mpq.core.constraints import Constraint
from mpq.core.evaluation import Evaluation
from mpq.core.limits import Limit
from mpq.core.problem import Allocation
from mpq.core.tables import Responses
from mpq.criterion import Criterion
from mpq.refine import gains, nearby
from tests.builders import cells, problem


def measured(per_sample: list[float], **metrics: float) -> Evaluation:
    values = np.array(per_sample)
    return Evaluation(
        candidate="a",
        split="calibration",
        allocation=Allocation({}),
        divergence="kl",
        mean=float(values.mean()),
        stderr=0.0,
        metrics=metrics,
        per_sample=values,
    )


@pytest.mark.parametrize(
    ("new", "kept"),
    [
        ([0.5, 0.5, 0.5, 0.5], True),
        ([0.0, 1.1, 0.0, 1.1], False),  # less on average, but only every second sample gains
        ([1.5, 0.9, 0.0, 0.9], True),  # both halves gain, though not each sample
        ([1.0, 1.0, 1.0, 1.0], False),
        ([2.0, 2.0, 2.0, 2.0], False),
    ],
)
def test_a_step_has_to_gain_on_both_halves(new: list[float], kept: bool) -> None:
    assert gains(Criterion(), measured(new), measured([1.0] * 4)) is kept


def test_one_sample_has_one_half() -> None:
    assert gains(Criterion(), measured([0.5]), measured([1.0]))


def test_with_qualities_their_sum_decides() -> None:
    criterion = Criterion(scales={"ssim": 0.1, "sqnr": 1.0})
    old = measured([1.0, 1.0], ssim=0.2, sqnr=1.0)
    assert gains(criterion, measured([2.0, 2.0], ssim=0.1, sqnr=1.5), old)
    assert not gains(criterion, measured([0.5, 0.5], ssim=0.3, sqnr=0.9), old)


def test_a_limit_that_was_met_is_not_broken() -> None:
    criterion = Criterion(limits=(Limit.parse("accuracy >= 0.9"),))
    fine, broken = measured([1.0, 1.0], accuracy=0.95), measured([0.5, 0.5], accuracy=0.8)
    assert not gains(criterion, broken, fine)
    assert gains(criterion, measured([0.7, 0.7], accuracy=0.91), fine)
    assert gains(criterion, measured([0.4, 0.4], accuracy=0.7), broken)  # neither meets it


def test_a_step_keeps_what_the_problem_asks_beside_budgets() -> None:
    of = cells(2)
    row = Constraint.from_cells("made", of, {}, 1.0)
    pair = ((of.units[0], of.schemes[0][0]), (of.units[1], of.schemes[1][0]))
    asked = replace(problem(of), constraints=(row,), forbidden=(pair,))
    responses = Responses(cells=of, vectors=np.ones((len(of), 2, 1), np.float32))
    around = nearby(asked, Allocation.from_choice(of, np.array([0, 4])), responses, 1)
    assert (around.constraints, around.forbidden) == ((row,), (pair,))
