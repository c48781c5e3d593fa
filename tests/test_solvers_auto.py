"""Solver "auto" against trying everything, against HiGHS, and at the extremes."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mpq.core.constraints import Constraint
from mpq.core.problem import Budget, Problem, Status
from mpq.core.tables import Cells, CostTable, SensitivityTable
from solvers.auto import Auto, _undominated
from solvers.check import check
from solvers.core import Core, Limits
from solvers.exact import minimise
from solvers.ilp import Ilp
from solvers.knapsack import fitting
from solvers.lagrange import maximise_dual
from solvers.relaxation import relax
from tests.builders import schemes
from tests.test_hawqv3 import DATA, hawq, limit_of
from tests.test_solvers import drawn, made

ROOT = Path(__file__).parents[1]
Own = partial(Auto, few_cells=0)  # the compiled search, however small the problem


@pytest.mark.parametrize("few_cells", [0, 2000])
def test_a_cheaper_cell_of_equal_score_breaks_no_other_condition(few_cells: int) -> None:
    """Cell 0 of each unit is as good as cell 1 and cheaper, but more than one must not be taken."""
    problem = made([[1, 1]] * 3, {"memory": [[1, 2]] * 3}, {"memory": 9})
    cells = problem.cells
    first = {
        (unit, schemes[0]): 1.0 for unit, schemes in zip(cells.units, cells.schemes, strict=True)
    }
    row = Constraint.from_cells("few", cells, first, 1.0)
    solution = Own(few_cells=few_cells).solve(dataclasses.replace(problem, constraints=(row,)))
    assert solution.totals == {"memory": 5.0}
    pairs = tuple(itertools.combinations(first, 2))
    solution = Own(few_cells=few_cells).solve(dataclasses.replace(problem, forbidden=pairs))
    assert solution.totals == {"memory": 5.0}


@pytest.mark.parametrize("tight", [0.05, 0.3])
@pytest.mark.parametrize("num_budgets", [1, 2, 3])
def test_auto_equals_ilp(num_budgets: int, tight: float) -> None:
    problem = drawn(30, 5, tight=tight, num_budgets=min(num_budgets, 2), seed=num_budgets)
    if num_budgets == 3:
        rng = np.random.default_rng(0)
        bops = rng.random((30, 5))
        costs = {n: t.values.reshape(30, 5) for n, t in problem.costs.items()}
        limits = {b.cost: b.limit for b in problem.budgets} | {"bops": float(bops.mean() * 30)}
        problem = made(problem.sensitivity.values.reshape(30, 5), {**costs, "bops": bops}, limits)
    auto, ilp = Own(gap=0.0).solve(problem), Ilp().solve(problem)
    assert auto.status is ilp.status is Status.OPTIMAL
    assert auto.score == pytest.approx(ilp.score, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_auto_equals_ilp_at_200_units(seed: int) -> None:
    tight = (0.05, 0.1, 0.3, 0.6)[seed % 4]
    problem = drawn(200, 4 + seed % 5, tight=tight, num_budgets=1 + seed % 2, seed=seed)
    auto, ilp = Own(gap=0.0).solve(problem), Ilp().solve(problem)
    assert auto.status is ilp.status is Status.OPTIMAL
    assert auto.score == pytest.approx(ilp.score, rel=1e-9)


@pytest.mark.parametrize("name", DATA["published"])
def test_published_configuration(name: str) -> None:
    published = DATA["published"][name]
    solution = Own().solve(hawq({published["budget"]: published["limit"]}))
    assert solution.gap == 0
    assert solution.score == pytest.approx(published["omega"], rel=1e-9)


def test_three_budgets_of_the_published_network() -> None:
    joint = DATA["joint_all_0.5"]
    solution = Own().solve(hawq({c: limit_of(c, joint["ratio"]) for c in joint["budgets"]}))
    assert solution.gap == 0
    assert solution.score == pytest.approx(joint["omega"], abs=5e-7)


@pytest.mark.parametrize("tight", [0.05, 0.3])
@pytest.mark.parametrize("units", [60, 500])
def test_the_dual_is_the_linear_relaxation(units: int, tight: float) -> None:
    """The best Lagrangian bound of a knapsack is its linear relaxation (Geoffrion 1974)."""
    for num_budgets in (1, 2):
        problem = drawn(units, 6, tight=tight, num_budgets=num_budgets, seed=units)
        values, rows = problem.sensitivity.values, problem.rows()
        knapsack = fitting(problem, values, rows, np.arange(len(problem.cells)))
        assert knapsack is not None
        dual, relaxed = maximise_dual(knapsack), relax(knapsack)
        assert dual is not None
        assert relaxed is not None
        assert dual.bound == pytest.approx(relaxed.bound, rel=1e-8)


def test_a_part_of_a_core_keeps_what_is_settled() -> None:
    problem = drawn(12, 4, seed=5)
    rows, everything = problem.rows(), np.arange(len(problem.cells))
    knapsack = fitting(problem, problem.sensitivity.values, rows, everything)
    assert knapsack is not None
    costs = np.array([row.coefficients[knapsack.cells] for row in rows])
    limits = np.array([row.limit for row in rows])
    stated = Limits(costs=costs, fixed=np.zeros(2), limits=limits, sizes=limits)
    rng = np.random.default_rng(0)
    taken = np.array(
        [rng.integers(a, b) for a, b in zip(knapsack.starts, knapsack.starts[1:], strict=False)]
    )
    core, left = Core.whole(knapsack, stated), set(taken.tolist())
    for units in (range(5), range(5, 9), range(9, 12)):
        keep = ~np.isin(core.units, list(units)) | np.isin(core.entries, list(left))
        core = core.part(keep)
    assert not len(core.entries)
    assert sorted(core.settled) == sorted(taken)
    assert core.worth == pytest.approx(knapsack.objective[taken].sum(), rel=1e-12)
    assert core.sums.sum(axis=1) == pytest.approx(costs[:, taken].sum(axis=1), rel=1e-12)
    used = knapsack.weights[:, taken].sum(axis=1)
    assert core.slack == pytest.approx(knapsack.slack - used, rel=1e-9, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-300, 1e-12, 1e12, 1e300])
def test_the_scale_of_scores_does_not_matter(scale: float) -> None:
    problem = drawn(15, 5)
    table = problem.sensitivity
    scaled = dataclasses.replace(
        problem, sensitivity=dataclasses.replace(table, values=table.values * scale)
    )
    one, other = Own(gap=0.0).solve(problem), Own(gap=0.0).solve(scaled)
    assert one.allocation == other.allocation
    assert other.status is Status.OPTIMAL


def test_a_gap_is_a_promise() -> None:
    for seed in range(5):
        problem = drawn(300, 6, tight=0.1, seed=seed)
        quick, exact = Own(gap=1e-3, effort=0).solve(problem), Own(gap=0.0).solve(problem)
        assert quick.gap <= 1e-3
        assert exact.status is Status.OPTIMAL
        assert quick.bound <= exact.score <= quick.score


def test_equal_scores_and_two_budgets_in_conflict() -> None:
    memory, latency = [[1.0, 3.0]] * 20, [[3.0, 1.0]] * 20
    limits = {"memory": 40.0, "latency": 40.0}
    solution = Own().solve(made([[1.0, 1.0]] * 20, {"memory": memory, "latency": latency}, limits))
    assert solution.status is Status.OPTIMAL
    assert solution.totals == limits


def test_stopped_at_once_claims_nothing_false() -> None:
    problem = drawn(60, 8, tight=0.05, seed=4)
    stopped, best = Own(time_limit_s=0.0).solve(problem), Own(gap=0.0).solve(problem)
    assert stopped.bound <= best.score
    assert stopped.status is not Status.INFEASIBLE
    if stopped.allocation is not None:
        assert stopped.score >= best.score


def test_an_integer_program_may_start_from_a_choice() -> None:
    """What the dual leaves open goes to HiGHS where listing takes too long."""
    problem = drawn(40, 6, tight=0.1, seed=8)
    values, everything = problem.sensitivity.values, np.arange(len(problem.cells))
    alone = minimise(problem, values, problem.budgets, time_limit_s=60)
    assert alone.choice is not None
    worse = Own(gap=1.0, effort=0).solve(problem).allocation
    assert worse is not None
    again = minimise(
        problem,
        values,
        problem.budgets,
        time_limit_s=60,
        among=everything,
        known=worse.choice(problem.cells),
    )
    assert again.proven
    assert again.bound == pytest.approx(alone.bound, rel=1e-9)


@pytest.mark.slow
def test_a_hundred_thousand_units() -> None:
    solution = Own().solve(drawn(100_000, 4))
    assert solution.gap <= 1e-4
    assert solution.seconds < 20


def test_few_cells_load_no_compiled_search() -> None:
    code = "import sys; from tests.test_solvers import drawn; from solvers import solve; "
    code += "solve(drawn(20, 4)); print('numba' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "False"


def test_a_cell_of_equal_score_takes_no_place_that_breaks_another_condition() -> None:
    """Budgets alone would let the cheaper cell take the place of the one that was chosen."""
    problem = made([[1.0, 1.0], [0.0, 5.0]], {"memory": [[1, 2], [1, 1]]}, {"memory": 9})
    chosen = np.array([1, 2])
    assert _undominated(problem, chosen).tolist() == [0, 2]
    cells = list(problem.cells)
    row = Constraint.from_cells("other", problem.cells, {cells[0]: 1.0}, 0.5)
    for changes in ({"forbidden": ((cells[0], cells[2]),)}, {"constraints": (row,)}):
        other = dataclasses.replace(problem, **changes)
        assert _undominated(other, chosen).tolist() == [1, 2]
        assert solve_both(other) == [1.0, 1.0]


def solve_both(problem: Problem) -> list[float]:
    return [check(problem, Auto(few_cells=few).solve(problem)).score for few in (0, 10**6)]


@pytest.mark.slow
def test_a_million_units_with_one_choice() -> None:
    units = 1_000_000
    cells = Cells(units=tuple(f"unit{u}" for u in range(units)), schemes=(schemes("int4"),) * units)
    ones = np.ones(units)
    problem = Problem(
        sensitivity=SensitivityTable(metric="made", cells=cells, values=ones, stderr=0 * ones),
        costs={"memory": CostTable.exact("memory", "bytes", cells, ones)},
        budgets=(Budget("memory", 1e6),),
    )
    solution = Own().solve(problem)
    assert (solution.status, solution.score, solution.gap) == (Status.OPTIMAL, 1e6, 0.0)
    tight = Own().solve(problem.with_budgets([Budget("memory", 999_999.0)]))
    assert tight.status is Status.INFEASIBLE
    assert tight.infeasibility is not None
    assert tight.infeasibility.smallest == {"memory": 1e6}
    assert "no unit has a choice" in tight.infeasibility.message
