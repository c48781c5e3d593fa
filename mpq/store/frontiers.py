"""Trade-offs of a run: solutions along the limits of one cost or two."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from mpq.core.frontier import Frontier, Surface
from mpq.core.problem import Allocation, Solution, Status
from mpq.core.tables import Cells
from mpq.store.arrays import npy_array, npy_bytes
from mpq.store.models import FrontierPointRow, FrontierRow


def put(session: Session, run_id: str, found: Frontier | Surface, cells: Cells) -> None:
    """Keep a trade-off in place of an earlier one of the same costs."""
    points: Sequence[Solution | None]
    if isinstance(found, Surface):
        name, complete = ",".join(found.costs), False
        grid = tuple(tuple(axis.tolist()) for axis in found.limits)
        points = [solution for row in found.solutions for solution in row]
    else:
        name, complete, grid, points = found.cost, found.complete, (), found.solutions
    here = (FrontierRow.run_id == run_id, FrontierRow.costs == name)
    session.execute(delete(FrontierRow).where(*here))
    session.execute(
        insert(FrontierRow).values(
            run_id=run_id, costs=name, complete=complete, grid=grid, created_at=datetime.now(UTC)
        )
    )
    rows = [
        {
            "run_id": run_id,
            "costs": name,
            "position": position,
            "status": solution.status.value,
            "solver": solution.solver,
            "score": float(solution.score),
            "bound": float(solution.bound),
            "gap": float(solution.gap),
            "seconds": float(solution.seconds),
            "budgets": solution.budgets,
            "totals": {cost: float(v) for cost, v in (solution.totals or {}).items()},
            "places": npy_bytes("places", _places(solution.allocation, cells)),
        }
        for position, solution in enumerate(points)
        if solution is not None and solution.allocation is not None
    ]
    if rows:
        session.execute(insert(FrontierPointRow), rows)


def get(
    session: Session, run_id: str, costs: tuple[str, ...], cells: Cells
) -> Frontier | Surface | None:
    """Return the Frontier of one cost or the Surface of two, None where none is kept."""
    name = ",".join(costs)
    head = session.scalars(
        select(FrontierRow).where(FrontierRow.run_id == run_id, FrontierRow.costs == name)
    ).one_or_none()
    if head is None:
        return None
    rows = session.scalars(
        select(FrontierPointRow)
        .where(FrontierPointRow.run_id == run_id, FrontierPointRow.costs == name)
        .order_by(FrontierPointRow.position)
    ).all()
    points = {row.position: _solution(row, cells) for row in rows}
    if len(costs) == 1:
        return Frontier(cost=name, solutions=tuple(points.values()), complete=head.complete)
    first, second = (np.array(axis) for axis in head.grid)
    return Surface(
        costs=(costs[0], costs[1]),
        limits=(first, second),
        solutions=tuple(
            tuple(points.get(i * len(second) + j) for j in range(len(second)))
            for i in range(len(first))
        ),
    )


def totals(session: Session, run_id: str) -> dict[str, list[tuple[dict[str, float], float]]]:
    """Return the totals and the score of every point, by the one cost of its frontier."""
    rows = session.execute(
        select(FrontierPointRow.costs, FrontierPointRow.totals, FrontierPointRow.score)
        .where(FrontierPointRow.run_id == run_id)
        .order_by(FrontierPointRow.costs, FrontierPointRow.position)
    ).all()
    found: dict[str, list[tuple[dict[str, float], float]]] = {}
    for row in rows:
        if "," not in row.costs:
            found.setdefault(row.costs, []).append((dict(row.totals), row.score))
    return found


def _places(allocation: Allocation, cells: Cells) -> npt.NDArray[np.uint16]:
    return (allocation.choice(cells) - cells.offsets[:-1]).astype(np.uint16)


def _solution(row: FrontierPointRow, cells: Cells) -> Solution:
    places = npy_array("places", row.places).astype(np.int64)
    return Solution(
        status=Status(row.status),
        solver=row.solver,
        budgets=row.budgets,
        allocation=Allocation.from_choice(cells, cells.offsets[:-1] + places),
        score=row.score,
        totals=row.totals,
        bound=row.bound,
        gap=row.gap,
        seconds=row.seconds,
    )
