"""Which conditions cannot be met together, and how far the budgets among them must be raised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mpq.core.joint import JointCosts
from mpq.core.problem import Budget, Conflict, Constraint, Problem
from mpq.core.tables import Floats, Indices
from solvers.exact import Least, Minimise
from solvers.questions import Questions

_PRECISION = 1e-4  # of the common factor: 0.01 % of a limit
_SECONDS = 1.0  # of looking for a smaller factor


def in_conflict(problem: Problem, by: Minimise, time_limit_s: float) -> list[Conflict]:
    """Return irreducible conflicts, no budget in two, without whose budgets the rest can be met.

    For a problem in which nothing fits, but something would without any budget.
    """
    costs, found = list(problem.limits()), list[Conflict]()
    everything = range(len(problem.constraints))
    while costs and _impossible(problem, costs, everything, True, by, time_limit_s):
        conflict = irreducible(problem, costs, by, time_limit_s)
        found.append(conflict)
        costs = [cost for cost in costs if cost not in conflict.budgets]
        if not conflict.budgets:
            break
    return found


def irreducible(
    problem: Problem, costs: Sequence[str], by: Minimise, time_limit_s: float
) -> Conflict:
    """Return conditions that cannot be met together, though without any one of them they can.

    Among the budgets on `costs`, the constraints and the forbidden pairs (as one condition), all
    of which together cannot be met. Deletion filter (Chinneck & Dravnieks 1991): each condition
    in turn is dropped for good where the rest is still impossible; what is not proven in
    `time_limit_s` stays.
    """
    budgets, rows = list(costs), list(range(len(problem.constraints)))
    forbidden = bool(problem.forbidden)
    if forbidden and _impossible(problem, budgets, rows, False, by, time_limit_s):
        forbidden = False
    for row in tuple(rows):
        fewer = [other for other in rows if other != row]
        if _impossible(problem, budgets, fewer, forbidden, by, time_limit_s):
            rows = fewer
    for cost in reversed(costs):
        others = [other for other in budgets if other != cost]
        if _impossible(problem, others, rows, forbidden, by, time_limit_s):
            budgets = others
    names = tuple(problem.constraints[row].name for row in rows)
    return Conflict(budgets=tuple(budgets), constraints=names, forbidden=forbidden)


def raised_together(problem: Problem, costs: Sequence[str]) -> dict[str, float]:
    """Return limits that are enough when all budgets on `costs` are raised by one factor.

    The others are kept. The limits are the totals of an allocation that fits, so some are raised
    by less than the factor. That is the least one to 0.01 %, as far as a second goes: with all
    but the first raised by some factor, the least total of the first needs the same, less, or
    more. Empty where nothing fits whatever the factor.
    """
    if not costs:
        return {}
    limits, (first, *further) = problem.limits(), costs
    kept = [Budget(name, limit) for name, limit in limits.items() if name not in costs]
    questions = Questions(problem=problem, number=1, seconds=_SECONDS)

    def least(
        values: Floats, joint: JointCosts | None, factor: float, names: Sequence[str]
    ) -> Least:
        budgets = [*kept, *(Budget(name, factor * limits[name]) for name in names)]
        return questions.least(values, budgets, joint=joint, gap=_PRECISION / 10, effort=10)

    def factor_of(choice: Indices) -> float:
        return max(1.0, *(problem.total(cost, choice) / limits[cost] for cost in costs))

    relative, joints = np.zeros(len(problem.cells)), []
    for cost in costs:
        table = problem.costs[cost]
        size = max(limits[cost], 1e-9 * float(table.values.max(initial=0.0)))
        relative += table.values / size
        joints += [table.joint.scaled(1 / size)] if table.joint else []
    joint = JointCosts.summed(joints)
    choice = least(relative, joint, 1.0, ()).choice
    if choice is None:
        return {}
    low, high = 1.0, factor_of(choice)
    table = problem.costs[first]
    while further and high - low > _PRECISION * high and not questions.over:
        middle = (low + high) / 2
        found = least(table.values, table.joint, middle, further)
        if found.choice is not None and factor_of(found.choice) < high:
            choice, high = found.choice, factor_of(found.choice)
        if found.choice is None and not found.proven:
            break
        if (table.fixed + found.bound) / limits[first] > middle:
            low = middle
        elif high > middle:  # neither ruled out nor found
            break
    enough = {c: max(high * limits[c], problem.total(c, choice)) for c in costs}
    rows = [Constraint.at_most(problem.costs[cost], limit) for cost, limit in enough.items()]
    least_of_all = questions.least(relative, kept, rows, joint=joint, gap=_PRECISION, effort=10)
    choice = choice if least_of_all.choice is None else least_of_all.choice
    return {cost: max(limits[cost], problem.total(cost, choice)) for cost in costs}


def _impossible(
    problem: Problem,
    costs: Sequence[str],
    rows: Sequence[int],
    forbidden: bool,
    by: Minimise,
    time_limit_s: float,
) -> bool:
    """Tell whether it is proven that nothing meets some of the conditions."""
    limits = problem.limits()
    part = replace(
        problem,
        constraints=tuple(problem.constraints[row] for row in rows),
        forbidden=problem.forbidden if forbidden else (),
    )
    budgets = [Budget(cost, limits[cost]) for cost in costs]
    least = by(part, np.zeros(len(problem.cells)), budgets, time_limit_s=time_limit_s)
    return least.choice is None and least.proven
