"""The least cost for a score, against trying every allocation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mpq.core.errors import InfeasibleError, InvalidInputError
from mpq.core.problem import Budget, Problem
from solvers import solve
from solvers.least_cost import least_cost
from tests.oracles import Enumerated
from tests.test_solvers import drawn, made
from tests.test_solvers_oracle import problems


def agrees(problem: Problem, weights: dict[str, float], score_limit: float) -> None:
    every = Enumerated(problem)
    others = {n: limit for n, limit in problem.limits().items() if n not in weights}
    fits = every.within(others)
    reached = fits & (every.scores <= score_limit)
    if not reached.any():
        with pytest.raises(InfeasibleError) as caught:
            least_cost(problem, weights, score_limit)
        line = str(caught.value)
        assert "\n" not in line
        if fits.any():
            smallest = float(line.split("the smallest reachable is ")[1].split(";")[0])
            assert smallest >= every.scores[fits].min()
            assert least_cost(problem, weights, smallest).score <= smallest
        return
    found = least_cost(problem, weights, score_limit)
    values = sum(weight * every.totals[name] for name, weight in weights.items())
    assert found.gap == 0.0
    assert found.bound == found.value
    assert found.value == pytest.approx(values[reached].min(), rel=1e-9)
    choice = found.allocation.choice(problem.cells)
    assert found.score == problem.score(choice) <= score_limit
    assert found.totals == problem.totals(choice)
    assert all(found.totals[name] <= limit for name, limit in others.items())
    assert {b.cost for b in found.budgets} == set(others)
    if list(weights.values()) == [1.0]:
        assert found.value == found.totals[next(iter(weights))]
        least = reached & (values <= found.value)
        magnitude = float(np.abs(problem.sensitivity.values).max(initial=0.0))
        expected = every.scores[least].min()
        assert found.score == pytest.approx(expected, rel=1e-9, abs=1e-11 * magnitude)


@given(problems(), st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
def test_it_is_what_trying_everything_finds(problem: Problem, data: st.DataObject) -> None:
    assume(problem.costs and np.prod(np.diff(problem.cells.offsets), dtype=float) <= 1500)
    names = data.draw(st.lists(st.sampled_from(list(problem.costs)), min_size=1, unique=True))
    weights = {name: data.draw(st.sampled_from([1.0, 0.5, 1e-3, 2e9])) for name in names}
    scores = Enumerated(problem).scores
    limit = float(np.quantile(scores, data.draw(st.floats(0, 1)), method="nearest"))
    limit = data.draw(st.sampled_from([limit, float(np.nextafter(scores.min(), -np.inf))]))
    agrees(problem, weights, limit)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_scores_does_not_matter(scale: float) -> None:
    problem = drawn(5, 4)
    table = problem.sensitivity
    problem = replace(problem, sensitivity=replace(table, values=table.values * scale))
    agrees(problem, {"memory": 1.0}, solve(problem).score * 1.1)


@pytest.mark.parametrize(
    "problem",
    [
        made([], {"memory": []}, fixed=3.0),
        made([[3, 2, 1]], {"memory": [[1, 2, 3]]}),
        made([[1, 1], [1, 1]], {"memory": [[4, 4], [4, 4]]}),
    ],
)
def test_no_unit_one_unit_and_ties(problem: Problem) -> None:
    for limit in (-1.0, 0.0, 2.0, 9.0):
        agrees(problem, {"memory": 1.0}, limit)


def test_it_is_the_other_direction() -> None:
    """Least memory for the score of the best answer within a budget meets that budget."""
    problem = drawn(40, 5)
    best = solve(problem)
    found = least_cost(problem, "memory", best.score)
    assert best.totals is not None
    assert found.score <= best.score
    assert found.totals["memory"] <= best.totals["memory"]
    assert found.totals["latency"] <= problem.limits()["latency"]
    assert (found.weights, found.score_limit) == ({"memory": 1.0}, best.score)
    back = problem.with_budgets([*problem.budgets, Budget("memory", found.value)])
    assert solve(back).score == pytest.approx(best.score, rel=1e-9)


def test_a_score_that_nobody_reaches_is_told_with_the_smallest() -> None:
    problem = made([[3, 1 / 3]], {"memory": [[1, 2]], "latency": [[1, 1]]}, {"latency": 2})
    with pytest.raises(InfeasibleError) as caught:
        least_cost(problem, "memory", 0.01)
    assert str(caught.value) == (
        "no allocation scores <= 0.01 within latency: the smallest reachable is 0.3334; raise the "
        "score limit or a budget, or add a wider format"
    )
    nothing = problem.with_budgets([Budget("latency", 0.5)])
    with pytest.raises(InfeasibleError, match="no allocation fits latency <= 500"):
        least_cost(nothing, "memory", 9.0)


@pytest.mark.parametrize(
    ("of", "limit", "says"),
    [
        ("memori", 1.0, "unknown cost 'memori': did you mean 'memory'"),
        ({}, 1.0, "least of which cost"),
        ({"memory": 0.0}, 1.0, "positive number, got 0.0 of 'memory'"),
        ({"memory": float("nan")}, 1.0, "positive number, got nan"),
        ("memory", float("nan"), "a score limit is a number, got nan"),
    ],
)
def test_what_cannot_be_asked_is_refused(of: object, limit: float, says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        least_cost(drawn(3, 3), of, limit)  # type: ignore[arg-type]


def test_a_large_problem_carries_its_bound() -> None:
    problem = drawn(400, 8)
    found = least_cost(problem, {"memory": 1.0, "latency": 2e9}, solve(problem).score * 1.1)
    assert found.value == pytest.approx(found.totals["memory"] + 2e9 * found.totals["latency"])
    assert found.bound <= found.value
    assert 0 <= found.gap <= 1e-4
