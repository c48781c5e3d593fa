"""The HTML page of one run: a single file with its plots inside, no network needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from mpq.core.errors import InvalidInputError
from mpq.core.evaluation import DIVERGENCE_NAMES, Evaluation, in_order
from mpq.core.layers import LayerGraph
from mpq.core.problem import Allocation, Frontier, Problem, Solution
from mpq.core.quantities import quantity, with_error
from mpq.core.tables import CostTable
from mpq.result import SearchResult
from mpq.store.store import Store

_SCALES = {"bytes": (1e6, "MB"), "s": (1e-3, "ms"), "bitops": (1e9, "GBOPs"), "J": (1e-3, "mJ")}
# Blue to yellow: tells bits apart without red and green, and in print.
_BIT_COLOURS = "Cividis"


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
        divergence=DIVERGENCE_NAMES[result.evaluation[0].divergence],
        evaluations=[(e, _fits(result, e)) for e in in_order(result.evaluation)],
        graph=result.graph,
        coverage=f"{result.graph.coverage:.1%}",
        size=quantity(result.graph.native_bytes, "bytes"),
        rows=_unit_rows(result.graph, result.problem, result.unit_allocation),
        events=store.events(run_id),
        plots=_plots(result),
        sensitivity=result.problem.sensitivity.metric,
        costs=list(result.problem.costs),
    )
    path.write_text(page, encoding="utf-8")
    return path


def _fits(result: SearchResult, evaluation: Evaluation) -> bool:
    problem = result.problem.with_budgets(result.solution.budgets)
    return bool(evaluation.allocation) and problem.fits(evaluation.allocation)


def _plots(result: SearchResult) -> list[dict[str, str]]:
    import plotly.io

    frontiers = [name for name in result.problem.costs if name != "bops"]
    figures = [
        (f"Predicted loss against {name}", _frontier_figure(result, name)) for name in frontiers
    ]
    figures.append(("Bits of each unit, in network order", _bits_figure(result)))
    figures.append(("Predicted loss of each unit in each scheme", _heat_map(result.problem)))
    return [
        {
            "title": title,
            "html": plotly.io.to_html(
                figure,
                full_html=False,
                include_plotlyjs=number == 0,
                config={"displaylogo": False, "responsive": True},
            ),
        }
        for number, (title, figure) in enumerate(figures)
    ]


def _frontier_figure(result: SearchResult, cost: str) -> Any:
    import plotly.graph_objects as go

    table = result.problem.costs[cost]
    scale, unit = _SCALES[table.unit]
    frontier: Frontier = result.frontier(cost)
    figure = go.Figure()
    figure.add_scatter(
        x=[s.totals[cost] / scale for s in frontier.solutions if s.totals],
        y=[s.score for s in frontier.solutions],
        mode="lines+markers",
        name="exact frontier (additive score)",
    )
    uniform = result.problem.uniform()
    points = {str(s): a.choice(result.problem.cells) for s, a in uniform.items()}
    figure.add_scatter(
        x=[result.problem.total(cost, choice) / scale for choice in points.values()],
        y=[result.problem.score(choice) for choice in points.values()],
        mode="markers+text",
        text=list(points),
        textposition="top center",
        marker={"symbol": "square-open", "size": 9},
        name="uniform schemes",
    )
    choice = result.unit_allocation.choice(result.problem.cells)
    figure.add_scatter(
        x=[result.problem.total(cost, choice) / scale],
        y=[result.problem.score(choice)],
        mode="markers",
        marker={"symbol": "star", "size": 15},
        name="chosen",
    )
    for budget in result.solution.budgets:
        if budget.cost == cost:
            figure.add_vline(x=budget.limit / scale, line_dash="dash", annotation_text="budget")
    figure.update_layout(xaxis_title=f"{cost} ({unit})", yaxis_title="predicted loss")
    figure.update_yaxes(type="log", exponentformat="power")
    return _styled(figure)


def _bits_figure(result: SearchResult) -> Any:
    import plotly.graph_objects as go

    names = [unit.name for unit in result.graph.units]
    schemes = [result.unit_allocation[name] for name in names]
    bits = [scheme.weights.bits for scheme in schemes]
    figure = go.Figure(
        go.Bar(
            x=list(range(len(names))),
            y=bits,
            customdata=[[n, str(s)] for n, s in zip(names, schemes, strict=True)],
            hovertemplate="%{customdata[0]}<br>%{customdata[1]}<extra></extra>",
            marker={"color": bits, "colorscale": _BIT_COLOURS, "cmin": 1, "cmax": 8},
        )
    )
    figure.update_layout(xaxis_title="unit, in execution order", yaxis_title="weight bits")
    return _styled(figure)


def _heat_map(problem: Problem) -> Any:
    import plotly.graph_objects as go

    schemes = list(dict.fromkeys(s for ss in problem.cells.schemes for s in ss))
    grid = np.full((len(schemes), len(problem.cells.units)), np.nan)
    for number, (unit, scheme) in enumerate(problem.cells):
        value = problem.sensitivity.values[number]
        column = problem.cells.unit_number(unit)
        grid[schemes.index(scheme), column] = np.log10(value) if value > 0 else np.nan
    figure = go.Figure(
        go.Heatmap(
            z=grid,
            x=list(range(len(problem.cells.units))),
            y=[str(s) for s in schemes],
            customdata=np.array([problem.cells.units] * len(schemes)),
            colorscale=_BIT_COLOURS,
            colorbar={"title": "log10"},
            hovertemplate="%{customdata}<br>%{y}: 10^%{z:.2f}<extra></extra>",
        )
    )
    figure.update_layout(xaxis_title="unit, in execution order")
    return _styled(figure)


def _styled(figure: Any) -> Any:
    figure.update_layout(
        template="plotly_white",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#777"},
        height=380,
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
        legend={"orientation": "h", "y": 1.12},
    )
    return figure


def _budget_rows(problem: Problem, solution: Solution) -> list[dict[str, str]]:
    limits = {budget.cost: budget for budget in solution.budgets}
    assert solution.allocation is not None
    choice = solution.allocation.choice(problem.cells)
    totals = solution.totals or {}
    return [
        _budget_row(table, limits, with_error(totals[name], table.half_width(choice), table.unit))
        for name, table in problem.costs.items()
    ]


def _budget_row(table: CostTable, limits: dict[str, Any], total: str) -> dict[str, str]:
    budget = limits.get(table.name)
    return {
        "cost": table.name,
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
