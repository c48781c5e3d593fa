"""Chains of nested allocations, complete frontiers and surfaces, against trying everything."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from mpq.core.constraints import Constraint
from mpq.core.errors import InfeasibleError, InvalidInputError
from mpq.core.problem import Budget, Problem
from solvers.chain import chain
from solvers.check import check
from solvers.frontier import frontier
from solvers.surface import surface
from tests.oracles import every_choice, fast_brute_force
from tests.test_solvers import drawn, made
from tests.test_solvers_oracle import problems


def best_points(problem: Problem, cost: str) -> list[tuple[float, float]]:
    """Every (total, score) that no choice within the budgets beats, by trying all of them."""
    found = sorted(
        (problem.total(cost, choice), problem.score(choice))
        for choice in every_choice(problem)
        if problem.meets(choice)
    )
    kept: list[tuple[float, float]] = []
    for total, score in found:
        if not kept or score < kept[-1][1]:
            kept.append((total, score))
    return kept


def small(problem: Problem) -> bool:
    sizes = np.diff(problem.cells.offsets)
    return bool(problem.costs) and np.prod(sizes, dtype=float) <= 3000


@given(problems())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_allocation_beats_one_of_a_chain(problem: Problem) -> None:
    if not small(problem):
        return
    free = problem.with_budgets(())
    found = chain(free, "memory")
    truth = best_points(free, "memory")
    size = max(abs(s) for _, s in truth) + max(map(abs, found.scores))
    assert (np.diff(found.totals) > 0).all()
    assert (np.diff(found.scores) < 0).all()
    for step in range(len(found)):
        choice = found.choice(step)
        total, score = free.total("memory", choice), free.score(choice)
        assert total == pytest.approx(found.totals[step], rel=1e-12)
        assert score == pytest.approx(found.scores[step], rel=1e-9, abs=1e-12 * size)
        assert score <= min(s for t, s in truth if t <= total * (1 + 1e-12)) + 1e-9 * size
    for total, score in truth:
        assert found.bound(total * (1 + 1e-12)) <= score + 1e-9 * size
    assert free.score(found.choice(len(found) - 1)) == pytest.approx(truth[-1][1], abs=1e-9 * size)


def test_each_allocation_is_contained_in_the_next() -> None:
    problem = drawn(40, 6)
    found = chain(problem, "memory")
    memory, scores = problem.costs["memory"].values, problem.sensitivity.values
    before = found.choice(0)
    for step in range(1, len(found)):
        after = found.choice(step)
        assert (memory[after] >= memory[before]).all()
        assert (scores[after] <= scores[before]).all()
        assert np.count_nonzero(after != before) == 1
        before = after


def test_a_chain_is_near_optimal_at_every_size() -> None:
    problem = drawn(200, 6, num_budgets=1)
    found = chain(problem, "memory")
    limits = np.linspace(found.totals[0], found.totals[-1], 50)[1:-1]
    gaps = []
    for limit in limits:
        step = found.within(limit)
        assert found.totals[step] <= limit
        gaps.append(found.scores[step] / found.bound(limit) - 1)
    assert np.median(gaps) < 0.05


def test_the_limits_of_a_chain() -> None:
    found = chain(made([[3, 1, 0.5]], {"memory": [[1, 2, 4]]}), "memory")
    assert found.totals.tolist() == [1, 2, 4]
    assert found.within(3.9) == 1
    assert found.bound(3.0) == 0.75
    with pytest.raises(InfeasibleError, match="the smallest has 1"):
        found.within(0.5)
    with pytest.raises(IndexError):
        found.choice(3)
    with pytest.raises(InvalidInputError, match="unknown cost"):
        chain(made([[1]], {"memory": [[1]]}), "memori")


def test_units_of_unlike_many_schemes_and_points_on_a_line() -> None:
    problem = made(
        [[3, 2, 1], [5], [4, 4, 0]], {"memory": [[1, 2, 3], [7], [0, 0, 2]]}, {"memory": 99}
    )
    found = chain(problem, "memory")
    assert [str(s) for s in found.allocation(0).values()] == ["int2", "int2", "int2"]
    assert found.totals.tolist() == [8, 10, 12]  # the point on the line from 3 to 1 is left out
    assert found.scores.tolist() == [12, 8, 6]


def test_no_units_make_a_chain_of_one() -> None:
    found = chain(made([], {"memory": []}, fixed=5.0), "memory")
    assert (found.totals.tolist(), found.scores.tolist()) == ([5.0], [0.0])


def test_a_chain_keeps_no_other_condition() -> None:
    problem = made([[1, 0], [1, 0]], {"memory": [[1, 2], [1, 2]]})
    one = Constraint.from_cells("one", problem.cells, {}, 1.0)
    with pytest.raises(InvalidInputError, match="leave constraints"):
        chain(dataclasses.replace(problem, constraints=(one,)), "memory")


@given(problems())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_complete_frontier_is_what_nothing_beats(problem: Problem) -> None:
    if not small(problem):
        return
    cost = next(iter(problem.costs))
    others = problem.with_budgets([b for b in problem.budgets if b.cost != cost])
    truth = best_points(others, cost)
    if not truth:
        with pytest.raises(InfeasibleError):
            frontier(problem, cost, points=None)
        return
    found = frontier(problem, cost, points=None)
    assert found.complete
    points = [(s.totals[cost], s.score) for s in found.solutions if s.totals]
    size = max(abs(s) for _, s in truth)
    if len(truth) == len(points):
        for (total, score), (t, s) in zip(points, truth, strict=True):
            assert total == pytest.approx(t, rel=1e-12)
            assert score == pytest.approx(s, rel=1e-9, abs=1e-11 * size)
    else:  # rounding alone tells some points apart
        for total, score in truth:
            near = [s for t, s in points if t <= total * (1 + 1e-12)]
            assert min(near) <= score + 1e-10 * size


def test_a_surface_is_the_best_at_every_pair_of_limits() -> None:
    problem = drawn(5, 4)
    found = surface(problem, points=(6, 5), gap=0.0)
    assert found.costs == ("memory", "latency")
    for i, memory in enumerate(found.limits[0]):
        for j, latency in enumerate(found.limits[1]):
            limited = problem.with_budgets([Budget("memory", memory), Budget("latency", latency)])
            solution, best = found.solutions[i][j], fast_brute_force(limited)
            assert (solution is None) == (best is None)
            if solution is not None:
                check(limited, solution)
                assert solution.gap == pytest.approx(0, abs=1e-9)
                assert solution.score == pytest.approx(best, rel=1e-9)


def test_points_of_a_surface_are_proven_within_the_gap() -> None:
    problem = drawn(60, 5, seed=3)
    found = surface(problem, points=(8, 8), gap=1e-2)
    solved = [s for row in found.solutions for s in row if s is not None]
    assert len(solved) > 30
    assert all(s.gap <= 1e-2 for s in solved)
    assert len({s.score for s in solved}) < len(solved)  # what answers a neighbour is not redone
    exact = surface(problem, points=(8, 8), gap=0.0)
    for row, other in zip(found.solutions, exact.solutions, strict=True):
        for s, t in zip(row, other, strict=True):
            if s is not None and t is not None:
                assert s.bound <= t.score * (1 + 1e-9) <= s.score * (1 + 1e-8)


def test_what_no_surface_can_be_over() -> None:
    problem = drawn(3, 3)
    with pytest.raises(InvalidInputError, match="unknown cost"):
        surface(problem, costs=("memory", "bops"))
    with pytest.raises(InvalidInputError, match="two costs"):
        surface(problem, costs=("memory", "memory"))
    with pytest.raises(InvalidInputError, match="at least 2 points"):
        surface(problem, points=(1, 4))
    three = made(
        [[2, 1]], {"memory": [[1, 2]], "latency": [[2, 1]], "bops": [[3, 3]]}, {"bops": 1.0}
    )
    with pytest.raises(InfeasibleError, match="bops"):
        surface(three)
