"""Third stage: propose allocations from the scores, measure them, keep the best real one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mpq.core.errors import InfeasibleError, RunFailedError
from mpq.core.evaluation import Evaluation
from mpq.core.problem import Allocation, Problem, Solution, Status
from mpq.core.protocols import Solver
from mpq.core.tables import Floats, Indices
from mpq.criterion import Criterion
from solvers import get_solver
from solvers.pairs import Pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """An allocation that is worth measuring; a uniform one may break a budget.

    `predicted` is the divergence that is expected, with pairs where they are known: None where
    the metric predicts another thing.
    """

    name: str
    solution: Solution
    predicted: float | None
    fits: bool

    @property
    def allocation(self) -> Allocation:
        """The proposed schemes."""
        assert self.solution.allocation is not None
        return self.solution.allocation


def propose(
    problem: Problem,
    solver: str | Solver = "auto",
    others: Mapping[str, Allocation] | None = None,
) -> list[Proposal]:
    """Return the additive optimum, the best with pairs, every uniform scheme, and `others`.

    A solver of one's own or by name gives its answer instead of the first two. Raises
    InfeasibleError where no allocation meets the budgets, RunFailedError where a solver found
    none in its time.
    """
    names = ["auto", "pairs"] if problem.responses is not None else ["auto"]
    asked = [solver] if solver != "auto" else names
    solved = {}
    for one in asked:
        named = _solver(one) if isinstance(one, str) else one
        name, solution = named.name, named.solve(problem)
        if solution.infeasibility is not None:
            raise InfeasibleError("infeasible", solution.infeasibility.told)
        if solution.allocation is None:
            raise RunFailedError("solver", f"solver {name!r} found no allocation in its time")
        solved["additive" if name in ("auto", "ilp") else name] = solution
    # Of the solvers' bounds, those on the additive score.
    bound = max((s.bound for s in solved.values() if s.solver != "pairs"), default=-math.inf)
    uniform = {f"uniform {scheme}": a for scheme, a in problem.uniform().items()}
    for name, allocation in {**uniform, **(others or {})}.items():
        solved[name] = Solution(
            status=Status.FEASIBLE,
            solver=name.split()[0],
            budgets=problem.budgets,
            allocation=allocation,
        )
    interactions = None if problem.responses is None else problem.responses.interactions()
    return [
        _proposal(name, problem, solution, bound, interactions) for name, solution in solved.items()
    ]


def _solver(name: str) -> Solver:
    # candidates are compared by their additive scores: a bound on pairs would be left out
    return Pairs(prove=False) if name == "pairs" else get_solver(name)


def _proposal(
    name: str, problem: Problem, solution: Solution, bound: float, interactions: Floats | None
) -> Proposal:
    assert solution.allocation is not None
    choice = solution.allocation.choice(problem.cells)
    return Proposal(
        name=name,
        solution=additively(problem, solution, bound),
        predicted=predicted_loss(problem, choice, interactions),
        fits=problem.fits(solution.allocation),
    )


def predicted_loss(problem: Problem, choice: Indices, interactions: Floats | None) -> float | None:
    """Return the divergence that is expected of a choice, with pairs where they are known.

    None where the metric predicts another thing.
    """
    if interactions is not None:
        return float(interactions[np.ix_(choice, choice)].sum())
    return problem.score(choice) if problem.sensitivity.is_divergence else None


def additively(problem: Problem, solution: Solution, bound: float) -> Solution:
    """Return a solution of any origin with its additive score, and its gap to a proven bound.

    So all candidates of a run are compared in one number: how far each is from the additive
    optimum. An OPTIMAL one is returned as it is.
    """
    if solution.status == Status.OPTIMAL or solution.allocation is None:
        return solution
    choice = solution.allocation.choice(problem.cells)
    score = problem.score(choice)
    gap = 0.0 if score <= bound else (score - bound) / max(abs(score), 1e-300)
    return replace(
        solution, score=score, totals=problem.totals(choice), bound=min(bound, score), gap=gap
    )


def best(
    proposals: Sequence[Proposal],
    measured: Mapping[str, Evaluation],
    criterion: Criterion | None = None,
) -> Proposal:
    """Return the fitting proposal that measured best on calibration data, the first of equals.

    Uniform schemes are among them, so nothing worse than one that fits is ever returned.
    Raises RunFailedError where no fitting proposal has a finite output, InfeasibleError where
    none meets the limits of the criterion.
    """
    criterion = criterion or Criterion()
    values = {p.name: criterion.value(measured[p.name]) for p in proposals if p.fits}
    fitting = [p for p in proposals if p.fits and math.isfinite(values[p.name])]
    if not fitting:
        raise RunFailedError(
            "not_finite",
            "every allocation that fits makes the model's output NaN or infinite on calibration "
            "data: add wider schemes or raise the budgets",
        )
    allowed = [p for p in fitting if criterion.allows(measured[p.name])]
    if not allowed:
        raise criterion.unreached([measured[p.name] for p in fitting])
    return min(allowed, key=lambda proposal: values[proposal.name])
