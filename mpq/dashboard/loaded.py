"""What pages of one run share, read once: its network, tables, answers and measurements."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from mpq.core.budgets import BudgetText
from mpq.core.evaluation import CHOSEN, Evaluation
from mpq.core.formats import Scheme
from mpq.core.jobs import ENDED, JobSpec
from mpq.core.layers import LayerGraph
from mpq.core.problem import Problem, Solution
from mpq.core.risk import risk_of
from mpq.core.tables import Indices
from mpq.store.store import Store
from solvers.check import score_of

if TYPE_CHECKING:
    from mpq.what_if import RunWhatIf


_PLAYED = 2  # runs whose interactions are kept: a matrix of all cells each


@dataclass(frozen=True)
class LoadedRun:
    """A run that has scores and costs; `risk` is that of its measured budgets."""

    id: str
    spec: JobSpec
    graph: LayerGraph
    problem: Problem
    risk: float | None
    solutions: dict[str, Solution]
    evaluations: tuple[Evaluation, ...]
    _scores: dict[str, float] = field(default_factory=dict, repr=False)

    @property
    def chosen(self) -> Solution | None:
        """The chosen solution, None where the run did not get that far."""
        return self.solutions.get(CHOSEN)

    @cached_property
    def palette(self) -> tuple[Scheme, ...]:
        """All schemes, by the bits of their weights, then of activations."""
        found = dict.fromkeys(s for schemes in self.problem.cells.kinds for s in schemes)
        return tuple(sorted(found, key=lambda s: (s.weights.bits, s.activations.bits, str(s))))

    @cached_property
    def places(self) -> Indices:
        """The place in the palette of the scheme of each cell."""
        place = {scheme: number for number, scheme in enumerate(self.palette)}
        cells = self.problem.cells
        of_kind = {id(kind): [place[scheme] for scheme in kind] for kind in cells.kinds}
        return np.array([n for schemes in cells.schemes for n in of_kind[id(schemes)]], np.int64)

    def stored_score(self, solver: str) -> float:
        """Return the score of the chosen allocation in the terms of a solver."""
        solver = "pairs" if solver == "pairs" and self.problem.responses is not None else "auto"
        if solver not in self._scores:
            assert self.chosen is not None
            assert self.chosen.allocation is not None
            choice = self.chosen.allocation.choice(self.problem.cells)
            self._scores[solver] = score_of(solver)(self.problem, choice)
        return self._scores[solver]

    @cached_property
    def what_if(self) -> RunWhatIf:
        """What answers other budgets; made when first asked for."""
        from mpq.what_if import RunWhatIf

        return RunWhatIf(self.graph, self.problem, self.spec.risk)


class LoadedRuns:
    """The runs that were looked at last; one that has not ended is read anew each time."""

    def __init__(self, store: Store, most: int = 8) -> None:
        self._store = store
        self._most = most
        self._kept: OrderedDict[str, LoadedRun] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, run_id: str) -> LoadedRun:
        """Return a run. Raises InvalidInputError where it has no scores or costs yet."""
        record = self._store.run(run_id)
        key = f"{run_id} {record.ended_at}"
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        found = self._read(run_id, record.spec)
        if record.state in ENDED:
            with self._lock:
                self._kept[key] = found
                while len(self._kept) > self._most:
                    self._kept.popitem(last=False)
                for older in list(self._kept.values())[:-_PLAYED]:
                    older.__dict__.pop("what_if", None)
        return found

    def _read(self, run_id: str, spec: JobSpec) -> LoadedRun:
        store, problem = self._store, self._store.problem(run_id)
        limited = [BudgetText.parse(text).cost for text in spec.budgets]
        return LoadedRun(
            id=run_id,
            spec=spec,
            graph=store.graph(run_id),
            problem=problem,
            risk=risk_of(spec.risk, problem.costs, limited),
            solutions=dict(store.solutions(run_id)),
            evaluations=tuple(store.evaluations(run_id)),
        )
