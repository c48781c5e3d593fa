"""Solvers against trying every allocation."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pulp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpq.core.problem import Budget, Constraint, Problem, Status
from mpq.core.protocols import Solver
from solvers import get_solver, solve
from solvers.auto import Auto
from solvers.check import check
from solvers.knapsack import fitting
from solvers.milp import branch_and_cut
from tests.oracles import brute_force, fast_brute_force
from tests.test_solvers import drawn, made

# Hypothesis prints a failing example in full, whatever its size.
pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")

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
    units = draw(st.sampled_from([5, 6, 7, 8, 4, 3, 2, 1, 0]))
    choices = draw(st.sampled_from([3, 4, 5, 2, 1]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (units, choices)
    scores = SCORES[draw(st.sampled_from(list(SCORES)))](rng, shape)
    if draw(st.integers(0, 3)):  # more bits, less loss
        scores = np.sort(scores, axis=1)[:, ::-1]
    tables = {
        name: COSTS[draw(st.sampled_from(costs))](rng, shape)
        for name in UNRELATED[: draw(st.sampled_from([1, 2, 3, 0]))]
    }
    if draw(st.integers(0, 3)):  # more bits, more of everything
        tables = {name: np.sort(table, axis=1) for name, table in tables.items()}
    fixed = draw(st.sampled_from([0.0, 3.0]))
    problem = made(scores, tables, fixed=fixed)
    some = problem.cells.offsets[:-1] + rng.integers(0, choices, units)
    kind = st.sampled_from(["reached", "between", "just missed", "loose"])
    limits = []
    for name, table in tables.items():
        reached, low = problem.total(name, some), fixed + table.min(axis=1).sum()
        limit = {
            "reached": reached,
            "just missed": float(np.nextafter(reached, 0)),
            "between": low + 0.6 * (reached - low),
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


COEFFICIENTS = {
    "of both signs": lambda rng, n: rng.normal(size=n),
    "counts": lambda rng, n: rng.integers(-3, 4, n).astype(float),
    "few cells": lambda rng, n: rng.integers(-3, 4, n) * (rng.random(n) < 0.2),
    "all negative": lambda rng, n: -rng.random(n),
}


@st.composite
def conditioned(draw: st.DrawFn) -> Problem:
    """Those problems with rows of both signs, lower bounds of costs and forbidden pairs."""
    problem = draw(problems())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    cells, sizes = problem.cells, np.diff(problem.cells.offsets)
    some = cells.offsets[:-1] + rng.integers(0, sizes)
    slack = st.sampled_from(["reached", "just missed", "loose"])

    def limited(row: Constraint) -> Constraint:
        total = row.total(some)
        wider = total + 0.3 * abs(row.coefficients).sum()
        limits = {"reached": total, "just missed": np.nextafter(total, -np.inf), "loose": wider}
        return dataclasses.replace(row, limit=float(limits[draw(slack)]))

    rows = []
    for number in range(draw(st.integers(0, 2))):
        made_by = COEFFICIENTS[draw(st.sampled_from(list(COEFFICIENTS)))]
        values = made_by(rng, len(cells))
        row = Constraint(name=f"row{number}", cells=cells, coefficients=values, limit=0.0)
        rows.append(limited(row))
    bounded = draw(st.sets(st.sampled_from(UNRELATED)))
    tables = [table for name, table in problem.costs.items() if name in bounded]
    rows += [limited(Constraint.at_least(table, 0.0)) for table in tables]
    every = list(cells)
    pairs = []
    for _ in range(draw(st.integers(0, 6)) if len(sizes) > 1 else 0):
        one, other = rng.choice(len(sizes), 2, replace=False)
        pair = [cells.offsets[u] + rng.integers(0, sizes[u]) for u in (one, other)]
        pairs.append((every[pair[0]], every[pair[1]]))
    return dataclasses.replace(problem, constraints=tuple(rows), forbidden=tuple(pairs))


def agrees(problem: Problem, solver: Solver) -> None:
    best = fast_brute_force(problem)
    solution = check(problem, solver.solve(problem))
    if best is None:
        assert solution.status is Status.INFEASIBLE
        return
    assert solution.status is Status.OPTIMAL
    magnitude = float(np.abs(problem.sensitivity.values).max(initial=0.0))
    assert solution.score == pytest.approx(best, rel=1e-9, abs=1e-12 * magnitude)


EXACT = {
    "ilp": get_solver("ilp"),
    "cbc": get_solver("cbc"),
    "auto": Auto(few_cells=0, gap=0.0),  # the compiled search, however small the problem
}
QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", ["ilp", "auto"])
@given(problem=problems())
@settings(QUIET, max_examples=150)
def test_it_finds_what_trying_everything_finds(name: str, problem: Problem) -> None:
    agrees(problem, EXACT[name])


@pytest.mark.parametrize("name", ["ilp", "auto"])
@given(problem=conditioned())
@settings(QUIET, max_examples=150)
def test_it_finds_it_under_conditions_of_every_kind(name: str, problem: Problem) -> None:
    agrees(problem, EXACT[name])


@given(problem=st.one_of(problems(), conditioned()))
@settings(QUIET, max_examples=40)
def test_cbc_finds_it_too(problem: Problem) -> None:
    agrees(problem, EXACT["cbc"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ilp", "auto"])
@given(problem=problems())
@settings(QUIET, max_examples=2000)
def test_it_finds_what_trying_everything_finds_2000(name: str, problem: Problem) -> None:
    agrees(problem, EXACT[name])


@pytest.mark.slow
@given(problem=conditioned())
@settings(QUIET, max_examples=2000)
def test_auto_finds_it_under_conditions_of_every_kind_2000(problem: Problem) -> None:
    agrees(problem, EXACT["auto"])


@given(problems(costs=("bytes", "few values", "identical units")))
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_integer_program_alone_finds_it_too(problem: Problem) -> None:
    """Most small problems are decided by bounds; here nothing is ruled out beforehand.

    Limits that are missed by a rounding error are not its business: they are widened.
    """
    wider = [Budget(b.cost, b.limit * (1 + 1e-9)) for b in problem.budgets]
    problem = problem.with_budgets(wider)
    values, rows = problem.sensitivity.values, problem.rows()
    knapsack = fitting(problem, values, rows, np.arange(len(problem.cells)))
    best = fast_brute_force(problem)
    if knapsack is None or not len(knapsack.cells):
        assert best is None or not problem.cells.units
        return
    answer = branch_and_cut(knapsack, [], time_limit_s=60)
    assert answer.complete
    assert (answer.choice is None) == (best is None)
    if answer.choice is not None:
        found = problem.score(knapsack.cells[answer.choice])
        magnitude = float(np.abs(values).max())
        assert found == pytest.approx(best, rel=1e-9, abs=1e-9 * magnitude)


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


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_another_solver_agrees_on_large_problems(seed: int) -> None:
    """CBC on the whole integer program, with nothing ruled out beforehand."""
    problem = drawn(100, 6, num_budgets=1 + seed % 2, tight=0.2, seed=seed)
    offsets = problem.cells.offsets
    program = pulp.LpProblem("other", pulp.LpMinimize)
    x = [program.add_variable(f"x{i}", 0, 1, pulp.LpInteger) for i in range(len(problem.cells))]
    program += pulp.lpDot(problem.sensitivity.values.tolist(), x)
    for a, b in itertools.pairwise(offsets.tolist()):
        program += pulp.lpSum(x[a:b]) == 1
    for budget in problem.budgets:
        costs = problem.costs[budget.cost].values
        program += pulp.lpDot((costs / budget.limit).tolist(), x) <= 1
    with pytest.deprecated_call():  # PuLP 4 leaves CBC to an extra package
        cbc = pulp.PULP_CBC_CMD(msg=False, gapRel=1e-7, timeLimit=60)
    program.solve(cbc)
    taken = np.flatnonzero([variable.varValue > 0.5 for variable in x])
    assert len(taken) == len(problem.cells.units)
    solution = solve(problem)
    assert solution.status is Status.OPTIMAL
    assert solution.score <= problem.score(taken) * (1 + 1e-9)
    assert solution.score == pytest.approx(problem.score(taken), rel=1e-5)
