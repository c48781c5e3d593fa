"""From a workload to a run whose costs are known and whose budgets can be met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from mpq.auto import optimum
from mpq.core.problem import Budget, BudgetText
from mpq.core.protocols import Executor
from mpq.core.risk import risk_of
from mpq.core.tables import CostTable, SensitivityTable
from mpq.costing import Hardware
from mpq.making import make_ahead
from mpq.nn.batches import Batch
from mpq.nn.transforms import reports_of
from mpq.nn.workload import Workload
from mpq.progress import Progress
from mpq.scoring import search_ranges
from mpq.store.store import Store
from mpq.tasks import Workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run before anything is scored."""

    workers: Workers
    costs: Mapping[str, CostTable]
    budgets: tuple[Budget, ...]
    run_id: str
    risk: float | None


def prepare(
    budgets: Sequence[BudgetText],
    hardware: Hardware,
    workload: Workload,
    sample: Batch,
    executor: Executor,
    store: Store,
    run_id: str,
    progress: Progress,
    risk: float | None = None,
) -> Prepared:
    """Keep the network and what choices cost, make what takes long, and get workers ready.

    Clipping ranges are searched and weights rounded with calibration data once, here.

    Raises InfeasibleError where no choice meets the budgets, with probability `risk`
    (None: 0.95 where times are measured).
    """
    store.put_graph(run_id, workload.graph)
    if workload.model.training:
        store.log(run_id, "mode", "the model came in training mode; it was scored in eval mode")
    for report in reports_of(workload.model):
        for line in report.lines:
            store.log(run_id, "transform", line)
    for reason in hardware.left_out:
        store.log(run_id, "left out", reason)
    costs = hardware.tables(workload.graph, workload.cells)
    for kind, line in hardware.remarks(costs):
        store.log(run_id, kind, line)
    costs |= hardware.whole_network(costs, workload, sample, partial(store.log, run_id))
    for table in costs.values():
        store.put_cost(run_id, table)
    resolved = tuple(budget.resolve(costs) for budget in budgets)
    zeros = np.zeros(len(workload.cells))
    nothing = SensitivityTable(metric="none", cells=workload.cells, values=zeros, stderr=zeros)
    risk = risk_of(risk, costs, [budget.cost for budget in resolved])
    optimum(nothing, costs, resolved, risk)
    for budget in resolved:
        baseline = costs[budget.cost].baseline
        if budget.limit >= baseline:
            note = f"{budget.text}: not binding, the unquantized network has {baseline:.6g}"
            store.log(run_id, "budget", note)
    search_ranges(workload, progress)
    make_ahead(workload, progress)
    workers = Workers.of(workload, executor, store, progress)
    return Prepared(workers=workers, costs=costs, budgets=resolved, run_id=run_id, risk=risk)
