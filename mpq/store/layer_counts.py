"""How often the chosen allocations of many runs gave each layer which scheme."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import JSON, String, cast, func, select
from sqlalchemy import type_coerce as typed

from mpq.core.evaluation import CHOSEN
from mpq.store.models import AllocationRow, RunRow, SolutionRow, UnitRow
from mpq.store.query import RunQuery
from mpq.store.store import Store


@dataclass(frozen=True, slots=True)
class LayerCounts:
    """`counts` is layer -> text of a scheme -> runs; `runs` have a result, of `models`."""

    runs: int
    models: tuple[str, ...]
    counts: Mapping[str, Mapping[str, int]]


def layer_counts(store: Store, query: RunQuery) -> LayerCounts:
    """Count in the database; the layers come in the order of the network."""
    with_result = (SolutionRow.label == CHOSEN, SolutionRow.totals.is_not(None))
    wanted = select(SolutionRow.id).where(*with_result, SolutionRow.run_id.in_(query.ids()))
    of_runs = select(RunRow.model, func.count()).join(SolutionRow, SolutionRow.run_id == RunRow.id)
    of_runs = of_runs.where(SolutionRow.id.in_(wanted)).group_by(RunRow.model)
    layers = cast(typed(UnitRow.layers, JSON), String)  # PostgreSQL groups by no JSON
    grouped = (
        select(layers, AllocationRow.scheme, func.count(), func.min(AllocationRow.position))
        .join(SolutionRow, SolutionRow.id == AllocationRow.solution_id)
        .join(
            UnitRow,
            (UnitRow.run_id == SolutionRow.run_id) & (UnitRow.name == AllocationRow.unit),
        )
        .where(SolutionRow.id.in_(wanted))
        .group_by(layers, AllocationRow.scheme)
        .order_by(func.min(AllocationRow.position), layers, AllocationRow.scheme)
    )
    counts: dict[str, dict[str, int]] = {}
    with store._read() as session:
        models = session.execute(of_runs.order_by(RunRow.model)).all()
        found = session.execute(grouped).all()
    for text, scheme, count, _ in found:
        for layer in json.loads(text):
            of_layer = counts.setdefault(layer, {})
            of_layer[scheme] = of_layer.get(scheme, 0) + count
    return LayerCounts(
        runs=sum(row[1] for row in models), models=tuple(row[0] for row in models), counts=counts
    )


def counted_models(store: Store) -> dict[str, int]:
    """Return the models of runs that have a result with how many they have, by name."""
    with_result = (SolutionRow.label == CHOSEN, SolutionRow.totals.is_not(None))
    of_runs = select(RunRow.model, func.count()).join(SolutionRow, SolutionRow.run_id == RunRow.id)
    with store._read() as session:
        rows = session.execute(
            of_runs.where(*with_result).group_by(RunRow.model).order_by(RunRow.model)
        ).all()
    return {row[0]: row[1] for row in rows}
