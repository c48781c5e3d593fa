"""Stored tables as a problem under given conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mpq.core.budgets import Budget, resolved
from mpq.core.constraints import Constraint
from mpq.core.formats import Scheme
from mpq.core.layers import LayerGraph, UnitName
from mpq.core.problem import Problem
from mpq.core.risk import risk_of
from mpq.core.tables import Cell
from mpq.pins import Named, resolve_forbidden, resolve_pins


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


def under(
    graph: LayerGraph,
    problem: Problem,
    usual_risk: float | None,
    budgets: Sequence[str | Budget],
    *,
    pin: Mapping[str, str | Scheme] | None = None,
    risk: float | None = None,
    forbid: Sequence[tuple[Named, Named]] = (),
    constraints: Sequence[Constraint] = (),
) -> tuple[Problem, float | None]:
    """Return stored tables under conditions as people write them, and at what risk they are asked.

    Keys of `pin` and the names in `forbid` are those of layers or units; `risk` is the
    probability that each budget holds with, None: `usual_risk`, that of the job.
    """
    pins, pairs = resolve_pins(graph, pin), resolve_forbidden(graph, forbid)
    plain = stated(problem, budgets, pins, pairs, constraints)
    return plain, risk_of(usual_risk if risk is None else risk, plain.costs, plain.limits())
