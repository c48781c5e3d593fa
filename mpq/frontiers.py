"""What any other budget would give, kept with a run for every page and question to come."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from mpq.core.errors import MpqError
from mpq.core.frontier import Frontier, Surface
from mpq.core.jobs import JobSpec
from mpq.core.problem import Problem
from mpq.progress import Progress
from mpq.result import KEPT_GRID, KEPT_POINTS
from mpq.store.store import Store
from solvers.risk import at_risk

_TIME_LIMIT_S = 60.0  # after which no further one is begun


def keep_frontiers(
    problem: Problem, spec: JobSpec, store: Store, run_id: str, progress: Progress
) -> None:
    """Keep the frontier of each cost, the budgets of the others at the risk that was asked.

    Where a minimised cost ended is no budget. A frontier that cannot be found, or that is not
    begun within a minute, is a line in the log: the search is over and what it measured is there.
    """
    from solvers.frontier import frontier
    from solvers.surface import surface

    asked: dict[tuple[str, ...], Callable[[Problem], Frontier | Surface]] = {
        (cost,): partial(frontier, cost=cost, points=KEPT_POINTS) for cost in problem.costs
    }
    both = ("memory", "latency")
    if problem.costs.keys() >= set(both):
        asked[both] = partial(surface, costs=both, points=KEPT_GRID)
    deadline = time.monotonic() + _TIME_LIMIT_S
    with progress.stage("frontiers", len(asked)) as advance:
        for costs, found in asked.items():
            free, reason = (*costs, *spec.minimised), ""
            if time.monotonic() > deadline:
                reason = (
                    f"{_TIME_LIMIT_S:g} s had passed; pages and mpq frontier find it when asked"
                )
            else:
                try:
                    store.put_frontier(run_id, found(at_risk(problem, spec.risk, free)))
                except MpqError as error:
                    reason = str(error)
            if reason:
                store.log(run_id, "frontier", f"{','.join(costs)} is not kept: {reason}")
            advance()
