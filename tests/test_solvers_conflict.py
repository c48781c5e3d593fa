"""Irreducible conflicts and budgets raised together, against trying every allocation."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mpq.core.budgets import BudgetText
from mpq.core.constraints import Constraint
from mpq.core.problem import Conflict, Infeasibility, Problem
from mpq.store.columns import Json
from solvers import solve
from solvers.exact import minimise
from solvers.infeasible import explain
from tests.oracles import every_choice
from tests.test_solvers import drawn, made
from tests.test_solvers_oracle import problems

EXAMPLE = made(
    [[2, 1], [2, 1]],
    {"memory": [[3e6, 5e6], [4e6, 7e6]], "latency": [[2e-3, 1e-3], [3e-3, 2e-3]]},
    {"memory": 8.5e6, "latency": 3.5e-3},
)


def fits_any(problem: Problem, conflict: Conflict, *, without: object = None) -> bool:
    """Tell by enumeration whether the conditions of a conflict, less one, can be met."""
    names = [name for name in conflict.constraints if name != without]
    part = replace(
        problem,
        budgets=tuple(
            b for b in problem.budgets if b.cost in conflict.budgets and b.cost != without
        ),
        constraints=tuple(row for row in problem.constraints if row.name in names),
        forbidden=problem.forbidden if conflict.forbidden and without != "pairs" else (),
    )
    return any(part.meets(choice) for choice in every_choice(part))


def agrees(problem: Problem) -> None:
    found = explain(problem, time_limit_s=60)
    conflict = found.conflict
    assert len(conflict) > 0
    assert not fits_any(problem, conflict)
    for name in (*conflict.budgets, *conflict.constraints, *["pairs"] * conflict.forbidden):
        assert fits_any(problem, conflict, without=name)
    if found.raised_by is not None:
        _raises_least(problem, found)
    assert "\n" not in found.told


def _raises_least(problem: Problem, found: Infeasibility) -> None:
    limits = problem.limits()
    conflicting = found.raised
    assert set(conflicting) >= set(found.conflict.budgets)
    bare, least = problem.with_budgets([]), np.inf
    for choice in every_choice(bare):
        totals = bare.totals(choice)
        kept = all(totals[name] <= limits[name] for name in limits if name not in conflicting)
        if kept and bare.meets(choice):
            least = min(least, max(totals[name] / limits[name] for name in conflicting))
    assert found.raised_by == pytest.approx(least - 1, rel=1e-9, abs=2e-4 * least)
    assert found.raised_by >= least * (1 - 1e-12) - 1
    raised = [replace(b, limit=max(b.limit, conflicting.get(b.cost, 0.0))) for b in problem.budgets]
    assert solve(problem.with_budgets(raised)).allocation is not None


@given(problems())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_budgets(problem: Problem) -> None:
    assume(np.prod(np.diff(problem.cells.offsets), dtype=float) <= 300)
    assume(solve(problem).infeasibility is not None)
    agrees(problem)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_budgets_constraints_and_forbidden_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = drawn(4, 3, tight=float(rng.uniform(0.0, 0.3)), seed=seed)
    cells = problem.cells
    rows = [
        Constraint(name=f"row{k}", cells=cells, coefficients=values, limit=float(values.min() * 2))
        for k, values in enumerate(rng.normal(size=(2, len(cells))))
    ]
    pairs = [
        ((one, cells.schemes[0][i]), (other, cells.schemes[0][j]))
        for one, other in itertools.combinations(cells.units, 2)
        for i, j in itertools.product(range(3), range(3))
        if rng.random() < 0.4
    ]
    problem = replace(problem, constraints=tuple(rows), forbidden=tuple(pairs))
    if not any(problem.meets(choice) for choice in every_choice(problem)):
        agrees(problem)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_does_not_matter(scale: float) -> None:
    memory = np.array([[3.0, 5.0], [4.0, 7.0]])
    latency = np.array([[2.0, 1.0], [3.0, 2.0]])
    costs = {"memory": memory * scale, "latency": latency / scale}
    problem = made([[2, 1], [2, 1]], costs, {"memory": 8.5 * scale, "latency": 3.5 / scale})
    agrees(problem)
    assert explain(problem, time_limit_s=60).raised_by == pytest.approx(4 / 3.5 - 1)


def test_all_limits_together_are_told_and_can_be_typed_in() -> None:
    found = explain(EXAMPLE, time_limit_s=60)
    assert found.conflict == Conflict(budgets=("memory", "latency"))
    assert found.raised == {"memory": 9e6, "latency": 4e-3}
    assert found.raised_by == pytest.approx(4 / 3.5 - 1)
    assert found.advice == "enough together: memory <= 9.0 MB and latency <= 4.0 ms (14 % more)"
    assert found.told == f"{found.message}; {found.advice}"


@pytest.mark.parametrize("seconds", [4.1e-3, 0.0123456, 7e-5, 1 / 3])
def test_every_need_suffices_as_it_is_printed(seconds: float) -> None:
    """4.1 times 1e-3 is less than 4.1e-3 in floating point: one more digit, or unit, is told."""
    problem = made([[1]], {"latency": [[seconds]]}, {"latency": seconds / 2})
    message = explain(problem, time_limit_s=60).message
    need = message.split("the smallest possible is ")[1].split(" (")[0]
    typed = BudgetText.parse(f"latency <= {need}").resolve(problem.costs)
    assert solve(problem.with_budgets([typed])).allocation is not None


def test_two_conflicts_are_raised_at_once() -> None:
    costs = {"memory": [[4.0]], "latency": [[6.0]], "bops": [[1.0]]}
    problem = made([[1]], costs, {"memory": 2.0, "latency": 4.0, "bops": 1.0})
    found = explain(problem, time_limit_s=60)
    assert len(found.conflict) == 1
    assert found.raised == {"memory": 4.0, "latency": 6.0}
    assert found.raised_by == 1.0


def test_constraints_alone_name_only_those_in_conflict() -> None:
    problem = made([[1, 2], [1, 2]], {"memory": [[1, 2], [1, 2]]}, {"memory": 9.0})
    table = problem.costs["memory"]
    rows = (
        Constraint.at_least(table, 4.0),
        Constraint(name="never mind", cells=table.cells, coefficients=table.values, limit=9.0),
        Constraint(name="small", cells=table.cells, coefficients=table.values, limit=3.0),
    )
    found = explain(replace(problem, constraints=rows), time_limit_s=60)
    assert found.message == (
        "no allocation meets constraints 'memory >= 4' and 'small', whatever the budgets: drop "
        "one of them"
    )
    assert found.conflict == Conflict(constraints=("memory >= 4", "small"))
    assert (found.raised, found.raised_by) == ({}, None)
    budgeted = replace(problem, constraints=rows[:1]).with_budgets([])
    tight = made([[1, 2], [1, 2]], {"memory": [[1, 2], [1, 2]]}, {"memory": 3.0})
    tight = replace(budgeted, budgets=tight.budgets)
    assert explain(tight, time_limit_s=60).told.endswith(
        "smaller format; in the way as well: constraint 'memory >= 4'"
    )


def test_large_problems_take_no_time() -> None:
    problem = drawn(400, 8, tight=0.05)
    limits = [replace(b, limit=0.7 * b.limit) for b in problem.budgets]
    problem = problem.with_budgets(limits)
    from solvers.quick import minimise_quickly

    found = explain(problem, time_limit_s=60, by=minimise_quickly)
    assert found.conflict == Conflict(budgets=("memory", "latency"))
    raised = [replace(b, limit=found.raised[b.cost]) for b in problem.budgets]
    assert solve(problem.with_budgets(raised)).allocation is not None
    assert found.raised_by is not None
    less = [replace(b, limit=b.limit * (1 + found.raised_by - 3e-4)) for b in problem.budgets]
    assert (
        minimise_quickly(problem, np.zeros(len(problem.cells)), less, time_limit_s=60).choice
        is None
    )


def test_what_was_stored_before_there_were_conflicts_is_read() -> None:
    column = Json(Infeasibility)
    before = {
        "names": ["memory"],
        "smallest": {"memory": 11.7},
        "relaxed": {"memory": None},
        "message": "no allocation fits memory <= 10 B",
    }
    found = column.process_result_value(before, None)  # type: ignore[arg-type]
    assert found == Infeasibility(
        names=("memory",),
        smallest={"memory": 11.7},
        relaxed={"memory": None},
        message="no allocation fits memory <= 10 B",
    )
    now = explain(EXAMPLE, time_limit_s=60, by=minimise)
    kept = column.process_bind_param(now, None)  # type: ignore[arg-type]
    assert column.process_result_value(kept, None) == now  # type: ignore[arg-type]
