"""Solutions of a run, and the allocation of each."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from mpq.core.problem import Allocation, Solution, Status
from mpq.store.cells import scheme_of, scheme_text
from mpq.store.models import AllocationRow, SolutionRow

_SOLVED = {Status.OPTIMAL, Status.FEASIBLE}


def put(session: Session, run_id: str, label: str, solution: Solution) -> None:
    """Keep a solution in place of an earlier one with the same label."""
    session.execute(
        delete(SolutionRow).where(SolutionRow.run_id == run_id, SolutionRow.label == label)
    )
    totals = solution.totals
    solution_id = session.scalars(
        insert(SolutionRow)
        .values(
            run_id=run_id,
            label=label,
            status=solution.status.value,
            solver=solution.solver,
            score=float(solution.score),
            bound=float(solution.bound),
            gap=float(solution.gap),
            seconds=float(solution.seconds),
            created_at=datetime.now(UTC),
            budgets=solution.budgets,
            totals=None if totals is None else {k: float(v) for k, v in totals.items()},
            infeasibility=solution.infeasibility,
        )
        .returning(SolutionRow.id)
    ).one()
    rows = [
        {
            "solution_id": solution_id,
            "position": position,
            "unit": unit,
            "scheme": scheme_text(scheme),
        }
        for position, (unit, scheme) in enumerate((solution.allocation or {}).items())
    ]
    if rows:
        session.execute(insert(AllocationRow), rows)


def get(session: Session, run_id: str) -> list[tuple[str, Solution]]:
    """Return (label, solution) in the order they were put."""
    rows = session.scalars(
        select(SolutionRow).where(SolutionRow.run_id == run_id).order_by(SolutionRow.id)
    ).all()
    allocations: dict[int, dict[str, str]] = {row.id: {} for row in rows}
    cells = session.execute(
        select(AllocationRow.solution_id, AllocationRow.unit, AllocationRow.scheme)
        .join(SolutionRow, SolutionRow.id == AllocationRow.solution_id)
        .where(SolutionRow.run_id == run_id)
        .order_by(AllocationRow.solution_id, AllocationRow.position)
    )
    for solution_id, unit, scheme in cells:
        allocations[solution_id][unit] = scheme
    return [(row.label, _solution(row, allocations[row.id])) for row in rows]


def _solution(row: SolutionRow, schemes: dict[str, str]) -> Solution:
    status = Status(row.status)
    solved = schemes or status in _SOLVED
    allocation = Allocation({unit: scheme_of(text) for unit, text in schemes.items()})
    return Solution(
        status=status,
        solver=row.solver,
        budgets=row.budgets,
        allocation=allocation if solved else None,
        score=row.score,
        totals=row.totals,
        bound=row.bound,
        gap=row.gap,
        seconds=row.seconds,
        infeasibility=row.infeasibility,
    )
