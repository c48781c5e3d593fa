"""What a run holds as tables: runs, scores, costs, allocation, evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mpq.core.errors import InvalidInputError, unknown
from mpq.core.evaluation import CHOSEN
from mpq.core.formats import Scheme
from mpq.core.latency import KernelLatency
from mpq.core.tables import Cells
from mpq.datatable import Column, DataTable, Kind
from mpq.store.records import RunSummary
from mpq.store.store import Store


def runs_table(rows: Sequence[RunSummary]) -> DataTable:
    """Return runs, one a row, with the totals of their chosen allocations and their metrics."""
    parts: tuple[tuple[str, Kind, Callable[[RunSummary], Any]], ...] = (
        ("id", "text", lambda row: row.run.id),
        ("name", "text", lambda row: row.run.name),
        ("state", "text", lambda row: row.run.state.value),
        ("model", "text", lambda row: row.run.spec.model),
        ("metric", "text", lambda row: row.run.spec.metric),
        ("owner", "text", lambda row: row.owner),
        ("tags", "text", lambda row: "; ".join(row.tags)),
        ("budgets", "text", lambda row: "; ".join(row.run.spec.budgets)),
        ("device", "text", lambda row: row.run.device),
        ("mpq_version", "text", lambda row: row.run.mpq_version),
        ("created_at", "time", lambda row: row.run.created_at),
        ("started_at", "time", lambda row: row.run.started_at),
        ("ended_at", "time", lambda row: row.run.ended_at),
        ("error_code", "text", lambda row: row.run.error_code),
        ("error_message", "text", lambda row: row.run.error_message),
        ("calibration_data", "text", lambda row: row.run.calibration_data),
        ("held_out_data", "text", lambda row: row.run.held_out_data),
        ("predicted", "float", lambda row: row.predicted),
        ("divergence", "float", lambda row: row.divergence),
    )
    columns = [Column(name, kind, [of(row) for row in rows]) for name, kind, of in parts]
    columns += _spread("totals", [row.totals for row in rows])
    columns += _spread("metrics", [row.metrics for row in rows])
    return DataTable(name="runs", columns=tuple(columns))


def scores_table(store: Store, run_id: str) -> DataTable:
    """Return the sensitivity of every cell, of every metric of the run."""
    found = [store.sensitivity(run_id, metric) for metric in store.scored_metrics(run_id)]
    if not found:
        store.sensitivity(run_id)  # raises: the run did not get that far
    columns = [Column("run", "text", [run_id for table in found for _ in table.values])]
    for name in ("metric", "data"):
        texts = [getattr(table, name) for table in found for _ in table.values]
        columns.append(Column(name, "text", texts))
    columns += _cell_columns([table.cells for table in found])
    for name, of in (("value", "values"), ("stderr", "stderr")):
        values = [v for table in found for v in getattr(table, of).tolist()]
        columns.append(Column(name, "float", values))
    return DataTable(name="scores", columns=tuple(columns))


def costs_table(store: Store, run_id: str) -> DataTable:
    """Return what every cell costs, for every cost; `fixed` is what no choice changes."""
    found = list(store.costs(run_id).values())
    columns = [Column("run", "text", [run_id] * sum(len(table.values) for table in found))]
    texts = {"cost": "name", "measured_in": "unit", "provenance": "provenance"}
    for name, of in texts.items():
        columns.append(Column(name, "text", [getattr(t, of) for t in found for _ in t.values]))
    columns += _cell_columns([table.cells for table in found])
    for name, of in (("value", "values"), ("low", "low"), ("high", "high")):
        numbers = [value for table in found for value in getattr(table, of).tolist()]
        columns.append(Column(name, "float", numbers))
    for name in ("fixed", "baseline"):
        of_each = [float(getattr(table, name)) for table in found for _ in table.values]
        columns.append(Column(name, "float", of_each))
    return DataTable(name="costs", columns=tuple(columns))


def allocation_table(store: Store, run_id: str) -> DataTable:
    """Return the chosen scheme of every searched layer.

    Raises InvalidInputError (`run_unfinished`) where nothing is chosen yet.
    """
    chosen = dict(store.solutions(run_id)).get(CHOSEN)
    if chosen is None or chosen.allocation is None:
        state = store.run(run_id).state
        raise InvalidInputError("run_unfinished", f"run {run_id} has no result: it is {state}")
    graph = store.graph(run_id)
    rows = [
        (layer, unit.name, graph.by_name[layer].kind, chosen.allocation[unit.name])
        for unit in graph.units
        for layer in unit.layers
    ]
    layers = [graph.by_name[row[0]] for row in rows]
    elements = [0 if layer.source else layer.num_weights for layer in layers]
    columns = (
        Column("run", "text", [run_id] * len(rows)),
        Column("layer", "text", [row[0] for row in rows]),
        Column("unit", "text", [row[1] for row in rows]),
        Column("kind", "text", [str(row[2]) for row in rows]),
        *_scheme_columns([row[3] for row in rows]),
        Column("weights", "int", elements),
    )
    return DataTable(name="allocation", columns=columns)


def evaluations_table(store: Store, run_id: str) -> DataTable:
    """Return what every candidate measured on every split."""
    found = store.evaluations(run_id)
    kinds: dict[str, Kind] = {
        "candidate": "text",
        "split": "text",
        "divergence": "text",
        "mean": "float",
        "stderr": "float",
        "predicted": "float",
        "predicted_bytes": "int",
        "measured_bytes": "int",
        "seconds": "float",
    }
    columns = [Column("run", "text", [run_id] * len(found))]
    columns += [Column(n, kind, [getattr(e, n) for e in found]) for n, kind in kinds.items()]
    columns += _spread("metrics", [e.metrics for e in found])
    return DataTable(name="evaluations", columns=tuple(columns))


def kernels_table(store: Store, devices: Sequence[str]) -> DataTable:
    """Return the measured times of kernels on these devices, in seconds of one call."""
    found = [latency for d in devices for latency in store.kernel_latencies(d).values()]
    parts: tuple[tuple[str, Kind, Callable[[KernelLatency], Any]], ...] = (
        ("device", "text", lambda one: one.device),
        ("backend", "text", lambda one: one.case.backend),
        ("kernel", "text", lambda one: one.case.kernel),
        ("shape", "text", lambda one: one.case.shape),
        ("median_s", "float", lambda one: one.median_s),
        ("low_s", "float", lambda one: one.low_s),
        ("high_s", "float", lambda one: one.high_s),
        ("rounds", "int", lambda one: one.rounds),
        ("noisy", "int", lambda one: int(one.noisy)),
    )
    columns = [Column(name, kind, [of(one) for one in found]) for name, kind, of in parts]
    return DataTable(name="kernels", columns=tuple(columns))


TABLES: dict[str, Callable[[Store, str], DataTable]] = {
    "scores": scores_table,
    "costs": costs_table,
    "allocation": allocation_table,
    "evaluations": evaluations_table,
}


def run_table(store: Store, run_id: str, name: str) -> DataTable:
    """Return a table of a run by its name; raises InvalidInputError (`unknown_table`)."""
    if name not in TABLES:
        raise unknown("table", name, TABLES)
    return TABLES[name](store, run_id)


def _cell_columns(several: Iterable[Cells]) -> list[Column]:
    pairs = [pair for cells in several for pair in cells]
    return [
        Column("unit", "text", [unit for unit, _ in pairs]),
        *_scheme_columns([scheme for _, scheme in pairs]),
    ]


def _scheme_columns(schemes: Sequence[Scheme]) -> list[Column]:
    texts = {scheme: str(scheme) for scheme in set(schemes)}
    return [
        Column("scheme", "text", [texts[scheme] for scheme in schemes]),
        Column("weight_bits", "int", [scheme.weights.bits for scheme in schemes]),
        Column("activation_bits", "int", [s.activations.bits for s in schemes]),
    ]


def _spread(prefix: str, maps: Sequence[Mapping[str, float]]) -> list[Column]:
    names = sorted({name for numbers in maps for name in numbers})
    return [
        Column(f"{prefix}.{name}", "float", [numbers.get(name, math.nan) for numbers in maps])
        for name in names
    ]
