from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mpq.core.errors import InfeasibleError, InvalidInputError
from mpq.core.problem import Budget, Status
from solvers.check import check
from solvers.frontier import frontier
from tests.oracles import brute_force
from tests.test_solvers import drawn, made, with_responses


def points(found) -> list[tuple[float, float]]:
    return [(s.totals[found.cost], s.score) for s in found.solutions]


@pytest.mark.parametrize("cost", ["memory", "latency"])
def test_every_point_is_exact_and_better_than_the_cheaper_ones(cost: str) -> None:
    problem = drawn(5, 4, tight=0.6)
    found = frontier(problem, cost, points=9)
    assert found.cost == cost
    totals, scores = zip(*points(found), strict=True)
    assert list(totals) == sorted(totals)
    assert list(scores) == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)
    for solution in found.solutions:
        limited = problem.with_budgets(solution.budgets)
        assert solution.status is Status.OPTIMAL
        check(limited, solution)
        assert {b.cost for b in solution.budgets} == {"memory", "latency"}
        assert solution.score == pytest.approx(brute_force(limited), rel=1e-9)


def test_it_runs_from_the_smallest_to_the_best_without_a_limit() -> None:
    problem = drawn(6, 4, num_budgets=1)
    found = points(frontier(problem, "memory", points=7))
    memory = problem.costs["memory"].values.reshape(6, 4)
    scores = problem.sensitivity.values.reshape(6, 4)
    assert found[0][0] == memory.min(axis=1).sum()
    assert found[-1][1] == pytest.approx(scores.min(axis=1).sum(), rel=1e-12)


def test_the_budget_on_the_cost_itself_is_left_out() -> None:
    problem = drawn(5, 4, num_budgets=1)
    assert points(frontier(problem, "memory")) == points(
        frontier(problem.with_budgets(()), "memory")
    )


def test_a_constant_cost_has_one_point() -> None:
    problem = made([[2, 1], [2, 1]], {"memory": [[4, 4], [4, 4]]})
    assert points(frontier(problem, "memory")) == [(8.0, 2.0)]
    free = made([[2, 1]], {"memory": [[0, 0]]})
    assert points(frontier(free, "memory")) == [(0.0, 1.0)]


def test_one_point_is_the_best_without_a_limit() -> None:
    problem = made([[2, 1], [2, 1]], {"memory": [[1, 4], [1, 4]]})
    assert points(frontier(problem, "memory", points=1)) == [(8.0, 2.0)]


def test_no_units() -> None:
    assert points(frontier(made([], {"memory": []}, fixed=5.0), "memory")) == [(5.0, 0.0)]


def test_the_pairwise_solver_can_be_asked() -> None:
    problem = with_responses(drawn(5, 4, num_budgets=1))
    found = frontier(problem, "memory", points=4, solver="pairs")
    for solution in found.solutions:
        check(problem.with_budgets(solution.budgets), solution)
    assert len(found.solutions) > 1


def test_what_cannot_be_drawn_is_refused() -> None:
    problem = drawn(3, 3)
    with pytest.raises(InvalidInputError, match="unknown cost 'memori': did you mean 'memory'"):
        frontier(problem, "memori")
    with pytest.raises(InvalidInputError, match="unknown solver"):
        frontier(problem, "memory", solver="simplex")
    with pytest.raises(InvalidInputError, match="at least 1 point"):
        frontier(problem, "memory", points=0)
    tiny = dataclasses.replace(problem, budgets=(Budget("latency", 1e-9),))
    with pytest.raises(InfeasibleError, match=r"no allocation fits latency <= 0\.001 us"):
        frontier(tiny, "memory")


def test_a_denser_frontier_is_nowhere_worse() -> None:
    problem = drawn(12, 5)
    coarse, fine = (points(frontier(problem, "memory", points=n)) for n in (5, 17))
    for total, score in coarse:
        assert min(s for t, s in fine if t <= total * (1 + 1e-12)) <= score + 1e-12 * abs(score)
    assert len(fine) > len(coarse)
    assert np.isfinite(fine).all()
