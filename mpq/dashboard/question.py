"""What other budgets would give, from stored scores; no model, no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from mpq.core.errors import InvalidInputError
from mpq.core.frontier import Frontier
from mpq.core.problem import Solution
from mpq.core.risk import check_risk, risk_of
from mpq.dashboard.loaded import LoadedRun
from mpq.dashboard.problems import ProblemError
from mpq.stated import under
from solvers import solve
from solvers.frontier import frontier
from solvers.risk import at_risk

Name = Annotated[str, Field(max_length=1000)]
Named = tuple[Name, Name]  # a layer or unit, and a scheme


class Question(BaseModel):
    """Other budgets for the scores of a run.

    `budgets` are texts such as "memory <= 60%" (None: those of the chosen allocation); keys of
    `pin` are names of layers or units, or patterns; of each pair in `forbid` at most one is
    taken; `risk` is the probability that each budget holds with (None: that of the job).
    """

    model_config = ConfigDict(extra="forbid")

    budgets: Annotated[list[Name], Field(max_length=20)] | None = None
    pin: Annotated[dict[Name, Name], Field(max_length=10_000)] = {}
    forbid: Annotated[list[tuple[Named, Named]], Field(max_length=1000)] = []
    risk: Annotated[float, Field(ge=0.5, lt=1)] | None = None


def solvable(run: LoadedRun, most_cells: int) -> LoadedRun:
    """Return a run that is small enough to solve here; raises ProblemError (413)."""
    if len(run.problem.cells) > most_cells:
        raise ProblemError(
            413,
            "too_large",
            f"run {run.id} has {len(run.problem.cells)} cells, more than are solved here: ask "
            "'mpq solve' on the database",
        )
    return run


def asked_solution(run: LoadedRun, question: Question) -> Solution:
    """Return the allocation of least score; raises InvalidInputError."""
    budgets = _chosen(run).budgets if question.budgets is None else question.budgets
    asked, risk = under(
        run.graph,
        run.problem,
        run.spec.risk,
        budgets,
        pin=question.pin,
        risk=question.risk,
        forbid=question.forbid,
    )
    return solve(asked, "auto", None if risk is None else check_risk(risk))


def trade_off(run: LoadedRun, cost: str, points: int) -> Frontier:
    """Return the proven trade-off of a cost, the other budgets of the run kept."""
    problem = run.problem.with_budgets(_chosen(run).budgets)
    risk = risk_of(run.spec.risk, problem.costs, problem.limits())
    return frontier(at_risk(problem, risk, (cost, *run.spec.minimised)), cost, points)


def _chosen(run: LoadedRun) -> Solution:
    if run.chosen is None:
        raise InvalidInputError("run_unfinished", f"run {run.id} has no result yet")
    return run.chosen
