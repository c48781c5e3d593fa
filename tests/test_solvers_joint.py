"""Budgets on costs that count pairs of cells: every solver and question against all choices."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpq.core.joint import JointCosts
from mpq.core.problem import Budget, Problem, Status
from mpq.core.protocols import Solver
from solvers import get_solver, solve
from solvers.auto import Auto
from solvers.brute_force import try_everything
from solvers.check import check
from solvers.exact import minimise
from solvers.joint_descent import descend_with_terms, repair_with_terms
from solvers.knapsack import Knapsack, fitting, with_terms
from solvers.pairs import Pairs
from solvers.pairwise import pairwise_score
from solvers.relaxation import relax
from solvers.risk import solve_at_risk
from solvers.trust import cross_validated
from tests.oracles import (
    brute_force,
    brute_force_at_risk,
    every_choice,
    fast_brute_force,
    slow_total,
)
from tests.test_risk import measured
from tests.test_solvers import drawn, made, with_responses
from tests.test_solvers_oracle import conditioned, problems

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")
QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck))
EXACT: dict[str, Solver] = {
    "ilp": get_solver("ilp"),
    "auto": Auto(),
    "auto by the compiled search": Auto(few_cells=0, gap=0.0),
    "brute_force": get_solver("brute_force"),
    "cbc": get_solver("cbc"),
}

# --- problems --------------------------------------------------------------------------------

Pairing = Callable[[np.random.Generator, int, int], np.ndarray]
PAIRINGS: dict[str, Pairing] = {  # what schemes i of one unit and j of another have together
    "one pair": lambda rng, m, n: _one(rng, m, n),
    "both low": lambda rng, m, n: -rng.random() * np.outer(*(_low(k) for k in (m, n))),
    "formats differ": lambda rng, m, n: rng.random() * (_low(m)[:, None] != _low(n)),
    "every pair": lambda rng, m, n: rng.normal(size=(m, n)),
    "few values": lambda rng, m, n: rng.integers(-2, 3, (m, n)).astype(float),
    "nothing": lambda rng, m, n: np.zeros((m, n)),
}


def _low(schemes: int) -> np.ndarray:
    return np.arange(schemes) < (schemes + 1) // 2


def _one(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    found = np.zeros((m, n))
    found[rng.integers(m), rng.integers(n)] = rng.normal()
    return found


def paired(
    problem: Problem, cost: str, pairing: str, edges: list[tuple[int, int]], scale: float, seed: int
) -> Problem:
    """Add joint costs of a kind between units, `scale` times the mean of the cost's values."""
    rng, offsets = np.random.default_rng(seed), problem.cells.offsets
    table = problem.costs[cost]
    first, second, values = [], [], []
    for one, other in edges:
        sizes = [int(offsets[u + 1] - offsets[u]) for u in (one, other)]
        matrix = PAIRINGS[pairing](rng, *sizes)
        for i, j in zip(*np.nonzero(matrix), strict=True):
            first.append(int(offsets[one] + i))
            second.append(int(offsets[other] + j))
            values.append(scale * float(table.values.mean()) * matrix[i, j])
    joint = JointCosts(
        cells=problem.cells,
        first=np.array(first, np.int64),
        second=np.array(second, np.int64),
        values=np.array(values, np.float64),
    )
    tables = {**problem.costs, cost: dataclasses.replace(table, joint=joint)}
    return dataclasses.replace(problem, costs=tables)


@st.composite
def joined(draw: st.DrawFn, base: st.SearchStrategy[Problem] | None = None) -> Problem:
    """Those of `tests.test_solvers_oracle` with pairs in some costs and limits that they reach."""
    problem = draw(base or st.one_of(problems(), conditioned()))
    units = len(problem.cells.units)
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    for cost in problem.costs if units > 1 else ():
        count = draw(st.integers(0, 6))
        edges = [tuple(rng.choice(units, 2, replace=False).tolist()) for _ in range(count)]
        kind, scale = draw(st.sampled_from(list(PAIRINGS))), draw(st.sampled_from([0.3, 1.0, 3.0]))
        problem = paired(problem, cost, kind, edges, scale, seed)
    some = problem.cells.offsets[:-1] + rng.integers(0, np.diff(problem.cells.offsets))
    kinds = st.sampled_from(["reached", "just missed", "between", "as it was"])
    budgets = []
    for budget in problem.budgets:
        total = problem.total(budget.cost, some)
        limits = {
            "reached": total,
            "just missed": float(np.nextafter(total, -math.inf)),
            "between": 0.8 * total,
            "as it was": budget.limit,
        }
        limit = limits[draw(kinds)]
        budgets += [Budget(budget.cost, limit)] if limit > 0 else []
    return problem.with_budgets(budgets)


def small(seed: int, pairing: str = "both low", scale: float = 0.7) -> Problem:
    rng = np.random.default_rng(seed)
    units, choices = int(rng.integers(3, 7)), int(rng.integers(2, 5))
    problem = drawn(units, choices, tight=float(rng.uniform(0.1, 0.6)), seed=seed)
    edges = [(u, u + 1) for u in range(units - 1)]
    return paired(problem, "latency", pairing, edges, scale, seed)


# --- the optimum -------------------------------------------------------------------------------


def agrees(problem: Problem, solver: Solver) -> None:
    best = fast_brute_force(problem)
    solution = check(problem, solver.solve(problem))
    if best is None:
        assert solution.status is Status.INFEASIBLE
        return
    assert solution.status is Status.OPTIMAL
    magnitude = float(np.abs(problem.sensitivity.values).max(initial=0.0))
    assert solution.score == pytest.approx(best, rel=1e-9, abs=1e-12 * magnitude)


@pytest.mark.parametrize("name", ["ilp", "auto", "auto by the compiled search"])
@given(problem=joined())
@settings(QUIET, max_examples=100)
def test_it_finds_what_trying_everything_finds(name: str, problem: Problem) -> None:
    agrees(problem, EXACT[name])


@pytest.mark.parametrize("name", ["brute_force", "cbc"])
@given(problem=joined())
@settings(QUIET, max_examples=40)
def test_others_find_it_too(name: str, problem: Problem) -> None:
    agrees(problem, EXACT[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ilp", "auto"])
@given(problem=joined())
@settings(QUIET, max_examples=2000)
def test_it_finds_what_trying_everything_finds_2000(name: str, problem: Problem) -> None:
    agrees(problem, EXACT[name])


@given(problem=joined())
@settings(QUIET, max_examples=60)
def test_totals_are_those_of_a_plain_sum(problem: Problem) -> None:
    rng = np.random.default_rng(0)
    sizes = np.diff(problem.cells.offsets)
    for _ in range(5):
        choice = problem.cells.offsets[:-1] + rng.integers(0, sizes)
        for cost in problem.costs:
            assert problem.total(cost, choice) == slow_total(problem, cost, choice)
        for row in problem.rows():
            plain = row.relaxed()
            assert plain.total(choice) <= row.total(choice) + 1e-9 * abs(row.total(choice))
            assert plain.met(choice) or not row.met(choice)


@given(problem=joined())
@settings(QUIET, max_examples=60)
def test_the_least_total_of_a_cost_is_what_trying_everything_finds(problem: Problem) -> None:
    free = problem.with_budgets([])
    for cost, table in problem.costs.items():
        if math.prod(map(len, problem.cells.schemes)) > 3000:
            continue
        fits = [c for c in every_choice(free) if free.meets(c)]
        least = min((problem.total(cost, c) for c in fits), default=None)
        for by in (minimise, try_everything):
            found = by(free, table.values, [], time_limit_s=60, joint=table.joint)
            if least is None:
                assert found.choice is None
            else:
                assert found.choice is not None
                size = float(np.abs(table.values).max(initial=0.0)) + abs(least)
                assert problem.total(cost, found.choice) == pytest.approx(least, abs=1e-9 * size)
                assert table.fixed + found.bound <= least + 1e-9 * size


@given(seed=st.integers(0, 2**32 - 1), risk=st.sampled_from([0.5, 0.8, 0.95]))
@settings(QUIET, max_examples=60)
def test_the_optimum_at_risk_is_what_trying_everything_finds(seed: int, risk: float) -> None:
    problem = measured(small(seed), spread=0.4, seed=seed)
    best = brute_force_at_risk(problem, risk)
    solution = check(problem, solve(problem, "auto", risk))
    if best is None:
        assert solution.status is Status.INFEASIBLE
        return
    assert solution.score == pytest.approx(best, rel=1e-9)
    assert solution.quantiles is not None
    assert solution.quantiles["latency"] <= problem.limits()["latency"]


def test_two_neighbours_in_int8_save_what_a_budget_needs() -> None:
    """Alone each of the wide schemes is too slow; both at low bits together are fast enough."""
    problem = made([[2, 0], [2, 0]], {"latency": [[3, 2], [3, 2]]}, {"latency": 3.5})
    assert solve(problem).status is Status.INFEASIBLE
    cells = list(problem.cells)
    joint = JointCosts.from_cells(problem.cells, {(cells[0], cells[2]): -3.0})
    table = dataclasses.replace(problem.costs["latency"], joint=joint)
    problem = dataclasses.replace(problem, costs={"latency": table})
    for name in ("auto", "ilp", "brute_force"):
        solution = check(problem, solve(problem, name))
        assert solution.allocation is not None
        assert [str(s) for s in solution.allocation.values()] == ["int2", "int2"]
        assert solution.totals == {"latency": 3.0}


def test_what_is_not_limited_changes_nothing() -> None:
    problem = small(3).with_budgets([Budget("memory", small(3).limits()["memory"])])
    bare = dataclasses.replace(problem.costs["latency"], joint=None)
    plain = dataclasses.replace(problem, costs={**problem.costs, "latency": bare})
    for name in ("auto", "greedy", "dp"):
        assert solve(problem, name).allocation == solve(plain, name).allocation


# --- pairs of units in the score -----------------------------------------------------------------


def test_pairs_finds_the_best_of_small_problems_nearly_always(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """37 of 40 hits show, with 95 % confidence, a rate above 0.81 (Clopper-Pearson)."""
    monkeypatch.setattr("solvers.pairs.can_try_all", lambda form: False)
    hits = feasible = 0
    for seed in range(50):
        problem = small(seed, ["both low", "formats differ", "every pair"][seed % 3])
        problem = with_responses(problem, alike=0.6, seed=seed)
        best = brute_force(problem, pairwise_score)
        solution = check(problem, Pairs(num_kicks=20).solve(problem))
        assert (best is None) == (solution.status is Status.INFEASIBLE)
        if best is None:
            continue
        feasible += 1
        assert solution.bound <= best + 1e-9 * abs(best)
        assert solution.score >= best - 1e-9 * abs(best)
        hits += solution.score <= best + 1e-9 * abs(best)
    assert feasible >= 40
    assert hits >= 37 / 40 * feasible


def test_pairs_at_risk_and_trust_keep_the_budgets() -> None:
    problem = with_responses(measured(small(4), spread=0.5))
    trusted = cross_validated(problem)
    solution = solve_at_risk(trusted, 0.9, "pairs")
    assert solution.quantiles is not None
    assert solution.quantiles["latency"] <= problem.limits()["latency"]


@pytest.mark.parametrize("seed", range(5))
def test_no_single_change_nor_swap_improves_the_end_of_a_descent(seed: int) -> None:
    problem = small(seed, "every pair", 0.4)
    values, everything = problem.sensitivity.values, np.arange(len(problem.cells))
    plain = fitting(problem, values, [row.relaxed() for row in problem.rows()], everything)
    assert plain is not None
    knapsack = with_terms(problem, plain)
    start = repair_with_terms(knapsack, knapsack.starts[:-1])
    if start is None:
        return
    found = descend_with_terms(
        knapsack, start, prices=np.zeros(2), cross=None, field=None, pool=len(everything)
    )
    end, owners = knapsack.cells[found], np.searchsorted(problem.cells.offsets, everything, "right")
    assert problem.meets(end)
    for first in everything:
        for second in everything:
            other = end.copy()
            other[owners[first] - 1], other[owners[second] - 1] = first, second
            if owners[first] != owners[second] and problem.meets(other):
                assert problem.score(other) >= problem.score(end) * (1 - 1e-9)


# --- the relaxation, and how long it takes -------------------------------------------------------


@given(problem=joined())
@settings(QUIET, max_examples=80)
def test_what_the_relaxation_proves_holds_for_every_choice(problem: Problem) -> None:
    if not problem.cells.units or math.prod(map(len, problem.cells.schemes)) > 3000:
        return
    values, everything = problem.sensitivity.values, np.arange(len(problem.cells))
    knapsack = fitting(problem, values, problem.rows(), everything)
    relaxed = None if knapsack is None else relax(knapsack)
    fits = [c for c in every_choice(problem) if problem.meets(c)]
    if knapsack is None or relaxed is None:
        assert not fits
        return
    bare = Knapsack.of(problem.cells, values, (), everything)
    size = 1e-9 * float(np.abs(values).max()) * len(problem.cells.units)
    for choice in fits:
        entries = np.searchsorted(knapsack.cells, choice)
        assert np.array_equal(knapsack.cells[entries], choice)
        above = problem.score(choice) - bare.base
        assert above >= relaxed.bound - size
        assert (above >= relaxed.bound + relaxed.reduced[entries] - size).all()


@pytest.mark.parametrize("pairing", ["one pair", "both low", "formats differ", "every pair"])
@pytest.mark.parametrize(
    ("units", "choices", "seconds"),
    [(60, 4, 2.0), pytest.param(200, 8, 10.0, marks=pytest.mark.slow)],
)
def test_a_chain_is_solved_in_seconds(
    pairing: str, units: int, choices: int, seconds: float
) -> None:
    problem = drawn(units, choices, seed=1)
    edges = [(u, (u + 1) % units) for u in range(units)]
    problem = paired(problem, "latency", pairing, edges, 0.3, 1)
    start = time.process_time()
    solution = check(problem, solve(problem))
    assert time.process_time() - start < seconds
    assert solution.gap <= 1e-3
    if units == 60:
        quick = Pairs(prove=False).solve(with_responses(problem))
        assert quick.allocation is not None
        assert problem.fits(quick.allocation)
