"""The network that a run is about."""

from __future__ import annotations

from sqlalchemy import delete, insert, select, update
from sqlalchemy.orm import Session

from mpq.core.layers import LayerGraph
from mpq.store.models import RunRow, UnitRow
from mpq.store.runs import not_stored


def put(session: Session, run_id: str, graph: LayerGraph) -> None:
    """Keep the network of a run, and its units as rows that can be queried."""
    session.execute(update(RunRow).where(RunRow.id == run_id).values(graph=graph))
    session.execute(delete(UnitRow).where(UnitRow.run_id == run_id))
    rows = []
    for position, unit in enumerate(graph.units):
        rows.append(
            {
                "run_id": run_id,
                "name": unit.name,
                "position": position,
                "layers": unit.layers,
                "weights": sum(layer.num_weights for layer in graph.stored_layers(unit)),
            }
        )
    if rows:
        session.execute(insert(UnitRow), rows)


def get(session: Session, run_id: str) -> LayerGraph:
    """Return the network of a run."""
    found = session.scalar(select(RunRow.graph).where(RunRow.id == run_id))
    if found is None:
        raise not_stored(session, run_id, "layer graph")
    return found
