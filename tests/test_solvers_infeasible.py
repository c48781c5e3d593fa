"""What is said when nothing fits, and that following the advice works."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from mpq.core.problem import Budget, Problem, Status
from mpq.core.quantities import quantity
from solvers import SOLVERS, solve
from tests.oracles import brute_force, every_choice
from tests.test_solvers import drawn, made, with_responses
from tests.test_solvers_oracle import problems


def why(problem: Problem, solver: str = "ilp"):
    solution = solve(problem, solver)
    assert solution.status is Status.INFEASIBLE
    assert solution.allocation is None
    assert solution.infeasibility is not None
    return solution.infeasibility


MEMORY = [[3.9e6, 6e6, 8e6]] * 3
SCORES = [[3.0, 2.0, 1.0]] * 3


def test_one_budget() -> None:
    found = why(made(SCORES, {"memory": MEMORY}, {"memory": 10e6}))
    assert found.message == (
        "no allocation fits memory <= 10.0 MB: the smallest possible is 11.7 MB "
        "(every unit at int2); raise the budget or add a smaller format"
    )
    assert found.names == ("memory",)
    assert found.smallest == {"memory": 11.7e6}
    assert found.relaxed == {"memory": 11.7e6}


def test_the_smallest_need_not_be_uniform() -> None:
    latency = [[3e-3, 2e-3], [1e-3, 2e-3]]
    found = why(made([[1, 2], [1, 2]], {"latency": latency}, {"latency": 2.5e-3}))
    assert found.message == (
        "no allocation fits latency <= 2.5 ms: the smallest possible is 3.0 ms "
        "(every unit at its fastest scheme); raise the budget or add a faster format"
    )


def test_nothing_to_choose() -> None:
    found = why(made([[1], [1]], {"memory": [[2e3], [3e3]]}, {"memory": 4e3}))
    assert "the smallest possible is 5.0 kB (no unit has a choice)" in found.message


def test_two_budgets_that_cannot_be_met_each() -> None:
    latency = [[2e-3, 1e-3]] * 3
    scores = [[2.0, 1.0]] * 3
    costs = {"memory": [row[:2] for row in MEMORY], "latency": latency}
    found = why(made(scores, costs, {"memory": 10e6, "latency": 2e-3}))
    assert found.names == ("memory", "latency")
    assert found.smallest == {"memory": 11.7e6, "latency": 3e-3}
    assert found.relaxed == {"memory": None, "latency": None}
    assert found.message == (
        "no allocation fits memory <= 10.0 MB: the smallest possible is 11.7 MB (every unit at "
        "int2), nor latency <= 2.0 ms: the smallest possible is 3.0 ms (every unit at int3); "
        "raise the budgets or add a cheaper format"
    )


def test_each_alone_but_not_together() -> None:
    costs = {"memory": [[3e6, 5e6], [4e6, 7e6]], "latency": [[2e-3, 1e-3], [3e-3, 2e-3]]}
    found = why(made([[2, 1], [2, 1]], costs, {"memory": 8.5e6, "latency": 3.5e-3}))
    assert found.message == (
        "no allocation fits memory <= 8.5 MB and latency <= 3.5 ms together: with latency kept, "
        "memory needs 12.0 MB; with memory kept, latency needs 5.0 ms; raise one of them"
    )
    assert found.names == ("memory", "latency")
    assert found.relaxed == {"memory": 12e6, "latency": 5e-3}


def test_only_the_budgets_in_conflict_are_named() -> None:
    costs = {
        "memory": [[1, 3], [1, 3]],
        "latency": [[3, 1], [3, 1]],
        "bops": [[1, 1], [1, 1]],
    }
    limits = {"memory": 3.0, "latency": 3.0, "bops": 5.0}
    found = why(made([[1, 1], [1, 1]], costs, limits))
    assert found.names == ("memory", "latency")
    assert found.relaxed["bops"] is None


def test_no_single_budget_is_to_blame() -> None:
    costs = {"memory": [[1, 2, 2]], "latency": [[2, 1, 2]], "bops": [[2, 2, 1]]}
    limits = {"memory": 1.0, "latency": 1.0, "bops": 1.0}
    found = why(made([[1, 1, 1]], costs, limits))
    assert found.names == ("memory", "latency", "bops")
    assert set(found.relaxed.values()) == {None}
    assert "nor when any one of them is dropped" in found.message


def test_budgets_written_in_relation_to_something_say_both() -> None:
    problem = made(SCORES, {"memory": MEMORY})
    problem = problem.with_budgets([Budget("memory", 10e6, "memory <= 60%")])
    assert "no allocation fits memory <= 60% (10.0 MB): " in why(problem).message


def test_the_tightest_of_two_budgets_on_one_cost_counts() -> None:
    problem = made(SCORES, {"memory": MEMORY}, [("memory", 10e6), ("memory", 12e6)])
    assert "memory <= 10.0 MB" in why(problem).message


def test_limit_and_need_never_print_equal() -> None:
    problem = made([[1.0]], {"memory": [[100_000_001]]}, {"memory": 1e8})
    assert "memory <= 100.0 MB: the smallest possible is 100.000001 MB" in why(problem).message


def test_typing_in_the_need_works() -> None:
    """The need is rounded up: as printed, it is enough."""
    problem = made([[1.0]], {"memory": [[11_704_321]]}, {"memory": 10e6})
    message = why(problem).message
    assert "the smallest possible is 11.71 MB" in message
    assert solve(problem.with_budgets([Budget("memory", 11.71e6)])).status is Status.OPTIMAL


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_says_why(name: str) -> None:
    problem = with_responses(drawn(6, 4, tight=-0.3))
    assert why(problem, name) == why(problem)


@given(problems())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_smallest_and_relaxed_are_right(problem: Problem) -> None:
    if np.prod(np.diff(problem.cells.offsets), dtype=float) > 3000:
        return
    solution = solve(problem)
    found = solution.infeasibility
    assert (found is not None) == (brute_force(problem) is None)
    if found is None:
        return
    assert found.names
    choices = list(every_choice(problem))
    for budget in problem.budgets:
        cost = budget.cost
        assert found.smallest[cost] == min(problem.total(cost, c) for c in choices)
        others = [b for b in problem.budgets if b.cost != cost]
        beside = [
            problem.total(cost, c)
            for c in choices
            if all(problem.total(b.cost, c) <= b.limit for b in others)
        ]
        need = found.relaxed[cost]
        assert (need is None) == (not beside)
        if need is not None:
            assert need == pytest.approx(min(beside), rel=1e-9)
            enough = [*others, Budget(cost, max(need, 1e-300))]
            assert solve(problem.with_budgets(enough)).allocation is not None
    told = [[b.cost in found.message for b in problem.budgets if b.cost in found.names]]
    assert all(itertools.chain(*told))


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (11.7e6, "bytes", "11.7 MB"),
        (3.4e-3, "s", "3.4 ms"),
        (52.1e9, "bitops", "52.1 GBOPs"),
        (512, "bytes", "512 B"),
        (0, "bytes", "0 B"),
        (999_990, "bytes", "1.0 MB"),
        (1_234_567, "bytes", "1.235 MB"),
        (2.5e13, "bytes", "25000 GB"),
        (12.0, "s", "12.0 s"),
        (1e-8, "s", "0.01 us"),
        (0.25, "J", "250.0 mJ"),
        (8.5, "furlongs", "8.5 furlongs"),
    ],
)
def test_quantities_read_well(value: float, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


def test_quantities_can_be_rounded_up_and_given_more_digits() -> None:
    assert quantity(11_704_321, "bytes", up=True) == "11.71 MB"
    assert quantity(11_704_321, "bytes", digits=8) == "11.704321 MB"
    assert quantity(0.003, "s", up=True) == "3.0 ms"
