"""Third stage: propose allocations from the scores, measure them, keep the best real one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mpq.core.errors import InfeasibleError, RunFailedError
from mpq.core.evaluation import Evaluation
from mpq.core.problem import Allocation, Problem, Solution, Status
from mpq.core.tables import Floats
from solvers import get_solver


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """An allocation that is worth measuring; a uniform one may break a budget."""

    name: str
    solution: Solution
    predicted: float
    fits: bool

    @property
    def allocation(self) -> Allocation:
        """The proposed schemes."""
        assert self.solution.allocation is not None
        return self.solution.allocation


def predictor(problem: Problem) -> Floats:
    """Return G such that x^T G x predicts the loss: pair terms where they are known."""
    if problem.responses is None:
        return np.diag(problem.sensitivity.values)
    return problem.responses.interactions()


def predicted_loss(interactions: Floats, problem: Problem, allocation: Allocation) -> float:
    """Return the predicted loss of an allocation of the problem's cells."""
    choice = allocation.choice(problem.cells)
    return float(interactions[np.ix_(choice, choice)].sum())


def propose(problem: Problem, solver: str = "auto") -> list[Proposal]:
    """Return the additive optimum, the best with pairs, and every uniform scheme.

    A named solver gives its own answer instead of the first two. Raises InfeasibleError where
    no allocation meets the budgets, RunFailedError where a solver found none in its time.
    """
    interactions = predictor(problem)
    names = [solver] if solver != "auto" else ["ilp"]
    if solver == "auto" and problem.responses is not None:
        names.append("pairs")
    proposals = []
    for name in names:
        solution = get_solver(name).solve(problem)
        if solution.infeasibility is not None:
            raise InfeasibleError("infeasible", solution.infeasibility.message)
        if solution.allocation is None:
            raise RunFailedError("solver", f"solver {name!r} found no allocation in its time")
        label = "additive" if name == "ilp" else name
        proposals.append((label, solution))
    for scheme, allocation in problem.uniform().items():
        proposals.append((f"uniform {scheme}", as_solution(problem, allocation)))
    return [
        Proposal(
            name=name,
            solution=solution,
            predicted=predicted_loss(interactions, problem, solution.allocation),
            fits=problem.fits(solution.allocation),
        )
        for name, solution in proposals
        if solution.allocation is not None
    ]


def as_solution(problem: Problem, allocation: Allocation) -> Solution:
    """Return a checked solution for an allocation that nobody solved for."""
    choice = allocation.choice(problem.cells)
    return Solution(
        status=Status.FEASIBLE,
        solver="uniform",
        budgets=problem.budgets,
        allocation=allocation,
        score=problem.score(choice),
        totals=problem.totals(choice),
    )


def best(proposals: Sequence[Proposal], measured: Mapping[str, Evaluation]) -> Proposal:
    """Return the fitting proposal that measured best on calibration data, the first of equals.

    Uniform schemes are among them, so nothing worse than one that fits is ever returned.
    """
    fitting = [proposal for proposal in proposals if proposal.fits]
    return min(fitting, key=lambda proposal: measured[proposal.name].mean)
