"""Sensitivity and cost tables, responses, and the problem they make."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from mpq.core.errors import unknown
from mpq.core.joint import JointCosts
from mpq.core.problem import Problem
from mpq.core.tables import Cells, CostTable, Floats, Responses, SensitivityTable
from mpq.store.arrays import npy_array, npy_bytes
from mpq.store.cells import CellText, cell_texts, cells_of
from mpq.store.models import (
    CostCellRow,
    CostRow,
    JointCostRow,
    ResponseAxis,
    ResponsesRow,
    RunRow,
    ScoreRow,
)
from mpq.store.runs import not_stored, put_data

_ROWS_AT_ONCE = 10_000  # a million cells are not a million dicts at once


class CellReader:
    """Makes cells of text, the same object for the same text: equal tables compare at once."""

    def __init__(self) -> None:
        self._known: list[tuple[list[CellText], Cells]] = []

    def __call__(self, texts: Iterable[CellText]) -> Cells:
        """Return the cells of (unit, scheme) pairs in order."""
        wanted = list(texts)
        for known, cells in self._known:
            if known == wanted:
                return cells
        self._known.append((wanted, cells_of(wanted)))
        return self._known[-1][1]


def put_sensitivity(session: Session, run_id: str, table: SensitivityTable) -> None:
    """Keep a table in place of an earlier one of the same metric."""
    session.execute(
        delete(ScoreRow).where(ScoreRow.run_id == run_id, ScoreRow.metric == table.metric)
    )
    shared = {"run_id": run_id, "metric": table.metric}
    columns = {"value": table.values, "stderr": table.stderr}
    _insert_cells(session, ScoreRow, shared, table.cells, columns)
    if table.data:  # all tables of a run are of its data
        put_data(session, run_id, table.data, None)


def scored_metrics(session: Session, run_id: str) -> list[str]:
    """Return the names of the metrics that a run has a table of, in order."""
    of_run = select(ScoreRow.metric).where(ScoreRow.run_id == run_id)
    return list(session.scalars(of_run.distinct().order_by("metric")))


def sensitivity(
    session: Session, run_id: str, metric: str | None, read: CellReader
) -> SensitivityTable:
    """Return the table of a metric; None is that the run asked for, or picked."""
    found = scored_metrics(session, run_id)
    if not found:
        raise not_stored(session, run_id, "sensitivity table")
    if metric is None:
        asked = session.scalars(select(RunRow.metric).where(RunRow.id == run_id)).one()
        scored = [name for name in found if not name.startswith("quality ")]  # beside the metric
        metric = scored[0] if asked not in found and len(scored) == 1 else asked
    if metric not in found:
        raise unknown(f"metric of run {run_id}", metric, found)
    rows = session.execute(
        select(ScoreRow.unit, ScoreRow.scheme, ScoreRow.value, ScoreRow.stderr)
        .where(ScoreRow.run_id == run_id, ScoreRow.metric == metric)
        .order_by(ScoreRow.position)
    ).all()
    numbers = np.array([row[2:] for row in rows], np.float64)
    return SensitivityTable(
        metric=metric,
        cells=read((row[0], row[1]) for row in rows),
        values=numbers[:, 0],
        stderr=numbers[:, 1],
        data=session.scalars(select(RunRow.calibration_data).where(RunRow.id == run_id)).one()
        or "",
    )


def cells(session: Session, run_id: str) -> Cells:
    """Return the choices of a run, in the order of its tables."""
    return sensitivity(session, run_id, None, CellReader()).cells


def put_cost(session: Session, run_id: str, table: CostTable) -> None:
    """Keep a table in place of an earlier one of the same name."""
    session.execute(delete(CostRow).where(CostRow.run_id == run_id, CostRow.name == table.name))
    shared = {"run_id": run_id, "name": table.name}
    session.execute(
        insert(CostRow).values(
            **shared,
            unit_of_measure=table.unit,
            fixed=float(table.fixed),
            baseline=float(table.baseline),
            weights=int(table.weights),
            provenance=table.provenance,
        )
    )
    columns = {"value": table.values, "low": table.low, "high": table.high}
    _insert_cells(session, CostCellRow, shared, table.cells, columns)
    if table.joint:
        parts = (table.joint.first, table.joint.second, table.joint.values)
        pairs = list(zip(*(part.tolist() for part in parts), strict=True))
        for start in range(0, len(pairs), _ROWS_AT_ONCE):
            rows = [
                {**shared, "first": first, "second": second, "value": value}
                for first, second, value in pairs[start : start + _ROWS_AT_ONCE]
            ]
            session.execute(insert(JointCostRow), rows)


def costs(session: Session, run_id: str, read: CellReader) -> dict[str, CostTable]:
    """Return the cost tables of a run by name, in the order of their names."""
    rows = session.execute(
        select(
            CostRow.name,
            CostRow.unit_of_measure,
            CostRow.fixed,
            CostRow.baseline,
            CostRow.weights,
            CostRow.provenance,
        ).where(CostRow.run_id == run_id)
    ).all()
    found = {}
    # Sorted here: how a server sorts text depends on its language.
    for name, unit, fixed, baseline, weights, provenance in sorted(rows, key=lambda row: row.name):
        cells = session.execute(
            select(
                CostCellRow.unit,
                CostCellRow.scheme,
                CostCellRow.value,
                CostCellRow.low,
                CostCellRow.high,
            )
            .where(CostCellRow.run_id == run_id, CostCellRow.name == name)
            .order_by(CostCellRow.position)
        ).all()
        numbers = np.array([row[2:] for row in cells], np.float64).reshape(-1, 3)
        axis = read((row[0], row[1]) for row in cells)
        found[name] = CostTable(
            name=name,
            unit=unit,
            cells=axis,
            values=numbers[:, 0],
            low=numbers[:, 1],
            high=numbers[:, 2],
            fixed=fixed,
            baseline=baseline,
            weights=weights,
            provenance=provenance,
            joint=_joint(session, run_id, name, axis),
        )
    return found


def cost_units(session: Session, run_id: str) -> dict[str, str]:
    """Return what each cost of a run is counted in, by its name."""
    of_run = select(CostRow.name, CostRow.unit_of_measure).where(CostRow.run_id == run_id)
    return {name: unit for name, unit in session.execute(of_run)}  # noqa: C416


def _joint(session: Session, run_id: str, name: str, cells: Cells) -> JointCosts | None:
    """Return what pairs of cells add to a cost, None where they add nothing."""
    rows = session.execute(
        select(JointCostRow.first, JointCostRow.second, JointCostRow.value)
        .where(JointCostRow.run_id == run_id, JointCostRow.name == name)
        .order_by(JointCostRow.first, JointCostRow.second)
    ).all()
    if not rows:
        return None
    first, second, values = map(np.array, zip(*rows, strict=True))
    return JointCosts(cells=cells, first=first, second=second, values=values)


def put_responses(session: Session, run_id: str, responses: Responses) -> None:
    """Keep the responses of a run in place of earlier ones."""
    texts = cell_texts(responses.cells)
    session.execute(delete(ResponsesRow).where(ResponsesRow.run_id == run_id))
    session.execute(
        insert(ResponsesRow).values(
            run_id=run_id,
            cells=ResponseAxis(
                units=tuple(t[0] for t in texts),
                schemes=tuple(t[1] for t in texts),
                trust=responses.trust,
            ),
            array=npy_bytes("responses", np.asarray(responses.vectors, np.float32)),
        )
    )


def responses(session: Session, run_id: str, read: CellReader) -> Responses | None:
    """Return the responses of a run, None where its metric has none."""
    found = session.execute(
        select(ResponsesRow.cells, ResponsesRow.array).where(ResponsesRow.run_id == run_id)
    ).one_or_none()
    if found is None:
        return None
    axis, array = found
    vectors = npy_array(f"responses of run {run_id}", array).astype(np.float32, copy=False)
    return Responses(
        cells=read(zip(axis.units, axis.schemes, strict=True)),
        vectors=vectors,
        trust=axis.trust,
    )


def problem(session: Session, run_id: str, with_responses: bool) -> Problem:
    """Return the tables of a run as a problem without budgets; negative scores are at zero."""
    read = CellReader()
    return Problem(
        sensitivity=sensitivity(session, run_id, None, read).clamped(),
        costs=costs(session, run_id, read),
        budgets=(),
        responses=responses(session, run_id, read) if with_responses else None,
    )


def _insert_cells(
    session: Session,
    row: type[ScoreRow] | type[CostCellRow],
    shared: dict[str, str],
    cells: Cells,
    columns: dict[str, Floats],
) -> None:
    names = ("position", "unit", "scheme", *columns)
    texts = cell_texts(cells)
    for start in range(0, len(texts), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        numbers = [column[some].tolist() for column in columns.values()]
        rows = [
            {**shared, **dict(zip(names, (position, unit, scheme, *values), strict=True))}
            for position, ((unit, scheme), *values) in enumerate(
                zip(texts[some], *numbers, strict=True), start
            )
        ]
        session.execute(insert(row), rows)
