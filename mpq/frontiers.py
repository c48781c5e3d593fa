"""What any other budget would give, kept with a run for every page and question to come."""

from __future__ import annotations

from mpq.core.problem import Problem
from mpq.result import KEPT_GRID, KEPT_POINTS
from mpq.store.store import Store
from solvers.risk import at_risk


def keep_frontiers(problem: Problem, risk: float | None, store: Store, run_id: str) -> None:
    """Keep the frontier of each cost, the budgets of the others at the risk that was asked."""
    from solvers.frontier import frontier
    from solvers.surface import surface

    for cost in problem.costs:
        asked = at_risk(problem, risk, [cost])
        store.put_frontier(run_id, frontier(asked, cost, KEPT_POINTS))
    both = ("memory", "latency")
    if problem.costs.keys() >= set(both):
        store.put_frontier(run_id, surface(at_risk(problem, risk, both), both, KEPT_GRID))
