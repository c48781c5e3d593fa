"""Solutions at every pair of limits of two costs, each with its proven gap."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np

from mpq.core.errors import InvalidInputError, unknown
from mpq.core.frontier import Surface
from mpq.core.problem import Budget, Problem, Solution
from mpq.core.tables import Floats, Indices
from solvers.check import finish, relative_gap
from solvers.exact import Least
from solvers.frontier import smallest
from solvers.quick import minimise_quickly

_TIME_LIMIT_S = 10.0  # of a point


def surface(
    problem: Problem,
    costs: tuple[str, str] = ("memory", "latency"),
    points: tuple[int, int] = (20, 20),
    gap: float = 1e-3,
) -> Surface:
    """Solve on a grid of limits of two costs, each point proven within `gap`.

    Limits run evenly from the smallest total that can be reached to that of the best allocation
    without limits, the problem's other budgets kept. Loose limits come first: what was found and
    proven for them often answers tighter ones too.
    Raises InvalidInputError for unknown or equal costs or fewer than 2 points a side,
    InfeasibleError where the other budgets alone cannot be met.
    """
    for cost in costs:
        if cost not in problem.costs:
            raise unknown("cost", cost, problem.costs)
    if costs[0] == costs[1] or min(points) < 2:
        raise InvalidInputError(
            "surface",
            f"a surface is over two costs and at least 2 points of each, got {costs} and {points}",
        )
    problem = problem.with_budgets([b for b in problem.budgets if b.cost not in costs])
    sweep = _Sweep(problem=problem, costs=costs, gap=gap)
    free = sweep.solve((math.inf, math.inf), -math.inf)
    low = [smallest(problem, cost, minimise_quickly) for cost in costs]
    assert free.choice is not None  # `smallest` raises where nothing fits
    high = [max(problem.total(c, free.choice), least) for c, least in zip(costs, low, strict=True)]
    grid = [np.linspace(*ends) for ends in zip(low, high, points, strict=True)]
    rows: list[list[Solution | None]] = [[None] * points[1] for _ in range(points[0])]
    bounds = np.full((points[0] + 1, points[1] + 1), free.bound)
    for i in reversed(range(points[0])):
        for j in reversed(range(points[1])):
            start = time.monotonic()
            limits = (float(grid[0][i]), float(grid[1][j]))
            looser = max(bounds[i + 1, j], bounds[i, j + 1])
            least = sweep.solve(limits, looser)
            bounds[i, j] = max(looser, least.bound)
            if least.choice is not None:
                rows[i][j] = finish(
                    problem.with_budgets([*sweep.budgets(limits), *problem.budgets]),
                    "auto",
                    least.choice,
                    proven=least.proven,
                    bound=min(bounds[i, j], problem.score(least.choice)),
                    seconds=time.monotonic() - start,
                )
    limits_of = (grid[0], grid[1])
    return Surface(costs=costs, limits=limits_of, solutions=tuple(map(tuple, rows)))


@dataclass(slots=True, kw_only=True)
class _Sweep:
    """Solves under one pair of limits after the other; remembers what it found."""

    problem: Problem
    costs: tuple[str, str]
    gap: float
    choices: list[Indices] = field(default_factory=list)
    totals: list[Floats] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def budgets(self, limits: tuple[float, float]) -> list[Budget]:
        finite = [
            (c, limit) for c, limit in zip(self.costs, limits, strict=True) if limit < math.inf
        ]
        return [Budget(cost, max(limit, math.ulp(0.0))) for cost, limit in finite]

    def solve(self, limits: tuple[float, float], bound: float) -> Least:
        """Return the best known choice where a bound proves it good enough, else a new one."""
        known = self._known(limits)
        if known is not None and relative_gap(self.scores[known], bound) <= self.gap:
            return Least(choice=self.choices[known], bound=bound, proven=False)
        least = minimise_quickly(
            self.problem,
            self.problem.sensitivity.values,
            [*self.budgets(limits), *self.problem.budgets],
            time_limit_s=_TIME_LIMIT_S,
            gap=self.gap,
        )
        if least.choice is not None:
            self.choices.append(least.choice)
            self.totals.append(np.array([self.problem.total(c, least.choice) for c in self.costs]))
            self.scores.append(self.problem.score(least.choice))
        return least

    def _known(self, limits: tuple[float, float]) -> int | None:
        if not self.choices:
            return None
        fits = (np.array(self.totals) <= limits).all(axis=1)
        if not fits.any():
            return None
        return int(np.where(fits, self.scores, np.inf).argmin())
