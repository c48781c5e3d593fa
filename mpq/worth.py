"""What the budgets of a solution are worth, as lines or as plain data."""

from __future__ import annotations

from typing import Any

from mpq.core.problem import Problem, Solution
from mpq.core.provenance import modelled_note
from mpq.core.shadow import Alternative
from solvers.shadow import shadow_prices

_PARTS = ("without", "raised", "better", "cheaper")


def worth_lines(problem: Problem, solution: Solution) -> list[str]:
    """Return what each budget is worth, a line each, below what it is about."""
    found = shadow_prices(problem, solution)
    if not found.budgets:
        return []
    note = modelled_note(problem.costs[budget.cost] for budget in found.budgets)
    told = f" ({note})" if note else ""
    return [f"budgets, at the least score of {found.optimum.score:.4g}{told}:", *found.told()]


def worth_view(problem: Problem, solution: Solution) -> list[dict[str, Any]]:
    """Return what each budget is worth, with the allocations next to the optimum."""
    found = shadow_prices(problem, solution)
    return [
        {
            "cost": budget.cost,
            "limit": budget.limit,
            "price": budget.price,
            "binds": budget.binds,
            "raised_limit": budget.raised_limit,
            "optimum": _view(found.optimum),
            **{part: _view(getattr(budget, part)) for part in _PARTS},
        }
        for budget in found.budgets
    ]


def _view(found: Alternative) -> dict[str, Any]:
    return {
        "score": None if found.allocation is None else found.score,
        "totals": None if found.totals is None else dict(found.totals),
        "proven": found.proven,
        "allocation": None if found.allocation is None else found.allocation.text(),
    }
