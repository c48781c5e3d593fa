"""What other budgets would give, from stored scores; no model, no torch."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from mpq.core.errors import InvalidInputError
from mpq.core.evaluation import CHOSEN
from mpq.core.frontier import Frontier
from mpq.core.layers import LayerGraph
from mpq.core.problem import Problem, Solution
from mpq.core.risk import check_risk, risk_of
from mpq.dashboard.problems import ProblemError
from mpq.dashboard.views import result_tag
from mpq.pins import resolve_forbidden, resolve_pins
from mpq.stated import stated
from mpq.store.store import Store
from solvers import solve
from solvers.frontier import frontier
from solvers.risk import at_risk

Name = Annotated[str, Field(max_length=1000)]
Named = tuple[Name, Name]  # a layer or unit, and a scheme
_KEPT = 4


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


class Problems:
    """The last problems that were asked about, so that a slider need not read them each time."""

    def __init__(self, store: Store, most_cells: int) -> None:
        self._store, self._most_cells = store, most_cells
        self._kept: OrderedDict[str, tuple[LayerGraph, Problem]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, run_id: str) -> tuple[LayerGraph, Problem]:
        """Return the network and the tables of a run; raises ProblemError (413) for too many."""
        tag = result_tag(self._store.run(run_id))
        with self._lock:
            if tag is not None and tag in self._kept:
                self._kept.move_to_end(tag)
                return self._kept[tag]
        found = self._store.graph(run_id), self._store.problem(run_id, with_responses=False)
        if len(found[1].cells) > self._most_cells:
            raise ProblemError(
                413,
                "too_large",
                f"run {run_id} has {len(found[1].cells)} cells, more than are solved here: ask "
                "'mpq solve' on the database",
            )
        if tag is not None:
            with self._lock:
                self._kept[tag] = found
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
        return found


def answer(
    store: Store, problems: Problems, run_id: str, question: Question
) -> tuple[LayerGraph, Solution]:
    """Return the network and the allocation of least score; raises InvalidInputError."""
    graph, problem = problems.of(run_id)
    budgets = _chosen(store, run_id).budgets if question.budgets is None else question.budgets
    pins = resolve_pins(graph, question.pin)
    asked = stated(problem, budgets, pins, resolve_forbidden(graph, question.forbid))
    wanted = store.run(run_id).spec.risk if question.risk is None else question.risk
    risk = risk_of(wanted, asked.costs, asked.limits())
    return graph, solve(asked, "auto", None if risk is None else check_risk(risk))


def trade_off(store: Store, problems: Problems, run_id: str, cost: str, points: int) -> Frontier:
    """Return the proven trade-off of a cost, the other budgets of the run kept."""
    _, problem = problems.of(run_id)
    chosen = _chosen(store, run_id)
    spec = store.run(run_id).spec
    problem = problem.with_budgets(chosen.budgets)
    risk = risk_of(spec.risk, problem.costs, problem.limits())
    return frontier(at_risk(problem, risk, (cost, *spec.minimised)), cost, points)


def _chosen(store: Store, run_id: str) -> Solution:
    found = dict(store.solutions(run_id)).get(CHOSEN)
    if found is None:
        state = store.run(run_id).state
        raise InvalidInputError("run_unfinished", f"run {run_id} has no result: it is {state}")
    return found
