"""Solvers "cbc", "brute_force", "greedy" and "dp": what each promises."""

from __future__ import annotations

import dataclasses
import itertools
import time

import numpy as np
import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.core.errors import InvalidInputError, RunFailedError
from mpq.core.problem import Constraint, Problem, Status
from solvers import milp, solve
from solvers.brute_force import BruteForce
from solvers.check import check
from solvers.dominance import undominated
from solvers.dp import Dp, Pareto, pareto
from solvers.greedy import Greedy
from solvers.ilp import Ilp
from tests.oracles import every_choice, fast_brute_force
from tests.test_solvers import PROBLEMS, drawn, made
from tests.test_solvers_oracle import QUIET, agrees, conditioned, problems

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")

# --- cbc -------------------------------------------------------------------------------------


def cbc(time_limit_s: float) -> Ilp:
    return Ilp(name="cbc", library="cbc", time_limit_s=time_limit_s)


@pytest.mark.parametrize("tight", [0.3, 0.05])
def test_cbc_equals_highs(tight: float) -> None:
    problem = drawn(60, 6, tight=tight, seed=3)
    one, other = solve(problem, "cbc"), solve(problem, "ilp")
    assert one.status is other.status is Status.OPTIMAL
    assert one.score == pytest.approx(other.score, rel=1e-9)


@pytest.mark.parametrize("limit_s", [0.0, 0.3])
def test_cbc_stopped_before_the_end_claims_no_more_than_it_knows(limit_s: float) -> None:
    problem = drawn(150, 8, tight=0.05, seed=4)
    stopped, best = check(problem, cbc(limit_s).solve(problem)), solve(problem)
    assert stopped.bound <= best.score
    if stopped.status is Status.OPTIMAL:
        assert stopped.score == pytest.approx(best.score, rel=1e-9)
    else:
        assert stopped.status in (Status.FEASIBLE, Status.UNKNOWN)


def test_values_of_an_infeasible_program_are_not_read() -> None:
    """Every cell fits beside the cheapest others, and yet nothing fits: CBC has to find out."""
    costs = {"memory": [[0, 6], [0, 6], [0, 6]], "latency": [[6, 0], [6, 0], [6, 0]]}
    problem = made([[2, 1], [2, 1], [2, 1]], costs, {"memory": 8, "latency": 8})
    solution = check(problem, solve(problem, "cbc"))
    assert solution.status is Status.INFEASIBLE
    assert solution.infeasibility is not None
    assert solution.infeasibility.names == ("memory", "latency")


def test_without_cbc_one_line_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(pulp, "PULP_CBC_CMD")
    with pytest.raises(InvalidInputError, match=r"install pulp<4, or use solver 'ilp'") as caught:
        solve(drawn(40, 6, tight=0.05), "cbc")
    assert "\n" not in str(caught.value)


def test_a_broken_cbc_is_a_failed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milp, "_cbc_path", lambda: "false")
    with pytest.raises(RunFailedError, match="CBC broke"):
        solve(drawn(40, 6, tight=0.05), "cbc")


# --- brute_force -----------------------------------------------------------------------------


@given(problem=st.one_of(problems(), conditioned()))
@settings(QUIET, max_examples=100)
def test_brute_force_is_brute_force(problem: Problem) -> None:
    agrees(problem, BruteForce())


def test_millions_of_choices_take_seconds() -> None:
    problem = drawn(8, 7, tight=0.05)
    before = time.process_time()
    solution = BruteForce().solve(problem)
    assert time.process_time() - before < 10
    assert solution.score == pytest.approx(solve(problem, "ilp").score, rel=1e-12)


def test_between_equal_scores_brute_force_takes_the_cheapest() -> None:
    memory = np.arange(24.0).reshape(6, 4)[:, ::-1]
    solution = solve(made(np.zeros((6, 4)), {"memory": memory}, {"memory": 1e3}), "brute_force")
    assert solution.totals == {"memory": memory.min(axis=1).sum()}


@pytest.mark.parametrize(("units", "number"), [(40, r"10\^36"), (10, "1,073,741,824")])
def test_too_many_choices_are_refused_with_their_number(units: int, number: str) -> None:
    with pytest.raises(InvalidInputError, match=f"{number} choices, .* more than 100,000,000"):
        solve(drawn(units, 8), "brute_force")


# --- greedy ----------------------------------------------------------------------------------


@given(problem=st.one_of(problems(), conditioned()))
@settings(QUIET, max_examples=150)
def test_greedy_claims_no_more_than_it_knows(problem: Problem) -> None:
    best, solution = fast_brute_force(problem), check(problem, Greedy().solve(problem))
    if best is None:
        assert solution.status in (Status.INFEASIBLE, Status.UNKNOWN)
        return
    assert solution.status is not Status.INFEASIBLE
    rounding = 1e-12 * float(np.abs(problem.sensitivity.values).sum())
    assert solution.bound <= best + rounding
    if solution.status is Status.OPTIMAL:
        assert solution.score <= best + rounding
    if len(problem.rows()) <= 1 and not problem.forbidden and not problem.constraints:
        assert solution.status is not Status.UNKNOWN  # every step down is open


def test_greedy_loses_where_the_second_step_is_the_good_one() -> None:
    scores, memory = [[10.1, 10, 0], [12, 6, 0]], [[1, 2, 3], [1, 2, 3]]
    problem = made(scores, {"memory": memory}, {"memory": 4})
    assert solve(problem, "greedy").score == 12
    for name in ("ilp", "cbc", "dp", "brute_force", "auto"):
        assert solve(problem, name).score == 10.1


@pytest.mark.parametrize("spare", [0, 1, 7, 20, 39, 40])
def test_on_convex_scores_and_equal_steps_greedy_is_exact(spare: int) -> None:
    rng = np.random.default_rng(spare)
    steps = np.sort(rng.random((10, 4)), axis=1)[:, ::-1]
    scores = np.c_[np.cumsum(steps[:, ::-1], axis=1)[:, ::-1], np.zeros(10)]
    problem = made(scores, {"memory": np.tile(np.arange(1.0, 6), (10, 1))}, {"memory": 10 + spare})
    greedy = solve(problem, "greedy")
    for name in ("dp", "ilp"):
        assert greedy.score == pytest.approx(solve(problem, name).score, rel=1e-12)


def test_greedy_takes_the_step_that_relieves_all_budgets() -> None:
    """Steps lose the same; that of the second unit takes off most of the sum of both excesses."""
    costs = {"memory": [[8, 10], [8, 10]], "latency": [[0.4, 0.5], [0.1, 0.5]]}
    problem = made([[1, 0], [1, 0]], costs, {"memory": 19, "latency": 0.6})
    solution = solve(problem, "greedy")
    assert solution.allocation is not None
    assert [str(scheme) for scheme in solution.allocation.values()] == ["int3", "int2"]


def test_greedy_gets_stuck_and_says_so() -> None:
    """Both units have to take a step; either step alone exceeds another row by more."""
    problem = made([[1, 0], [1, 0]], {"memory": [[1, 2], [1, 2]]}, {"memory": 2})
    rows = {"one": [2.0, 0, -2, 0], "other": [-2.0, 0, 2, 0]}
    constraints = tuple(
        Constraint(name=name, cells=problem.cells, coefficients=np.array(row), limit=0.5)
        for name, row in rows.items()
    )
    problem = dataclasses.replace(problem, constraints=constraints)
    assert solve(problem, "greedy").status is Status.UNKNOWN
    assert solve(problem, "ilp").score == 2


@pytest.mark.parametrize("num_budgets", [1, 2])
def test_greedy_is_fast(num_budgets: int) -> None:
    problem = drawn(1000, 8, num_budgets=num_budgets)
    before = time.process_time()
    assert Greedy().solve(problem).status is Status.FEASIBLE
    assert time.process_time() - before < 10


# --- dp --------------------------------------------------------------------------------------


@given(problem=st.one_of(problems(), conditioned()))
@settings(QUIET, max_examples=150)
def test_dp_finds_what_trying_everything_finds(problem: Problem) -> None:
    agrees(dataclasses.replace(problem, forbidden=()), Dp())


@pytest.mark.parametrize(("units", "num_budgets"), [(200, 1), (30, 2)])
def test_dp_equals_ilp(units: int, num_budgets: int) -> None:
    problem = drawn(units, 6, num_budgets=num_budgets, seed=7)
    one, other = solve(problem, "dp"), solve(problem, "ilp")
    assert one.status is Status.OPTIMAL
    assert one.score == pytest.approx(other.score, rel=1e-9)


def test_dp_refuses_what_it_cannot_do_in_one_line() -> None:
    problem = PROBLEMS["typical"]
    cells = list(problem.cells)
    paired = dataclasses.replace(problem, forbidden=((cells[0], cells[-1]),))
    with pytest.raises(InvalidInputError, match=r"solver 'dp' .* forbidden pairs: use solver"):
        solve(paired, "dp")
    with pytest.raises(InvalidInputError, match="forbidden pairs"):
        pareto(paired, "memory")
    with pytest.raises(InvalidInputError, match=r"\d+ sums .* unit 'unit\d' .* more than the 20 "):
        Dp(max_states=20).solve(drawn(9, 5, tight=0.1))
    with pytest.raises(InvalidInputError, match="unknown cost 'memry': did you mean 'memory'"):
        pareto(problem, "memry")


def enumerated(problem: Problem, cost: str) -> list[tuple[float, float]]:
    """The undominated points of all choices, one by one."""
    choices = [choice for choice in every_choice(problem) if problem.meets(choice)]
    points = sorted((problem.total(cost, c), problem.score(c)) for c in choices)
    kept: list[tuple[float, float]] = []
    for point in points:
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def has_points(problem: Problem, cost: str, found: Pareto) -> list[tuple[float, float]]:
    """Return the points after checking that each choice is one, and is where it says."""
    choices = found.choices()
    assert choices.shape == (len(found.costs), len(problem.cells.units))
    for choice, total, score in zip(choices, found.costs, found.scores, strict=True):
        assert problem.meets(choice)
        assert (problem.total(cost, choice), problem.score(choice)) == (total, score)
    return list(zip(found.costs.tolist(), found.scores.tolist(), strict=True))


@given(problem=st.one_of(problems(), conditioned()))
@settings(QUIET, max_examples=100)
def test_the_frontier_is_that_of_all_choices(problem: Problem) -> None:
    problem = dataclasses.replace(problem, forbidden=())
    if np.prod(np.diff(problem.cells.offsets), dtype=float) > 1000:
        cells = problem.cells
        problem = problem.pinned(
            {unit: schemes[:2] for unit, schemes in zip(cells.units, cells.schemes, strict=True)}
        )
    for cost in problem.costs:
        assert has_points(problem, cost, pareto(problem, cost)) == enumerated(problem, cost)


def test_the_frontier_up_to_a_score_is_the_part_of_the_whole() -> None:
    problem = drawn(12, 5, num_budgets=1).with_budgets(())
    whole = pareto(problem, "memory")
    most = float(np.median(whole.scores))
    part = pareto(problem, "memory", most_score=most)
    assert part.scores.tolist() == whole.scores[whole.scores <= most].tolist()
    assert max(part.num_states) < max(whole.num_states)
    assert (part.choices([0, -1]) == part.choices()[[0, -1]]).all()


def test_identical_units_have_few_sums() -> None:
    """Sums that are equal but for the order in which they were added count once."""
    rng = np.random.default_rng(0)
    scores, memory = np.tile(np.sort(rng.random(3))[::-1], (40, 1)), np.tile([2.0, 3, 4], (40, 1))
    found = pareto(made(scores, {"memory": memory}), "memory")
    assert len(found.costs) <= 81
    assert max(found.num_states) <= 81


@pytest.mark.parametrize("dimensions", [2, 3, 4])
def test_undominated_is_what_comparing_all_pairs_leaves(dimensions: int) -> None:
    rng = np.random.default_rng(dimensions)
    for n in (0, 1, 2, 30, 64, 65, 300):
        whole = rng.integers(0, 9, (dimensions, n))
        values = whole + 1e-17j * rng.integers(0, 2, (dimensions, n))
        keys = [tuple((x.real, x.imag) for x in column) for column in values.T]
        beaten = {
            b
            for a, b in itertools.product(set(keys), repeat=2)
            if a != b and all(x <= y for x, y in zip(a, b, strict=True))
        }
        assert [keys[j] for j in undominated(values)] == sorted(set(keys) - beaten)


# --- all -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["auto", "ilp", "cbc", "brute_force", "greedy", "dp"])
def test_lower_bounds_hold(name: str) -> None:
    problem = drawn(8, 4, num_budgets=1)
    least = 0.9 * problem.budgets[0].limit
    row = Constraint.at_least(problem.costs["memory"], least)
    problem = dataclasses.replace(problem, constraints=(row,))
    solution = check(problem, solve(problem, name))
    assert solution.totals is not None
    assert least <= solution.totals["memory"] <= problem.budgets[0].limit
