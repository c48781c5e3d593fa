"""The other direction: the least cost at which a score can be had."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from mpq.core.errors import InfeasibleError, InvalidInputError, RunFailedError, unknown
from mpq.core.joint import JointCosts
from mpq.core.least_cost import LeastCost
from mpq.core.problem import Allocation, Budget, Constraint, Problem
from mpq.core.quantities import rounded_up
from mpq.core.tables import Floats
from solvers.check import relative_gap
from solvers.infeasible import explain
from solvers.questions import Questions

_EFFORT = 10  # branches
_TIES_S = 0.1


def least_cost(
    problem: Problem,
    of: str | Mapping[str, float],
    score_limit: float,
    *,
    gap: float = 1e-4,
    time_limit_s: float = 60.0,
) -> LeastCost:
    """Return the allocation of least cost whose additive score is at most `score_limit`.

    `of` is a cost or, for a weighted sum of costs, the weight of each ({"memory": 1.0,
    "latency": 2e9}: a second is worth 2 GB). Budgets on other costs, constraints and forbidden
    pairs are kept, budgets on the costs that are minimised are left out. As with solver "auto",
    the search for a proof that nothing is better is short once the proven gap is at most `gap`; 0
    always asks for it. Of allocations of equal cost one of least score is returned, as far as
    that is found in the time that the cost took.
    Raises InfeasibleError for a score that no allocation reaches, with the smallest one that
    can be, RunFailedError where the time is over before anything is found.
    """
    start = time.monotonic()
    weights = _checked(problem, of)
    if not math.isfinite(score_limit):
        raise InvalidInputError("score_limit", f"a score limit is a number, got {score_limit!r}")
    kept = [b for b in problem.budgets if b.cost not in weights]
    values, joint = _weighted(problem, weights)
    fixed = math.fsum(weight * problem.costs[name].fixed for name, weight in weights.items())
    score = Constraint(
        name="score",
        cells=problem.cells,
        coefficients=problem.sensitivity.values,
        limit=score_limit,
    )
    questions = Questions(problem=problem, number=1, seconds=time_limit_s)
    least = questions.least(values, kept, [score], joint=joint, gap=gap, effort=_EFFORT)
    if least.choice is None:
        raise _unreached(problem, kept, score_limit, time_limit_s, proven=least.proven)
    choice = least.choice
    row = Constraint(
        name="cost", cells=problem.cells, coefficients=values, limit=0.0, fixed=fixed, joint=joint
    )
    row = replace(row, limit=row.total(choice))
    value = row.limit
    spent = time.monotonic() - start
    questions = Questions(
        problem=problem, number=1, seconds=min(time_limit_s - spent, max(spent, _TIES_S))
    )
    again = questions.least(problem.sensitivity.values, kept, [row], known=choice).choice
    if again is not None and problem.score(again) < problem.score(choice):
        choice, value = again, row.total(again)
    bound = value if least.proven else min(value, fixed + least.bound)
    return LeastCost(
        weights=weights,
        score_limit=score_limit,
        budgets=tuple(kept),
        allocation=Allocation.from_choice(problem.cells, choice),
        score=problem.score(choice),
        totals=problem.totals(choice),
        value=value,
        bound=bound,
        gap=relative_gap(value, bound),
        seconds=time.monotonic() - start,
    )


def _checked(problem: Problem, of: str | Mapping[str, float]) -> dict[str, float]:
    weights = {of: 1.0} if isinstance(of, str) else dict(of)
    if not weights:
        raise InvalidInputError("weights", "least of which cost? Name one, or weights of several")
    for name, weight in weights.items():
        if name not in problem.costs:
            raise unknown("cost", name, problem.costs)
        if not (math.isfinite(weight) and weight > 0):
            raise InvalidInputError(
                "weights", f"the weight of a cost is a positive number, got {weight!r} of {name!r}"
            )
    return {name: float(weight) for name, weight in weights.items()}


def _weighted(problem: Problem, weights: Mapping[str, float]) -> tuple[Floats, JointCosts | None]:
    """Return what each cell counts, and what each pair of cells does."""
    total, pairs = np.zeros(len(problem.cells)), []
    for name, weight in weights.items():
        table = problem.costs[name]
        total += weight * table.values
        pairs += [table.joint.scaled(weight)] if table.joint else []
    return total, JointCosts.summed(pairs)


def _unreached(
    problem: Problem,
    kept: list[Budget],
    score_limit: float,
    time_limit_s: float,
    *,
    proven: bool,
) -> InfeasibleError | RunFailedError:
    asked = problem.with_budgets(kept)
    questions = Questions(problem=asked, number=1, seconds=time_limit_s)
    best = questions.least(problem.sensitivity.values, kept, gap=0.0)
    if best.choice is None and best.proven:
        return InfeasibleError("infeasible", explain(asked, time_limit_s=time_limit_s).told)
    if best.choice is None or not proven:
        return RunFailedError("solver", f"no allocation was found in {time_limit_s:g} s")
    smallest = rounded_up(asked.score(best.choice))
    beside = f" within {' and '.join(dict.fromkeys(b.cost for b in kept))}" if kept else ""
    cure = "raise the score limit or a budget" if kept else "raise the score limit"
    return InfeasibleError(
        "score_limit",
        f"no allocation scores <= {score_limit:.6g}{beside}: the smallest reachable is "
        f"{smallest}; {cure}, or add a wider format",
    )
