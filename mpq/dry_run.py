"""Trace a job's network and tell what its choices cost, without scoring or timing anything."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from mpq.auto import AUTO, optimum
from mpq.choices import make_cells
from mpq.core.dry_run import BudgetFound, CostRange, DryRun, UniformTotals, UnitChoices
from mpq.core.errors import InfeasibleError, MpqError
from mpq.core.jobs import JobSpec
from mpq.core.layers import LayerGraph
from mpq.core.limits import Limit
from mpq.core.problem import Budget, BudgetText, Problem
from mpq.core.provenance import cost_label
from mpq.core.risk import risk_of
from mpq.core.tables import Cells, CostTable, SensitivityTable
from mpq.costing import Hardware
from mpq.intake import graph_of, load, sample_of, served_of
from mpq.jobfile import parse_job
from mpq.nn.batches import num_samples
from mpq.progress import Silent
from mpq.residency import bytes_beside
from mpq.store.store import Store, open_store
from sensitivity import get_metric
from solvers import get_solver


def dry_run(spec: JobSpec, store: Store) -> DryRun:
    """Return what a job would search.

    Loads the network and its data, and traces one sample. Raises InvalidInputError as the search
    would before it begins; budgets that cannot be met are told, not raised.
    """
    if spec.metric != AUTO:
        get_metric(spec.metric)
    get_solver(spec.solver)
    budgets = [BudgetText.parse(text) for text in spec.budgets]
    for text in spec.limits:
        Limit.parse(text)
    given = load(
        spec.model,
        spec.calibration,
        held_out=spec.held_out,
        sample=spec.sample,
        loss=spec.loss,
        evaluate=spec.evaluate,
        quality=spec.quality,
        profiles=spec.profiles,
        seed=spec.seed,
        trial=True,
    )
    graph = graph_of(spec, given)
    beside = partial(bytes_beside, model=given.model, sample=sample_of(given))
    hardware = Hardware(spec, budgets, store, Silent(), beside, served_of(spec, given, graph))
    cells = make_cells(graph, hardware.schemes, spec.pin, spec.on_indivisible)
    costs, untimed = hardware.tables_at_hand(graph, cells)
    resolved = [b.resolve(costs) for b in budgets if b.cost in costs or not untimed]
    limits = {budget.text: budget.limit for budget in resolved}
    return DryRun(
        layers=len(graph.layers),
        searched_layers=sum(len(unit.layers) for unit in graph.units),
        searched_weights=graph.searched_weights,
        native_bytes=graph.native_bytes,
        cells=len(cells),
        batches=len(given.calibration),
        samples=sum(num_samples(batch) for batch in given.calibration),
        units=_units(graph, cells),
        costs={name: _range(table) for name, table in costs.items()},
        uniforms=_uniforms(cells, costs, resolved),
        budgets=tuple(
            BudgetFound(text=b.text, cost=b.cost, limit=limits.get(b.text)) for b in budgets
        ),
        infeasible=_infeasible(cells, costs, resolved, spec.risk),
        untimed=untimed,
        of_kernels=any(t.provenance.startswith("measured ") for t in costs.values()),
        device=hardware.device,
        left_out=(
            *(f"{part.name}: {part.reason}" for part in graph.unsearched),
            *hardware.left_out,
        ),
    )


def _units(graph: LayerGraph, cells: Cells) -> tuple[UnitChoices, ...]:
    return tuple(
        UnitChoices(
            unit=unit.name,
            layers=unit.layers,
            weights=sum(layer.num_weights for layer in graph.stored_layers(unit)),
            schemes=tuple(map(str, schemes)),
        )
        for unit, schemes in zip(graph.units, cells.schemes, strict=True)
    )


def _range(table: CostTable) -> CostRange:
    begins = table.cells.offsets[:-1]
    return CostRange(
        label=cost_label(table),
        unit=table.unit,
        least=table.fixed + float(np.minimum.reduceat(table.values, begins).sum()),
        most=table.fixed + float(np.maximum.reduceat(table.values, begins).sum()),
        baseline=table.baseline,
    )


def _nothing(cells: Cells) -> SensitivityTable:
    zeros = np.zeros(len(cells))
    return SensitivityTable(metric="none", cells=cells, values=zeros, stderr=zeros)


def _uniforms(
    cells: Cells, costs: Mapping[str, CostTable], budgets: Sequence[Budget]
) -> tuple[UniformTotals, ...]:
    problem = Problem(sensitivity=_nothing(cells), costs=costs, budgets=())
    memory, found = costs["memory"], []
    for scheme, allocation in problem.uniform().items():
        totals = problem.totals(allocation.choice(cells))
        bits = 8 * (totals["memory"] - memory.fixed) / max(memory.weights, 1)
        breaks = tuple(b.text for b in budgets if totals[b.cost] > b.limit)
        found.append(UniformTotals(scheme=str(scheme), bits=bits, totals=totals, breaks=breaks))
    return tuple(found)


def _infeasible(
    cells: Cells, costs: Mapping[str, CostTable], budgets: Sequence[Budget], risk: float | None
) -> str:
    try:
        optimum(_nothing(cells), costs, budgets, risk_of(risk, costs, [b.cost for b in budgets]))
    except InfeasibleError as error:
        return str(error)
    return ""


def main() -> None:
    """Answer one job on standard input with JSON on standard output: a dry run, or its error.

    The database is that of MPQ_STORAGE.
    """
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)  # what a user's modules print is no answer
        json.dump(_answer(json.load(sys.stdin)), answer)


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    try:
        with open_store(None) as store:
            return {"found": asdict(dry_run(parse_job(job), store))}
    except MpqError as error:
        return {"error": {"code": error.code, "message": str(error)}}


if __name__ == "__main__":
    main()
