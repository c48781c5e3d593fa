"""The HTML page of one run: a single file with its plots inside, no network needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mpq.along import along, given_problem
from mpq.core.deployment import DEPLOYED
from mpq.core.errors import InvalidInputError
from mpq.core.evaluation import DIVERGENCE_NAMES, Evaluation, in_order, without_trials
from mpq.core.joint import joint_lines
from mpq.core.layers import LayerGraph
from mpq.core.problem import Allocation, Problem, Solution
from mpq.core.provenance import cost_label
from mpq.core.quantities import quantity, with_error
from mpq.core.stability import SURE
from mpq.core.tables import CostTable
from mpq.figures import plots
from mpq.format_shares import format_shares
from mpq.result import SearchResult
from mpq.stability import usual_draws
from mpq.store.store import Store


def check_writable(path: Path) -> None:
    """Raise InvalidInputError where no page can be written at `path`."""
    folder = path.parent
    if not folder.is_dir():
        raise InvalidInputError("report", f"cannot write {path}: there is no folder {folder}")
    if path.is_dir():
        raise InvalidInputError("report", f"cannot write {path}: it is a folder")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise InvalidInputError("report", f"cannot write {path}: permission denied")


def write_report(store: Store, run_id: str, path: Path) -> Path:
    """Write the page of a finished run and return its path."""
    import jinja2

    check_writable(path)
    result = SearchResult(store, run_id)
    record = store.run(run_id)
    loader = jinja2.PackageLoader("mpq", "templates")
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("report.html.j2")
    page = template.render(
        record=record,
        solution=result.solution,
        budgets=_budget_rows(result.problem, result.solution),
        prices=result.shadow_prices(),
        divergence=DIVERGENCE_NAMES[result.evaluation[0].divergence],
        evaluations=[(e, _fits(result, e)) for e in in_order(without_trials(result.evaluation))],
        along=along(record.spec, result.problem, result.evaluation, result.unit_allocation),
        graph=result.graph,
        coverage=f"{result.graph.coverage:.1%}",
        size=quantity(result.graph.native_bytes, "bytes"),
        rows=_unit_rows(result.graph, result.problem, result.unit_allocation),
        formats=format_shares(result.graph, result.unit_allocation),
        deployed=[line for made in result.deployments for line in made.lines()],
        events=[event for event in store.events(run_id) if event.kind != DEPLOYED],
        plots=plots(result),
        additivity=result.additivity(),
        chosen=result.unit_allocation,
        stability=result.stability() if usual_draws(result.problem) else None,
        sure=f"{SURE:.0%}",
        sensitivity=result.problem.sensitivity.metric,
        costs=[cost_label(table) for table in result.problem.costs.values()],
    )
    path.write_text(page, encoding="utf-8")
    return path


def _fits(result: SearchResult, evaluation: Evaluation) -> bool:
    return bool(evaluation.allocation) and given_problem(result).fits(evaluation.allocation)


def _budget_rows(problem: Problem, solution: Solution) -> list[dict[str, str]]:
    limits = {budget.cost: budget for budget in solution.budgets}
    assert solution.allocation is not None
    choice = solution.allocation.choice(problem.cells)
    totals, upper = solution.totals or {}, solution.quantiles or {}
    return [
        _budget_row(table, limits, with_error(totals[name], table.half_width(choice), table.unit))
        | {"pairs": "; ".join(joint_lines(table, choice, most=0)[:1])}
        | {"quantile": quantity(upper[name], table.unit) if name in upper else ""}
        for name, table in problem.costs.items()
    ]


def _budget_row(table: CostTable, limits: dict[str, Any], total: str) -> dict[str, str]:
    budget = limits.get(table.name)
    return {
        "cost": cost_label(table),
        "total": total,
        "limit": "-" if budget is None else quantity(budget.limit, table.unit),
        "text": "" if budget is None else budget.text,
        "baseline": quantity(table.baseline, table.unit) if table.baseline > 0 else "-",
        "provenance": table.provenance,
    }


def _unit_rows(graph: LayerGraph, problem: Problem, allocation: Allocation) -> list[dict[str, Any]]:
    layers = graph.by_name
    rows = []
    for unit in graph.units:
        cell = (unit.name, allocation[unit.name])
        number = problem.cells.index(cell)
        shapes = dict.fromkeys("×".join(map(str, layers[n].weight_shape)) for n in unit.layers)
        rows.append(
            {
                "unit": unit.name,
                "reason": unit.reason,
                "shape": ", ".join(shapes),
                "scheme": str(cell[1]),
                "loss": f"{problem.sensitivity.values[number]:.2e}",
                "error": f"{problem.sensitivity.stderr[number]:.0e}",
                "costs": [
                    with_error(t.values[number], t.half_width([number]), t.unit)
                    for t in problem.costs.values()
                ],
            }
        )
    return rows
