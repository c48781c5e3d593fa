"""What was measured along a minimised cost, cheapest first: which candidates meet the limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from mpq.core.evaluation import CHOSEN, Evaluation
from mpq.core.jobs import JobSpec
from mpq.core.limits import Limit
from mpq.core.problem import Allocation, Problem
from mpq.core.provenance import cost_label
from mpq.core.quantities import quantity
from mpq.result import SearchResult
from mpq.stated import stated
from solvers.risk import at_risk


@dataclass(frozen=True, slots=True, kw_only=True)
class Along:
    """One measured allocation; `totals` of what is minimised, `metrics` of what is limited."""

    candidate: str
    chosen: bool
    totals: Mapping[str, str]
    meets: bool
    metrics: Mapping[str, float]


def along(
    spec: JobSpec, problem: Problem, evaluations: Sequence[Evaluation], chosen: Allocation
) -> list[Along]:
    """Return each allocation that was measured on calibration data; nothing without `minimise`."""
    measured = [e for e in evaluations if e.split == "calibration"]
    limits = _with_bases([Limit.parse(text) for text in spec.limits], measured)
    weights = spec.minimised
    rows: dict[Allocation, tuple[float, Along]] = {}
    for e in measured if weights else []:
        if not e.allocation or e.candidate == CHOSEN or e.allocation in rows:
            continue
        choice = e.allocation.choice(problem.cells)
        totals = {cost: problem.total(cost, choice) for cost in weights}
        metrics = {limit.metric: e.metrics.get(limit.metric, math.nan) for limit in limits}
        row = Along(
            candidate=e.candidate,
            chosen=e.allocation == chosen,
            totals={
                cost_label(problem.costs[c]): quantity(t, problem.costs[c].unit)
                for c, t in totals.items()
            },
            meets=all(limit.met(metrics[limit.metric]) for limit in limits),
            metrics=metrics,
        )
        rows[e.allocation] = (math.fsum(weights[c] * t for c, t in totals.items()), row)
    return [row for _, row in sorted(rows.values(), key=lambda pair: pair[0])]


def given_problem(result: SearchResult) -> Problem:
    """Return the problem under the budgets that were given; a minimised cost has none."""
    spec = result.store.run(result.run_id).spec
    if spec.minimise is None:
        return result.asked()
    return at_risk(stated(result.problem, spec.budgets), result.risk)


def _with_bases(limits: Sequence[Limit], measured: Sequence[Evaluation]) -> list[Limit]:
    whole = {name: value for e in measured if not e.allocation for name, value in e.metrics.items()}
    return [limit.from_base(whole.get(limit.metric, math.nan)) for limit in limits]


def along_table(rows: Sequence[Along]) -> Table:
    """Return the rows for a terminal."""
    costs, metrics = list(rows[0].totals), list(rows[0].metrics)
    table = Table("measured along " + " and ".join(costs), box=None, header_style="bold")
    for column in (*costs, *metrics):
        table.add_column(column, justify="right")
    table.add_column("meets the limits")
    for row in rows:
        table.add_row(
            Text(row.candidate, "bold" if row.chosen else ""),
            *row.totals.values(),
            *(f"{value:.4f}" for value in row.metrics.values()),
            ("yes, chosen" if row.chosen else "yes") if row.meets else "no",
        )
    return table
