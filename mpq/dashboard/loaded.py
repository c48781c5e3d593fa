"""What pages of one run share, read once: its network, tables, answers and measurements."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from mpq.core.budgets import BudgetText
from mpq.core.evaluation import CHOSEN, Evaluation
from mpq.core.jobs import ENDED, JobSpec
from mpq.core.layers import LayerGraph
from mpq.core.problem import Problem, Solution
from mpq.core.risk import risk_of
from mpq.store.store import Store

if TYPE_CHECKING:
    from mpq.what_if import RunWhatIf


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

    @property
    def chosen(self) -> Solution | None:
        """The chosen solution, None where the run did not get that far."""
        return self.solutions.get(CHOSEN)

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
