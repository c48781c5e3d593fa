"""Several models under one budget, against choosing for them by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mpq.core.constraints import Constraint
from mpq.core.errors import InvalidInputError, MpqWarning
from mpq.core.problem import Allocation, Budget, Problem
from mpq.core.tables import CostTable
from solvers import solve
from solvers.several import apart, together
from tests.oracles import Enumerated
from tests.test_solvers import drawn, made, with_responses
from tests.test_solvers_oracle import problems


def conditioned(problem: Problem, seed: int) -> Problem:
    """The problem with a constraint and a forbidden pair."""
    rng = np.random.default_rng(seed)
    cells = problem.cells
    values = rng.normal(size=len(cells))
    row = Constraint(
        name="row",
        cells=cells,
        coefficients=values,
        limit=float(values.max(initial=1.0)),
        fixed=0.1,
    )
    pairs = ()
    if len(cells.units) > 1:
        pairs = (((cells.units[0], cells.schemes[0][0]), (cells.units[1], cells.schemes[1][-1])),)
    return replace(problem, constraints=(row,), forbidden=pairs)


@given(problems(), problems(), st.integers(0, 2**32 - 1), st.floats(0.1, 3.0))
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_joint_optimum_is_that_of_all_pairs(
    one: Problem, other: Problem, seed: int, weight: float
) -> None:
    problems_ = {"one": conditioned(one, seed), "other": conditioned(other, seed + 1)}
    sizes = [float(np.prod(np.diff(p.cells.offsets), dtype=float)) for p in problems_.values()]
    assume(max(sizes) <= 300)
    first, second = (Enumerated(problem) for problem in problems_.values())
    assume(len(first.scores) and len(second.scores))
    shared = [name for name in one.costs if name in other.costs]
    scores = np.add.outer(first.scores, weight * second.scores)
    totals = {n: np.add.outer(first.totals[n], second.totals[n]) for n in shared}
    rng = np.random.default_rng(seed)
    limits = [Budget(n, max(float(np.quantile(t, rng.random())), 1e-12)) for n, t in totals.items()]
    fits = np.ones(scores.shape, bool)
    for budget in limits:  # sums of sums are rounded twice
        fits &= totals[budget.cost] <= budget.limit * (1 - 1e-12)
    loose = np.ones(scores.shape, bool)
    for budget in limits:
        loose &= totals[budget.cost] <= budget.limit * (1 + 1e-12)
    joint = together(problems_, limits, {"other": weight})
    solution = solve(joint)
    if not loose.any():
        assert solution.allocation is None
        return
    magnitude = 1e-9 * max(
        float(np.abs(p.sensitivity.values).max(initial=0.0)) for p in (one, other)
    )
    if solution.allocation is not None:
        assert solution.score >= scores[loose].min() - magnitude
        parts = apart(solution.allocation)
        for name, problem in problems_.items():
            part = parts.get(name, Allocation({}))
            assert set(part) == set(problem.cells.units)
            assert problem.with_budgets([]).fits(part)
        assert solution.totals == pytest.approx(
            {
                n: sum(
                    p.total(n, parts.get(m, Allocation({})).choice(p.cells))
                    for m, p in problems_.items()
                )
                for n in shared
            },
            rel=1e-12,
        )
    if fits.any():
        assert solution.score <= scores[fits].min() + magnitude


def test_one_model_is_itself() -> None:
    problem = drawn(6, 4)
    joint = together({"only": problem}, problem.budgets)
    assert joint.cells.units == tuple(f"only/{unit}" for unit in problem.cells.units)
    one, other = solve(problem), solve(joint)
    assert (one.score, one.totals) == (other.score, other.totals)
    assert other.allocation is not None
    assert apart(other.allocation) == {"only": one.allocation}


def test_parts_that_no_choice_changes_baselines_and_weights_add_up() -> None:
    problem = drawn(3, 3)

    def with_memory(**changes: object) -> Problem:
        table = problem.costs["memory"]
        low, high = 0.9 * table.values, 1.2 * table.values
        table = replace(table, low=low, high=high, **changes)  # type: ignore[arg-type]
        return replace(problem, costs={"memory": table}, budgets=())

    one = with_memory(fixed=5.0, baseline=1e6, weights=100, provenance="exact")
    other = with_memory(fixed=7.0, baseline=2e6, weights=300, provenance="table x")
    joint = together({"a": one, "b": other}, ["memory <= 60%"])
    memory = joint.costs["memory"]
    assert (memory.fixed, memory.baseline, memory.weights) == (12.0, 3e6, 400)
    assert memory.provenance == "exact; table x"
    assert joint.budgets == (Budget("memory", 1.8e6, "memory <= 60%"),)
    assert memory.half_width([0, 9]) == pytest.approx(
        one.costs["memory"].half_width([0]) + other.costs["memory"].half_width([0])
    )
    unknown = together(
        {"a": one, "b": replace(other, costs={"memory": with_memory().costs["memory"]})}
    )
    assert unknown.costs["memory"].weights == 0
    assert np.isnan(unknown.costs["memory"].baseline)


def test_only_costs_that_all_have_are_kept() -> None:
    joint = together({"a": drawn(3, 3), "b": drawn(2, 3, num_budgets=1)})
    assert list(joint.costs) == ["memory"]
    assert joint.budgets == ()


def test_pairs_are_left_out_aloud() -> None:
    problem = drawn(3, 3)
    with pytest.warns(MpqWarning, match="without pairs of units: b"):
        joint = together({"a": problem, "b": with_responses(problem)})
    assert joint.responses is None


def test_names_with_slashes_come_back() -> None:
    problem = made([[2, 1]], {"memory": [[1, 2]]}, names=["blocks/0/linear"])
    solution = solve(together({"a": problem, "b": problem}, ["memory <= 3 B"]))
    assert solution.allocation is not None
    assert {m: list(part) for m, part in apart(solution.allocation).items()} == {
        "a": ["blocks/0/linear"],
        "b": ["blocks/0/linear"],
    }


def test_what_cannot_be_put_together_is_refused() -> None:
    problem = drawn(3, 3)
    with pytest.raises(InvalidInputError, match="no problem to put together"):
        together({})
    with pytest.raises(InvalidInputError, match="no '/', got 'a/b'"):
        together({"a/b": problem})
    with pytest.raises(InvalidInputError, match="unknown model 'encodr': did you mean 'encoder'"):
        together({"encoder": problem}, weights={"encodr": 1.0})
    with pytest.raises(InvalidInputError, match="positive number, got -1 of 'encoder'"):
        together({"encoder": problem}, weights={"encoder": -1})
    other = replace(problem, sensitivity=replace(problem.sensitivity, metric="taylor"))
    with pytest.raises(InvalidInputError, match="made of a and taylor of b, do not add up"):
        together({"a": problem, "b": other})
    assert together({"a": problem, "b": other}, weights={}).sensitivity.metric == "made, taylor"
    table = problem.costs["memory"]
    bits = CostTable.exact("memory", "bits", table.cells, table.values)
    with pytest.raises(InvalidInputError, match="'memory' is counted in bytes in a and bits in b"):
        together({"a": problem, "b": replace(problem, costs={"memory": bits}, budgets=())})
    with pytest.raises(InvalidInputError, match="unknown cost 'latensy'"):
        together({"a": problem}, ["latensy <= 3 ms"])
    with pytest.raises(InvalidInputError, match="unit 'plain' names no model"):
        apart(Allocation({"plain": problem.cells.schemes[0][0]}))
