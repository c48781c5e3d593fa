"""The additivity report against sums written out."""

from __future__ import annotations

import numpy as np
import pytest

from mpq.additivity import additivity
from mpq.candidates import propose
from mpq.core.evaluation import CHOSEN, Evaluation
from mpq.core.problem import Allocation, Budget, Problem
from mpq.core.tables import Responses, SensitivityTable
from tests.builders import cells, cost
from tests.oracles import slow_interactions

OF = cells(3, ("int2", "int8"))
LOW, HIGH = OF.schemes[0]
CHOICE = Allocation(dict(zip(OF.units, (LOW, HIGH, LOW), strict=True)))


def problem(responses: bool, metric: str = "gauss_newton") -> Problem:
    vectors = np.random.default_rng(0).normal(size=(6, 40, 2)).astype(np.float32)
    vectors[4] = -0.9 * vectors[0]  # unit2 at int2 undoes most of unit0 at int2
    found = Responses(cells=OF, vectors=vectors)
    values, stderr = found.own_scores()
    return Problem(
        sensitivity=SensitivityTable(metric=metric, cells=OF, values=values, stderr=stderr),
        costs={"memory": cost(OF)},
        budgets=(Budget("memory", 1e9),),
        responses=found if responses else None,
    )


def measured(split: str, mean: float) -> Evaluation:
    return Evaluation(
        candidate=CHOSEN, split=split, allocation=CHOICE, divergence="kl", mean=mean, stderr=0.1
    )


def test_parts_pairs_and_the_measurement_stand_side_by_side() -> None:
    given = problem(responses=True)
    found = additivity(given, CHOICE, [measured("held_out", 5.0), measured("calibration", 3.0)])
    assert given.responses is not None
    slow = slow_interactions(given.responses.vectors)[np.ix_([0, 3, 4], [0, 3, 4])]
    assert found.parts == pytest.approx(np.trace(slow), rel=1e-6)
    assert found.with_pairs == pytest.approx(slow.sum(), rel=1e-6)
    assert (found.measured, found.stderr) == (3.0, 0.1)


def test_the_strongest_pair_is_the_one_that_cancels() -> None:
    found = additivity(problem(responses=True), CHOICE, [], strongest=2)
    strongest, *rest = found.pairs
    assert {strongest.first, strongest.second} == {"unit0", "unit2"}
    assert strongest.effect < 0
    assert all(abs(pair.effect) <= abs(strongest.effect) for pair in rest)
    assert len(found.pairs) <= 2
    assert found.measured is None


def test_without_responses_there_are_no_pairs() -> None:
    found = additivity(problem(responses=False), CHOICE, [])
    assert (found.with_pairs, found.matrix, found.pairs) == (None, None, ())


def test_scores_in_other_units_are_no_parts_of_a_divergence() -> None:
    found = additivity(
        problem(responses=True, metric="taylor"), CHOICE, [measured("calibration", 3)]
    )
    assert (found.metric, found.parts, found.measured) == ("taylor", None, 3.0)
    assert found.with_pairs is not None  # responses are in units of the divergence whatever scored
    assert found.pairs
    first = found.told()[0]
    assert first.startswith("the scores of taylor are not in units of the divergence, with pairs ")


def test_a_metric_that_scores_divergences_predicts_them_without_pairs_too() -> None:
    scored = problem(responses=False, metric="kl")
    for proposal in propose(scored):
        chosen = proposal.allocation.choice(scored.cells)
        assert proposal.predicted == pytest.approx(scored.sensitivity.values[chosen].sum())
    other = problem(responses=False, metric="taylor")
    assert {proposal.predicted for proposal in propose(other)} == {None}
