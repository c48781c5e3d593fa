"""Solver "pairs" against trying every allocation on the pairwise score."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest

from mpq.core.errors import InvalidInputError
from mpq.core.problem import Problem, Status
from solvers import solve
from solvers.check import check
from solvers.descent import descend, field_of, repair
from solvers.knapsack import fitting
from solvers.pairs import Pairs
from solvers.pairwise import pairwise_score
from solvers.quick_descent import descend_quickly, repair_quickly
from tests.oracles import brute_force
from tests.test_solvers import drawn, made, with_responses


def small(seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    units, choices = int(rng.integers(3, 7)), int(rng.integers(2, 5))
    problem = drawn(units, choices, tight=float(rng.uniform(0.1, 0.6)), seed=seed)
    return with_responses(problem, alike=float(rng.uniform(0.2, 0.9)), seed=seed)


def additive_choice(problem: Problem) -> np.ndarray:
    solution = solve(problem, "ilp")
    assert solution.allocation is not None
    return solution.allocation.choice(problem.cells)


def test_the_score_is_the_quadratic_form() -> None:
    problem = small(0)
    assert problem.responses is not None
    choice = additive_choice(problem)
    x = np.zeros(len(problem.cells))
    x[choice] = 1
    form = x @ problem.responses.interactions() @ x
    assert pairwise_score(problem, choice) == pytest.approx(form, rel=1e-9)


def test_finds_the_best_of_small_problems_nearly_always() -> None:
    """37 of 40 hits show, with 95 % confidence, a rate above 0.81 (Clopper-Pearson)."""
    hits = 0
    for seed in range(40):
        problem = small(seed)
        best = brute_force(problem, pairwise_score)
        solution = check(problem, solve(problem, "pairs"))
        assert best is not None
        assert solution.score >= best - 1e-9 * abs(best)
        hits += solution.score <= best + 1e-9 * abs(best)
    assert hits >= 37


@pytest.mark.parametrize("seed", range(5))
def test_never_worse_than_the_additive_optimum(seed: int) -> None:
    problem = with_responses(drawn(25, 6, seed=seed), seed=seed)
    solution = check(problem, Pairs(num_starts=0, num_kicks=0, prove=False).solve(problem))
    assert solution.status is Status.FEASIBLE
    assert solution.allocation is not None
    assert problem.fits(solution.allocation)
    assert solution.score <= pairwise_score(problem, additive_choice(problem)) * (1 + 1e-9)
    assert (solution.bound, solution.gap) == (-np.inf, np.inf)
    longer = Pairs(num_starts=2, num_kicks=10).solve(problem)
    assert longer.score <= solution.score * (1 + 1e-12)


def test_errors_that_cancel_are_found() -> None:
    """Two units whose errors are opposite: low bits in both cost less than in one.

    One alone costs 1; both cost 0 to second order, 1/2 as pairs are trusted by three quarters.
    """
    problem = made([[1, 0], [1, 0]], {"memory": [[1, 2], [1, 2]]}, {"memory": 3})
    vectors = np.zeros((4, 8, 1), np.float32)
    vectors[0], vectors[2] = np.sqrt(2), -np.sqrt(2)
    problem = with_responses(problem)
    assert problem.responses is not None
    responses = dataclasses.replace(problem.responses, vectors=vectors)
    problem = dataclasses.replace(problem, responses=responses)
    solution = solve(problem, "pairs")
    assert solution.allocation is not None
    assert [str(s) for s in solution.allocation.values()] == ["int2", "int2"]
    assert solution.score == pytest.approx(0.5, rel=1e-6)


def test_the_same_seed_gives_the_same_answer() -> None:
    problem = with_responses(drawn(20, 5))
    first, second = Pairs(seed=5).solve(problem), Pairs(seed=5).solve(problem)
    assert (first.allocation, first.score) == (second.allocation, second.score)


def test_a_problem_without_responses_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="solver 'pairs' needs the responses") as error:
        solve(drawn(3, 3), "pairs")
    assert error.value.code == "needs_responses"


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_no_single_change_nor_swap_improves_the_end_of_a_descent(seed: int, quick: bool) -> None:
    problem = with_responses(drawn(6, 4, tight=0.3, seed=seed), seed=seed)
    assert problem.responses is not None
    interactions = problem.responses.interactions()
    own, rows = np.diagonal(interactions), problem.rows()
    knapsack = fitting(problem, own, rows, np.arange(len(problem.cells)))
    assert knapsack is not None
    cross = interactions[np.ix_(knapsack.cells, knapsack.cells)]
    cross[knapsack.units[:, None] == knapsack.units] = 0
    start = repair(knapsack, knapsack.starts[:-1])
    assert start is not None
    assert np.array_equal(start, repair_quickly(knapsack, knapsack.starts[:-1]))
    field, search = field_of(cross, start), descend_quickly if quick else descend
    found = search(
        knapsack, start, prices=np.zeros(2), cross=cross, field=field, pool=len(knapsack.cells)
    )
    assert field == pytest.approx(field_of(cross, found), rel=1e-9)
    end = knapsack.cells[found]
    reached = pairwise_score(problem, end)
    unit_of = np.repeat(np.arange(6), 4)
    for first in range(24):
        for second in range(24):
            other = end.copy()
            other[unit_of[first]], other[unit_of[second]] = first, second
            fits = all(problem.total(b.cost, other) <= b.limit for b in problem.budgets)
            if fits and unit_of[first] != unit_of[second]:
                assert pairwise_score(problem, other) >= reached - 1e-6 * abs(reached)


@pytest.mark.slow
def test_two_hundred_units_take_seconds() -> None:
    problem = with_responses(drawn(200, 8), samples=16)
    start = time.process_time()
    solve(problem, "pairs")
    assert time.process_time() - start < 10
