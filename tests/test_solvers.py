from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mpq.core.errors import InvalidInputError
from mpq.core.problem import Budget, Problem, Status
from mpq.core.tables import Cells, CostTable, Responses, SensitivityTable
from solvers import SOLVERS, get_solver, solve
from solvers.check import check
from solvers.ilp import Ilp
from tests.builders import schemes
from tests.contracts import solver_contract

SCHEMES = schemes("int2", "int3", "int4", "int5", "int6", "int7", "int8", "bf16")
UNITS = {"memory": "bytes", "latency": "s", "bops": "bitops"}

Ragged = Sequence[Sequence[float]]


def made(
    scores: Ragged,
    costs: Mapping[str, Ragged],
    limits: Mapping[str, float] | Sequence[tuple[str, float]] = (),
    *,
    names: Sequence[str] | None = None,
    fixed: float = 0.0,
) -> Problem:
    """A problem whose unit u may take as many schemes as row u of the scores is long."""
    cells = Cells(
        units=tuple(names or (f"unit{u}" for u in range(len(scores)))),
        schemes=tuple(SCHEMES[: len(row)] for row in scores),
    )

    def flat(rows: Ragged) -> np.ndarray:
        return np.array([value for row in rows for value in row], np.float64)

    budgets = limits.items() if isinstance(limits, Mapping) else limits
    return Problem(
        sensitivity=SensitivityTable(
            metric="made", cells=cells, values=flat(scores), stderr=np.zeros(len(cells))
        ),
        costs={
            name: CostTable.exact(name, UNITS[name], cells, flat(rows), fixed=fixed)
            for name, rows in costs.items()
        },
        budgets=tuple(Budget(name, limit) for name, limit in budgets),
    )


def drawn(
    units: int, choices: int, *, tight: float = 0.3, num_budgets: int = 2, seed: int = 0
) -> Problem:
    """Scores over orders of magnitude that fall with memory; latency is another matter."""
    rng = np.random.default_rng(seed)
    shape = (units, choices)
    size = np.exp(rng.normal(0, 1, (units, 1)))
    scores = np.exp(rng.normal(0, 2, (units, 1))) * np.sort(rng.random(shape))[:, ::-1] ** 2
    memory = np.round(1e6 * size * np.sort(rng.random(shape)))
    latency = 1e-3 * size * rng.random(shape)
    costs = dict(list({"memory": memory, "latency": latency}.items())[:num_budgets])
    mixed = sum(c / c.mean() for c in costs.values())
    small = np.argmin(mixed, axis=1)[:, None]  # fits whenever `tight` >= 0
    limits = {
        name: float((1 - tight) * np.take_along_axis(c, small, 1).sum() + tight * c.max(1).sum())
        for name, c in costs.items()
    }
    return made(scores, costs, limits)


def with_responses(problem: Problem, *, samples: int = 32, alike: float = 0.5, seed: int = 0):
    """Responses whose squares are about the problem's scores, partly shared by all cells."""
    rng = np.random.default_rng(seed)
    num_cells, num_units = len(problem.cells), len(problem.cells.units)
    sign = np.repeat(rng.choice([-1.0, 1.0], num_units), np.diff(problem.cells.offsets))
    shared = sign[:, None, None] * rng.normal(size=(1, samples, 2))
    own = rng.normal(size=(num_cells, samples, 2))
    size = np.sqrt(2 * problem.sensitivity.values)[:, None, None]
    vectors = size * (alike * shared + np.sqrt(1 - alike**2) * own)
    responses = Responses(cells=problem.cells, vectors=vectors.astype(np.float32))
    values, stderr = responses.own_scores()
    table = dataclasses.replace(problem.sensitivity, values=values, stderr=stderr)
    return dataclasses.replace(problem, sensitivity=table, responses=responses)


def chosen(problem: Problem, solver: str = "ilp") -> list[str]:
    solution = solve(problem, solver)
    assert solution.allocation is not None, solution
    return [str(scheme) for scheme in solution.allocation.values()]


# --- the contract, on problems of every kind ---------------------------------------------------

PROBLEMS = {
    "typical": drawn(9, 5),
    "one budget": drawn(9, 5, num_budgets=1),
    "tight": drawn(9, 5, tight=0.02, seed=1),
    "infeasible": drawn(9, 5, tight=-0.1),
    "no budget": drawn(9, 5).with_budgets(()),
    "loose": drawn(9, 5, tight=1.5),
    "no units": made([], {"memory": []}, {"memory": 1.0}),
    "no units, over budget": made([], {"memory": []}, {"memory": 1.0}, fixed=2.0),
    "one unit": made([[3, 2, 1]], {"memory": [[1, 2, 3]]}, {"memory": 2}),
    "nothing to choose": made([[1], [2]], {"memory": [[5], [6]]}, {"memory": 11}),
    "nothing to choose, over budget": made([[1], [2]], {"memory": [[5], [6]]}, {"memory": 10}),
    "constant cost": made([[3, 1], [2, 1]], {"memory": [[4, 4], [4, 4]]}, {"memory": 8}),
    "free": made([[3, 1], [2, 1]], {"memory": [[0, 0], [0, 0]]}, {"memory": 1e-9}),
    "no score": made([[0, 0], [0, 0]], {"memory": [[1, 2], [2, 1]]}, {"memory": 3}),
    "same budget twice": made(
        [[3, 1], [3, 1]], {"memory": [[1, 2], [1, 2]]}, [("memory", 4.0), ("memory", 3.0)]
    ),
}


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("name", SOLVERS)
def test_contract(name: str, kind: str) -> None:
    solution = solver_contract(get_solver(name), with_responses(PROBLEMS[kind]))
    nothing_fits = kind == "infeasible" or "over budget" in kind
    assert (solution.status is Status.INFEASIBLE) == nothing_fits


@pytest.mark.parametrize("kind", PROBLEMS)
def test_ilp_proves_small_problems(kind: str) -> None:
    assert solve(PROBLEMS[kind]).status in (Status.OPTIMAL, Status.INFEASIBLE)


# --- names -----------------------------------------------------------------------------------


def test_the_default_is_auto() -> None:
    assert solve(PROBLEMS["typical"]).solver == "auto"
    for name in SOLVERS:
        assert get_solver(name).name == name


def test_every_solver_has_a_line_in_the_table_of_solvers() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert [name for name in SOLVERS if f"\n| `{name}` |" not in readme] == []


def test_an_unknown_solver_is_named() -> None:
    with pytest.raises(InvalidInputError, match="unknown solver 'pair': did you mean 'pairs'") as e:
        get_solver("pair")
    assert e.value.code == "unknown_solver"


def test_importing_solvers_loads_no_solver_library() -> None:
    code = "import solvers, sys; assert not {'pulp', 'highspy', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", SOLVERS)
def test_unit_names_are_only_names(name: str) -> None:
    names = ["a-b", "a_b", "a b", "слой.0", "層", "x00000000", "budget0", "n" * 500]
    problem = drawn(len(names), 4)
    cells = Cells(units=tuple(names), schemes=problem.cells.schemes)
    renamed = Problem(
        sensitivity=dataclasses.replace(problem.sensitivity, cells=cells),
        costs={n: dataclasses.replace(t, cells=cells) for n, t in problem.costs.items()},
        budgets=problem.budgets,
    )
    assert chosen(with_responses(renamed), name) == chosen(with_responses(problem), name)


# --- limits, scales and ties -------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e9])
def test_a_choice_exactly_at_the_limit_fits(scale: float) -> None:
    rng = np.random.default_rng(3)
    memory = np.outer(rng.integers(1, 10**6, 30), [2, 3, 4, 8]) * scale
    scores = np.outer(rng.random(30) + 0.1, [8, 4, 2, 1])
    uniform = float(memory[:, 2].sum())
    at = solve(made(scores, {"memory": memory}, {"memory": uniform}))
    assert at.status is Status.OPTIMAL
    assert at.totals is not None
    assert at.totals["memory"] <= uniform
    assert at.score <= scores[:, 2].sum()
    smallest = float(memory[:, 0].sum())
    assert chosen(made(scores, {"memory": memory}, {"memory": smallest})) == ["int2"] * 30
    below = solve(made(scores, {"memory": memory}, {"memory": smallest - scale}))
    assert below.status is Status.INFEASIBLE


def test_one_byte_in_a_hundred_gigabytes_counts() -> None:
    memory = [[5e10, 5e10 + 1], [5e10, 5e10 + 1]]
    problem = made([[2, 0], [1, 0]], {"memory": memory}, {"memory": 1e11 + 1})
    assert chosen(problem) == ["int3", "int2"]


def test_a_limit_missed_by_a_rounding_error_is_missed() -> None:
    assert 0.1 + 0.2 > 0.3
    costs = {"latency": [[0.05, 0.1], [0.05, 0.2]]}
    problem = made([[1, 0], [1, 0]], costs, {"latency": 0.3})
    solution = solve(problem)
    assert solution.status is Status.OPTIMAL
    assert solution.score == 1.0


@pytest.mark.parametrize("scale", [1e-300, 1e-12, 1e12, 1e300])
def test_the_scale_of_scores_does_not_matter(scale: float) -> None:
    problem = drawn(15, 5)
    table = problem.sensitivity
    scaled = dataclasses.replace(
        problem, sensitivity=dataclasses.replace(table, values=table.values * scale)
    )
    assert chosen(scaled) == chosen(problem)
    assert solve(scaled).status is Status.OPTIMAL


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_the_scale_of_costs_does_not_matter(scale: float) -> None:
    problem = drawn(15, 5)
    scaled = Problem(
        sensitivity=problem.sensitivity,
        costs={
            name: CostTable.exact(name, table.unit, table.cells, table.values * scale)
            for name, table in problem.costs.items()
        },
        budgets=tuple(Budget(b.cost, b.limit * scale) for b in problem.budgets),
    )
    assert chosen(scaled) == chosen(problem)


def test_one_terrible_cell_does_not_drown_the_others() -> None:
    """With the worst score at 1e12, differences of 1e-6 between the rest still decide."""
    rng = np.random.default_rng(0)
    scores = np.sort(rng.random((12, 4)) * 1e-6)[:, ::-1]
    memory = np.sort(rng.integers(1, 1000, (12, 4)))
    limit = float(memory[:, 1].sum())
    calm = solve(made(scores, {"memory": memory}, {"memory": limit}))
    wild = np.hstack([scores, np.full((12, 1), 1e12)])
    wild_memory = np.hstack([memory, memory[:, :1]])
    loud = solve(made(wild, {"memory": wild_memory}, {"memory": limit}))
    assert loud.score == calm.score


def test_negative_scores_keep_a_sensible_gap() -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(10, 4))
    memory = rng.integers(1, 100, (10, 4))
    solution = solve(made(scores, {"memory": memory}, {"memory": float(memory.mean(1).sum())}))
    assert solution.score < 0
    assert solution.bound <= solution.score
    assert solution.gap == 0.0


@pytest.mark.parametrize("num_budgets", [0, 1, 2])
def test_without_any_sensitivity_the_cheapest_is_taken(num_budgets: int) -> None:
    problem = drawn(10, 4)
    flat = dataclasses.replace(problem.sensitivity, values=np.zeros(40))
    problem = dataclasses.replace(problem, sensitivity=flat, budgets=problem.budgets[:num_budgets])
    memory = problem.costs["memory"].values.reshape(10, 4)
    solution = solve(problem)
    assert solution.totals is not None
    if num_budgets < 2:
        assert solution.totals["memory"] == memory.min(axis=1).sum()
    else:  # of all that meet both budgets, the one of least memory
        least = dataclasses.replace(problem.sensitivity, values=problem.costs["memory"].values)
        other = dataclasses.replace(problem, sensitivity=least, budgets=problem.budgets[1:])
        assert solution.totals["memory"] == solve(other).score


def test_between_equal_cells_the_cheaper_then_the_first_is_taken() -> None:
    scores = [[1, 1, 1], [5, 0, 0]]
    memory = [[4, 4, 4], [1, 9, 9]]
    latency = [[3, 2, 2], [1, 8, 7]]
    costs = {"memory": memory, "latency": latency}
    for limits in ({}, {"memory": 100.0}, {"memory": 13.0}):
        assert chosen(made(scores, costs, limits)) == ["int3", "int4"]


def test_a_cheaper_cell_never_displaces_a_better_one() -> None:
    scores = [[1 + 1e-9, 1.0]] * 6
    memory = [[1, 1e9]] * 6
    assert chosen(made(scores, {"memory": memory}, {"memory": 7e9})) == ["int3"] * 6


# --- stopped ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("limit_s", [1e-3, 1.0])
def test_a_stopped_search_claims_nothing(limit_s: float) -> None:
    problem = drawn(3000, 5, seed=2)
    solution = check(problem, Ilp(time_limit_s=limit_s).solve(problem))
    if solution.gap > 0:
        assert solution.status is Status.FEASIBLE
        assert np.isfinite(solution.bound)
    assert solution.gap < 0.05


def test_stopped_before_the_end_is_feasible_with_its_bound() -> None:
    problem = drawn(60, 8, tight=0.05, seed=4)
    stopped = Ilp(time_limit_s=0.0).solve(problem)
    best = solve(problem)
    assert best.status is Status.OPTIMAL
    assert stopped.status in (Status.FEASIBLE, Status.UNKNOWN)
    assert stopped.bound <= best.score
    if stopped.status is Status.FEASIBLE:
        assert stopped.score >= best.score
        assert stopped.gap == pytest.approx((stopped.score - stopped.bound) / stopped.score)


@pytest.mark.slow
def test_ten_thousand_units_are_solved_within_a_minute() -> None:
    solution = solve(drawn(10_000, 7, num_budgets=1))
    assert solution.status is Status.OPTIMAL
    assert solution.seconds < 60


def test_others_may_have_used_highs_before() -> None:
    """HiGHS keeps the number of threads of its first user in a process and refuses others."""
    code = """
import highspy
first = highspy.Highs()
first.setOptionValue("output_flag", False)
first.setOptionValue("threads", 2)
first.addVar(0, 1)
first.run()
from tests.test_solvers import drawn, solve
assert solve(drawn(20, 6)).status == "optimal"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_solving_in_several_threads_changes_nothing() -> None:
    problems = [drawn(15, 5, seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(solve, problems))
    assert [s.allocation for s in together] == [solve(p).allocation for p in problems]
