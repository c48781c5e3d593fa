"""Stored tables as a problem under given conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mpq.core.budgets import Budget, resolved
from mpq.core.constraints import Constraint
from mpq.core.formats import Scheme
from mpq.core.layers import UnitName
from mpq.core.problem import Problem
from mpq.core.tables import Cell


def stated(
    problem: Problem,
    budgets: Sequence[str | Budget],
    pins: Mapping[UnitName, Scheme] | None = None,
    forbidden: Sequence[tuple[Cell, Cell]] = (),
    constraints: Sequence[Constraint] = (),
) -> Problem:
    """Return stored tables as a problem under these conditions."""
    allowed = {unit: [scheme] for unit, scheme in (pins or {}).items()}
    problem = replace(
        problem,
        budgets=tuple(resolved(budgets, problem.costs)),
        forbidden=tuple(forbidden),
        constraints=tuple(constraints),
    )
    return problem.pinned(allowed)
