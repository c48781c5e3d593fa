"""What every solver's answer must satisfy before anyone sees it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from mpq.core.errors import InvalidInputError, RunFailedError
from mpq.core.problem import Allocation, Infeasibility, Problem, Solution, Status
from mpq.core.tables import Indices
from solvers.pairwise import pairwise_score

Score = Callable[[Problem, Indices], float]

# What `Solution.score` of a solver means; of all others the additive score.
SCORES: Mapping[str, Score] = {"pairs": pairwise_score}


def score_of(solver: str) -> Score:
    """Return the function that a solver minimises."""
    return SCORES.get(solver, Problem.score)


def finish(
    problem: Problem,
    solver: str,
    choice: Indices | None,
    *,
    proven: bool,
    bound: float = -math.inf,
    seconds: float,
    infeasibility: Infeasibility | None = None,
) -> Solution:
    """Build the checked solution of a choice: score, totals and gap come from the choice alone.

    The gap is (score - bound) / |score|, and 0 where they are equal, so it is never negative
    and means the same for negative scores. A `proven` choice is its own bound.
    """
    if choice is None:
        status = Status.INFEASIBLE if proven else Status.UNKNOWN
        return check(
            problem,
            Solution(
                status=status,
                solver=solver,
                budgets=problem.budgets,
                bound=math.inf if proven else bound,
                seconds=seconds,
                infeasibility=infeasibility,
            ),
        )
    score = score_of(solver)(problem, choice)
    proven = proven or bound >= score
    bound = score if proven else bound
    solution = Solution(
        status=Status.OPTIMAL if proven else Status.FEASIBLE,
        solver=solver,
        budgets=problem.budgets,
        allocation=Allocation.from_choice(problem.cells, choice),
        score=score,
        totals=problem.totals(choice),
        bound=bound,
        gap=relative_gap(score, bound),
        seconds=seconds,
    )
    return check(problem, solution)


def relative_gap(score: float, bound: float) -> float:
    """Return (score - bound) / |score|, 0 where they are equal."""
    if score == bound:
        return 0.0
    return (score - bound) / max(abs(score), 1e-300)


def check(problem: Problem, solution: Solution) -> Solution:
    """Return the solution after recomputing everything in it from its allocation.

    Raises RunFailedError (`inconsistent_solution`) naming the first thing that is wrong.
    """
    if solution.budgets != problem.budgets:
        raise _inconsistent(solution, "it answers other budgets")
    solved = solution.status in (Status.OPTIMAL, Status.FEASIBLE)
    if solved != (solution.allocation is not None):
        raise _inconsistent(solution, "its status and its allocation do not fit together")
    if (solution.status is Status.INFEASIBLE) != (solution.infeasibility is not None):
        raise _inconsistent(solution, "only an infeasible answer says why nothing fits")
    if solution.allocation is not None:
        _check_allocation(problem, solution, solution.allocation)
    return solution


def _check_allocation(problem: Problem, solution: Solution, allocation: Allocation) -> None:
    try:
        choice = allocation.choice(problem.cells)
    except InvalidInputError as error:
        raise _inconsistent(solution, str(error)) from error
    except KeyError:
        choice = np.empty(0, np.int64)
    if not len(allocation) == len(choice) == len(problem.cells.units):
        raise _inconsistent(solution, "its allocation covers other units than the problem")
    if solution.totals != problem.totals(choice):
        raise _inconsistent(solution, "its totals are not those of its allocation")
    for budget in problem.budgets:
        if not solution.totals[budget.cost] <= budget.limit:
            raise _inconsistent(
                solution,
                f"{budget.cost} is {solution.totals[budget.cost]!r}, over the budget of "
                f"{budget.limit!r}",
            )
    for row in problem.constraints:
        if not row.met(choice):
            raise _inconsistent(
                solution,
                f"constraint {row.name!r} comes to {row.total(choice)!r}, over {row.limit!r}",
            )
    if not problem.allows(choice):
        raise _inconsistent(solution, "it takes a forbidden pair")
    score = score_of(solution.solver)(problem, choice)
    if not math.isclose(solution.score, score, rel_tol=1e-9, abs_tol=1e-300):  # threads of BLAS
        raise _inconsistent(solution, "its score is not that of its allocation")
    if not solution.bound <= solution.score:
        raise _inconsistent(solution, f"bound {solution.bound!r} is over score {solution.score!r}")
    if solution.gap != relative_gap(solution.score, solution.bound):
        raise _inconsistent(solution, "its gap is not that of its score and bound")
    if (solution.status is Status.OPTIMAL) != (solution.gap == 0.0):
        raise _inconsistent(solution, f"{solution.status} with a gap of {solution.gap}")


def _inconsistent(solution: Solution, what: str) -> RunFailedError:
    return RunFailedError(
        "inconsistent_solution", f"the answer of solver {solution.solver!r} is wrong: {what}"
    )
