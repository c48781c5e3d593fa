"""The lower bound on the pairwise score against trying every allocation."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.core.problem import Problem, Status
from mpq.core.tables import Responses
from solvers import solve
from solvers.convex import is_convex
from solvers.pair_bound import lower_bound
from solvers.pairs import Pairs
from solvers.pairwise import Interacting, bounded_interactions, pairwise_score
from solvers.semidefinite import relax_pairs
from solvers.shifted import shift_pairs
from tests.oracles import brute_force, every_choice, fast_pairwise_brute_force
from tests.test_solvers import drawn, made, with_responses


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Few units and schemes, with everything that responses can be."""
    seed = draw(st.integers(0, 10**6))
    problem = drawn(
        draw(st.integers(1, 5)),
        draw(st.integers(2, 4)),
        tight=draw(st.sampled_from([0.0, 0.02, 0.3, 0.8])),
        num_budgets=draw(st.integers(1, 2)),
        seed=seed,
    )
    less = draw(st.sampled_from([1.0, 1.0, 1.0, 0.9]))  # nothing fits, nearly always
    budgets = [dataclasses.replace(b, limit=less * b.limit) for b in problem.budgets]
    problem = problem.with_budgets(budgets)
    samples = draw(st.sampled_from([1, 2, 3, 32]))
    alike = draw(st.sampled_from([0.0, 0.5, 0.95]))
    problem = with_responses(problem, samples=samples, alike=alike, seed=seed)
    rng = np.random.default_rng(seed)
    vectors = problem.responses.vectors.copy()
    kind = draw(st.sampled_from(["plain", "ties", "equal", "silent"]))
    if kind == "ties":
        vectors = np.round(2 * vectors) / 2
    elif kind == "equal":
        vectors[:] = vectors[:1]
    elif kind == "silent":
        vectors[rng.random(len(vectors)) < 0.5] = 0.0
    scale = draw(st.sampled_from([1e-6, 1.0, 1e6]))
    slopes = None
    if draw(st.booleans()):
        slopes = rng.normal(size=vectors.shape[:2]) * np.square(vectors).mean()
        slopes = (scale**2 * slopes).astype(np.float32)
    responses = Responses(
        cells=problem.cells,
        vectors=(scale * vectors).astype(np.float32),
        slopes=slopes,
        trust=draw(st.sampled_from([0.0, 0.25, 0.75, 1.0])),
    )
    values, stderr = responses.own_scores()
    table = dataclasses.replace(problem.sensitivity, values=values, stderr=stderr)
    return dataclasses.replace(problem, sensitivity=table, responses=responses)


def form_of(problem: Problem) -> Interacting:
    assert problem.responses is not None
    form = Interacting.of(problem, *bounded_interactions(problem.responses))
    assert form is not None
    return form


@settings(max_examples=150, deadline=None)
@given(problems())
def test_no_bound_is_above_the_best(problem: Problem) -> None:
    best = brute_force(problem, pairwise_score)
    solution = Pairs(num_starts=1, num_kicks=5).solve(problem)
    assert (solution.status is Status.INFEASIBLE) == (best is None)
    if best is None or solution.allocation is None:
        return
    tolerance = 1e-10 * float(np.abs(problem.sensitivity.values).sum())
    assert solution.score == pytest.approx(best, rel=1e-9, abs=tolerance)  # all were tried
    form = form_of(problem)
    cells = form.knapsack.cells
    choice = np.searchsorted(cells, solution.allocation.choice(problem.cells))
    score = form.score(choice)
    bound = lower_bound(form, choice)
    assert bound <= best or bound == math.inf
    if len(cells) == len(choice):
        return
    for prove in (relax_pairs, shift_pairs):
        proof = prove(form, choice, score)
        assert proof is not None
        assert proof.bound <= best
        for other in every_choice(problem):
            if problem.meets(other) and np.isin(other, cells).all():
                entries = np.searchsorted(cells, other)
                least = proof.bound + float(proof.reduced[entries].max())
                assert least <= pairwise_score(problem, other) + tolerance


@pytest.mark.parametrize("seed", range(3))
def test_the_bound_says_something(seed: int) -> None:
    """Measured: .026 to .045, by the semidefinite relaxation."""
    problem = with_responses(drawn(20, 5, seed=seed), samples=256, seed=seed)
    solution = solve(problem, "pairs")
    assert solution.status is Status.FEASIBLE
    assert 0 < solution.gap < 0.1


def test_many_cells_are_bounded_too() -> None:
    """Measured: .41, by one shift."""
    problem = with_responses(drawn(90, 8), samples=256)
    solution = solve(problem, "pairs")
    assert 0 < solution.gap < 0.5


@pytest.mark.parametrize("seed", range(6))
def test_nearly_the_best_of_all(seed: int) -> None:
    problem = with_responses(drawn(9, 4, tight=0.2, seed=seed), samples=64, alike=0.8, seed=seed)
    best = fast_pairwise_brute_force(problem)
    solution = Pairs(seed=seed).solve(problem)
    assert best is not None
    assert best * (1 - 1e-9) <= solution.score <= 1.02 * best
    assert solution.bound <= best * (1 + 1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_scores_changes_nothing(scale: float) -> None:
    problem = with_responses(drawn(20, 4), samples=64)
    assert problem.responses is not None
    vectors = (problem.responses.vectors * np.sqrt(scale)).astype(np.float32)
    responses = dataclasses.replace(problem.responses, vectors=vectors)
    one = Pairs(num_kicks=10).solve(problem)
    other = Pairs(num_kicks=10).solve(dataclasses.replace(problem, responses=responses))
    assert other.allocation == one.allocation
    assert other.score == pytest.approx(scale * one.score, rel=1e-5)
    assert other.gap == pytest.approx(one.gap, abs=1e-2)


def test_without_trust_the_additive_optimum_is_proven() -> None:
    problem = with_responses(drawn(30, 5))
    assert problem.responses is not None
    alone = dataclasses.replace(problem.responses, trust=0.0)
    solution = solve(dataclasses.replace(problem, responses=alone), "pairs")
    assert (solution.status, solution.gap) == (Status.OPTIMAL, 0.0)


def test_equal_scores_and_a_constant_cost() -> None:
    units = 14
    problem = made([[1.0] * 4] * units, {"memory": [[2.0] * 4] * units}, {"memory": 2.0 * units})
    problem = with_responses(problem)
    assert problem.responses is not None
    vectors = np.tile(problem.responses.vectors[:1], (len(problem.cells), 1, 1))
    responses = dataclasses.replace(problem.responses, vectors=vectors)
    solution = solve(dataclasses.replace(problem, responses=responses), "pairs")
    assert solution.gap < 0.1
    assert solution.score == pytest.approx(brute_force_of_one(responses, units), rel=1e-6)


def brute_force_of_one(responses: Responses, units: int) -> float:
    """Return the score of any choice where all cells respond alike."""
    interactions = responses.interactions()
    return float(units * interactions[0, 0] + units * (units - 1) * interactions[0, 4])


def test_a_matrix_with_a_negative_eigenvalue_is_not_convex() -> None:
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(30, 40))
    gram = factor @ factor.T
    values, vectors = np.linalg.eigh(gram)
    assert is_convex(gram)
    assert not is_convex(gram - 1.001 * values[0] * np.outer(vectors[:, 0], vectors[:, 0]))
    assert is_convex(np.zeros((3, 3)))
    assert not is_convex(np.array([[0.0, 1e-9], [1e-9, 1.0]]))


@pytest.mark.parametrize("samples", [2, 16])
def test_single_precision_moves_interactions_by_no_more_than_it_says(samples: int) -> None:
    for seed in range(5):
        responses = with_responses(drawn(12, 5, seed=seed), samples=samples, seed=seed).responses
        assert responses is not None
        exact, _ = responses.bounded_interactions()
        single, doubt = responses.bounded_interactions(single=True)
        root = np.sqrt(np.diagonal(exact))
        moved = np.abs(single - exact) / root / root[:, None]
        assert 0 < moved.max() <= doubt
