"""What the budgets of an answer are worth: prices, and the answers next to it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mpq.core.errors import InvalidInputError
from mpq.core.problem import Budget, Constraint, Problem, Solution, Status
from mpq.core.shadow import Alternative, ShadowPrice, ShadowPrices
from mpq.core.tables import Floats
from solvers.check import score_of
from solvers.knapsack import Knapsack, unit_numbers
from solvers.questions import FEW_CELLS, Questions, alternative, below
from solvers.relaxation import relax
from solvers.risk import by_quantiles

_RAISED = 1.08
_ROUNDING = 1e-9  # of a score: what is better by less does not count as better
_ROOM = 1e-4  # of the widest unit, that a budget leaves at least when it is priced
_TRIED = 20  # changes of one unit, the best by rounded sums
_MOST_ROWS = 8  # conditions that the ellipsoid is quick for


def shadow_prices(
    problem: Problem, solution: Solution, *, time_limit_s: float = 0.6
) -> ShadowPrices:
    """Return what each budget of a solution is worth, the other budgets kept.

    All of it is about the proven optimum of the additive score under the solution's budgets,
    which is the solution itself where it is OPTIMAL in that score. Every allocation in the
    answer is solved for, exactly; what is not proven within `time_limit_s` (for all of it) is
    the best found and says so. Where the solution's budgets hold with a probability, costs count
    with their quantiles (see solvers.risk), also in the answer; `problem` has no constraints for
    that. Raises InvalidInputError for a solution without an allocation.
    """
    if solution.allocation is None:
        raise InvalidInputError(
            "solution", f"a solution that is {solution.status} has no shadow prices"
        )
    problem = by_quantiles(problem.with_budgets(solution.budgets), solution.risk)
    limits = problem.limits()
    questions = Questions(problem=problem, number=1 + 5 * len(limits), seconds=time_limit_s)
    known = solution.allocation.choice(problem.cells)
    if solution.status is Status.OPTIMAL and score_of(solution.solver) is Problem.score:
        optimum = alternative(problem, known, proven=True)
    else:
        optimum = questions.best(problem.budgets)
        if optimum.allocation is None or problem.score(known) < optimum.score:
            optimum = alternative(problem, known, proven=False)
    prices = budget_prices(problem)
    budgets = [_worth(questions, optimum, cost, price) for cost, price in prices.items()]
    return ShadowPrices(optimum=optimum, budgets=tuple(budgets))


def _worth(questions: Questions, optimum: Alternative, cost: str, price: float) -> ShadowPrice:
    problem, limits = questions.problem, questions.problem.limits()
    others = [Budget(name, limit) for name, limit in limits.items() if name != cost]
    raised_limit = _RAISED * limits[cost]
    without = questions.best(others, known=optimum)
    gains = without.score < optimum.score - _ROUNDING * abs(optimum.score)
    if gains or not without.proven:
        raised = questions.best([*others, Budget(cost, raised_limit)], known=optimum)
        if not raised.score < optimum.score:
            raised = replace(optimum, proven=raised.proven)
        known = raised if raised.score < optimum.score else without
        better = _next_better(questions, optimum, known, cost, others)
    else:
        questions.number -= 3
        raised, better = optimum, Alternative()
    assert optimum.totals is not None
    row = Constraint.at_most(problem.costs[cost], 0.0)
    row = below(row, optimum.totals[cost])
    one_changed = _one_change(problem.with_budgets(others), optimum, row)
    return ShadowPrice(
        cost=cost,
        unit=problem.costs[cost].unit,
        limit=limits[cost],
        price=price,
        binds=True if gains else False if without.proven else None,
        without=without,
        raised_limit=raised_limit,
        raised=raised,
        better=better,
        cheaper=questions.best(others, [row], known=one_changed),
    )


def _next_better(
    questions: Questions, optimum: Alternative, known: Alternative, cost: str, others: list[Budget]
) -> Alternative:
    """Return the smallest total with a score strictly below, and of it the least score."""
    problem = questions.problem
    table = problem.sensitivity
    score = Constraint(
        name="score", cells=problem.cells, coefficients=table.values, limit=optimum.score
    )
    some = None
    if known.allocation is not None and known.score < optimum.score:
        some = known.allocation.choice(problem.cells)
    counted = problem.costs[cost]
    least = questions.least(
        counted.values, others, [below(score, optimum.score)], joint=counted.joint, known=some
    )
    if least.choice is None:
        return Alternative(proven=least.proven)
    at_least = Constraint.at_most(counted, problem.total(cost, least.choice))
    found = alternative(problem, least.choice, proven=least.proven)
    best = questions.best(others, [at_least], known=found)
    proven = found.proven and best.proven
    return replace(best if best.score < found.score else found, proven=proven)


def _one_change(problem: Problem, optimum: Alternative, row: Constraint) -> Alternative | None:
    """Return the least score within a further condition that one changed unit leads to."""
    assert optimum.allocation is not None
    choice = optimum.allocation.choice(problem.cells)
    owners, rows = unit_numbers(problem.cells), (row, *problem.rows())
    fits = np.ones(len(problem.cells), np.bool_)
    for limited in rows:
        change = limited.coefficients - limited.coefficients[choice][owners]
        fits &= change <= limited.limit - limited.total(choice)
    change = problem.sensitivity.values - problem.sensitivity.values[choice][owners]
    cells = np.flatnonzero(fits)
    for cell in cells[np.argsort(change[cells], kind="stable")][:_TRIED]:
        changed = choice.copy()
        changed[owners[cell]] = cell
        if row.met(changed) and problem.meets(changed):
            return alternative(problem, changed, proven=False)
    return None


def budget_prices(problem: Problem) -> dict[str, float]:
    """Return the price of each budgeted cost that maximises the Lagrangian dual.

    The dual, sum_u min_i (score + prices . costs) - prices . limits, bounds the score at any
    other limits as well: it falls by at most its price for each unit that a limit is raised by.
    Forbidden pairs are left out of it.
    """
    rows, costs = problem.rows(), list(problem.limits())
    prices = np.zeros(len(rows))
    if not len(problem.cells):
        return dict.fromkeys(costs, 0.0)
    cells = np.arange(len(problem.cells))
    knapsack = Knapsack.of(problem.cells, problem.sensitivity.values, rows, cells)
    widest = knapsack.weights.max(axis=1)
    kept = np.flatnonzero(widest)
    # Where there is no room at all, ever higher prices are as good: take the slope above it.
    slack = np.maximum(knapsack.slack, _ROOM * widest)[kept]
    knapsack = replace(knapsack, weights=knapsack.weights[kept], slack=slack)
    prices[kept] = _dual_prices(knapsack)
    return dict(zip(costs, prices.tolist(), strict=False))


def _dual_prices(knapsack: Knapsack) -> Floats:
    if not len(knapsack.slack) or not knapsack.objective.any():
        return np.zeros(len(knapsack.slack))
    few = len(knapsack.cells) <= FEW_CELLS or knapsack.terms is not None
    if not few and len(knapsack.slack) <= _MOST_ROWS:
        from solvers.lagrange import maximise_dual

        dual = maximise_dual(knapsack)
        if dual is not None:
            return dual.prices
    relaxed = relax(knapsack)
    return np.zeros(len(knapsack.slack)) if relaxed is None else relaxed.prices
