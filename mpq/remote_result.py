"""The result of a run behind a server: what can be told and solved without the network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mpq.core.evaluation import CHOSEN
from mpq.core.formats import Scheme
from mpq.core.frontier import Frontier
from mpq.core.infeasibility import Infeasibility
from mpq.core.problem import Allocation, Budget, Solution, Status
from mpq.datatable import DataTable

if TYPE_CHECKING:
    from mpq.remote import RemoteRuns

Named = tuple[str, str | Scheme]


class RemoteResult:
    """A finished search, as `SearchResult` has it, as far as it needs no network and no tables."""

    def __init__(self, runs: RemoteRuns, run_id: str) -> None:
        self._runs = runs
        self.run_id = run_id
        (view,) = runs.part(run_id, "solutions", label=CHOSEN, allocations=True)
        self.solution: Solution = _solution(view)
        self.allocation: Mapping[str, Scheme] = Allocation.from_text(view["layers"])

    def __repr__(self) -> str:
        return f"RemoteResult(run_id={self.run_id!r}, {self.solution.status})"

    def __getattr__(self, name: str) -> Any:
        from mpq.result import SearchResult

        if not name.startswith("_") and hasattr(SearchResult, name):
            raise AttributeError(
                f"{name} needs the network or its tables: open the result where the database is, "
                f"mpq.SearchResult(mpq.open_store(...), {self.run_id!r})"
            )
        raise AttributeError(f"a RemoteResult has no attribute {name!r}")

    @property
    def unit_allocation(self) -> Allocation:
        """The chosen scheme of each unit."""
        assert self.solution.allocation is not None
        return self.solution.allocation

    @property
    def evaluations(self) -> DataTable:
        """What every candidate measured on every split."""
        return self._runs.table(self.run_id, "evaluations")

    def solve(
        self,
        budgets: Sequence[str] | None = None,
        pin: Mapping[str, str | Scheme] | None = None,
        risk: float | None = None,
        forbid: Sequence[tuple[Named, Named]] = (),
    ) -> Solution:
        """Solve the same scores for other budgets, as `SearchResult.solve` does."""
        question = {
            "budgets": None if budgets is None else list(budgets),
            "pin": {name: str(scheme) for name, scheme in (pin or {}).items()},
            "forbid": [[[name, str(scheme)] for name, scheme in pair] for pair in forbid],
            "risk": risk,
        }
        return _solution(self._runs.solve(self.run_id, question))

    def frontier(self, cost: str = "memory", points: int = 25) -> Frontier:
        """Return the proven trade-off between one cost and the predicted loss."""
        asked = {"cost": cost, "points": points, "allocations": True}
        view = self._runs.part(self.run_id, "frontier", **asked)
        found = tuple(map(_solution, view["solutions"]))
        return Frontier(cost=view["cost"], solutions=found, complete=view["complete"])


def _solution(view: Mapping[str, Any]) -> Solution:
    why, allocation = view["infeasibility"], view["allocation"]
    return Solution(
        status=Status(view["status"]),
        solver=view["solver"],
        budgets=tuple(Budget(**budget) for budget in view["budgets"]),
        allocation=None if allocation is None else Allocation.from_text(allocation),
        score=_or(view["score"], math.nan),
        totals=None if allocation is None else view["totals"],
        bound=_or(view["bound"], -math.inf),
        gap=_or(view["gap"], math.inf),
        seconds=view["seconds"],
        infeasibility=None
        if why is None
        else Infeasibility(
            names=tuple(why["names"]),
            smallest={name: _or(value, math.inf) for name, value in why["smallest"].items()},
            relaxed=why["relaxed"],
            message=why["message"],
            raised=why["raised"],
            raised_by=why["raised_by"],
        ),
        risk=view["risk"],
        quantiles=view["quantiles"],
    )


def _or(value: float | None, missing: float) -> float:
    return missing if value is None else value
