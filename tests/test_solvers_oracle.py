"""Solver "ilp" against trying every allocation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpq.core.problem import Problem, Status
from solvers import solve
from solvers.check import check
from tests.oracles import brute_force, fast_brute_force
from tests.test_solvers import made

SCORES = {
    "few values": lambda rng, shape: rng.integers(0, 4, shape).astype(float),
    "all the same": lambda rng, shape: np.zeros(shape),
    "heavy tailed": lambda rng, shape: np.exp(rng.normal(0, 4, shape)),
    "of both signs": lambda rng, shape: rng.normal(size=shape),
    "tiny": lambda rng, shape: 1e-12 * rng.random(shape),
    "huge": lambda rng, shape: 1e12 * rng.random(shape),
}
COSTS = {
    "bytes": lambda rng, shape: rng.integers(0, 10**6, shape).astype(float),
    "few values": lambda rng, shape: rng.integers(1, 4, shape).astype(float),
    "seconds": lambda rng, shape: 1e-3 * rng.random(shape),
    "constant": lambda rng, shape: np.full(shape, 7.0),
    "identical units": lambda rng, shape: np.tile(rng.random(shape[1]), (shape[0], 1)),
}
UNRELATED = ("memory", "latency", "bops")


@st.composite
def problems(draw: st.DrawFn, costs: tuple[str, ...] = tuple(COSTS)) -> Problem:
    """Up to 8 units of up to 5 schemes and 3 budgets; limits often at what some choice takes."""
    units, choices = draw(st.integers(0, 8)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (units, choices)
    scores = SCORES[draw(st.sampled_from(list(SCORES)))](rng, shape)
    if draw(st.booleans()):  # more bits, less loss
        scores = np.sort(scores, axis=1)[:, ::-1]
    tables = {
        name: COSTS[draw(st.sampled_from(costs))](rng, shape)
        for name in UNRELATED[: draw(st.integers(0, 3))]
    }
    if tables and draw(st.booleans()):  # more bits, more memory
        tables["memory"] = np.sort(tables["memory"], axis=1)
    fixed = draw(st.sampled_from([0.0, 3.0]))
    problem = made(scores, tables, fixed=fixed)
    some = problem.cells.offsets[:-1] + rng.integers(0, choices, units)
    kind = st.sampled_from(["reached", "just missed", "between", "loose"])
    limits = []
    for name, table in tables.items():
        reached, low = problem.total(name, some), fixed + table.min(axis=1).sum()
        limit = {
            "reached": reached,
            "just missed": float(np.nextafter(reached, 0)),
            "between": low + 0.4 * (reached - low),
            "loose": 10 * reached,
        }[draw(kind)]
        limits.append((name, max(limit, 1e-12)))
    problem = made(scores, tables, limits, fixed=fixed)
    pins = draw(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 4)), max_size=2))
    return problem.pinned(
        {
            problem.cells.units[u]: [problem.cells.schemes[u][place % choices]]
            for u, place in pins
            if u < units
        }
    )


def agrees(problem: Problem) -> None:
    best = fast_brute_force(problem)
    solution = check(problem, solve(problem))
    if best is None:
        assert solution.status is Status.INFEASIBLE
        return
    assert solution.status is Status.OPTIMAL
    magnitude = float(np.abs(problem.sensitivity.values).max(initial=0.0))
    assert solution.score == pytest.approx(best, rel=1e-9, abs=1e-12 * magnitude)


@given(problems())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_ilp_finds_what_trying_everything_finds(problem: Problem) -> None:
    agrees(problem)


@pytest.mark.slow
@given(problems())
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
def test_ilp_finds_what_trying_everything_finds_2000(problem: Problem) -> None:
    agrees(problem)


@given(problems())
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_two_ways_to_try_everything_agree(problem: Problem) -> None:
    if np.prod(np.diff(problem.cells.offsets), dtype=float) <= 3000:
        slow, fast = brute_force(problem), fast_brute_force(problem)
        assert (slow is None) == (fast is None)
        assert slow is None or fast == pytest.approx(slow, rel=1e-12, abs=1e-12 * abs(slow))


@pytest.mark.parametrize("seed", range(20))
def test_rounding_noise_at_the_limit_never_breaks_a_budget(seed: int) -> None:
    """Many choices meet this limit only up to rounding: nothing false may be claimed."""
    rng = np.random.default_rng(seed)
    costs = rng.choice([0.1, 0.2, 0.3, 0.7], (8, 4))
    scores = rng.integers(0, 5, (8, 4)) * 0.1
    limit = round(float(costs.mean(axis=1).sum()), 1)
    problem = made(scores, {"latency": costs}, {"latency": limit})
    best, solution = fast_brute_force(problem), check(problem, solve(problem))
    assert best is not None
    assert solution.bound <= best * (1 + 1e-9)
    assert solution.score >= best * (1 - 1e-9)
    if solution.status is Status.OPTIMAL:
        assert solution.score == pytest.approx(best, rel=1e-9)
