"""The plots of a run's page, as HTML that needs no network."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpq.additivity import Additivity
from mpq.core.frontier import Frontier
from mpq.core.problem import Problem
from mpq.core.provenance import cost_label
from mpq.result import SearchResult

_SCALES = {
    "bytes": (1e6, "MB"),
    "s": (1e-3, "ms"),
    "bitops": (1e9, "GBOPs"),
    "J": (1e-3, "mJ"),
    "MACs": (1e6, "MMACs"),
    "LUTs": (1e3, "kLUTs"),
}
_NOT_DRAWN = ("bops", "macs")
# Blue to yellow: tells bits apart without red and green, and in print.
_BIT_COLOURS = "Cividis"
# Blue cancels, orange reinforces: a pair that colour-blind readers tell apart.
_EFFECT_COLOURS = [(0.0, "#2166ac"), (0.5, "#f7f7f7"), (1.0, "#b35806")]


def plots(result: SearchResult) -> list[dict[str, str]]:
    """Return the title and the HTML of each plot; the first carries the plotting library."""
    import plotly.io

    costs = result.problem.costs
    frontiers = [name for name in costs if name not in _NOT_DRAWN]
    figures = [
        (f"Predicted loss against {cost_label(costs[name])}", _frontier_figure(result, name))
        for name in frontiers
    ]
    if {"memory", "latency"} <= set(frontiers):
        figures.append(("Predicted loss within both budgets", _surface_figure(result)))
    figures.append(("Bits of each unit, in network order", _bits_figure(result)))
    figures.append(("Predicted loss of each unit in each scheme", _heat_map(result.problem)))
    found = result.additivity()
    if found.matrix is not None:
        figures.append(("Pairs of units that reinforce or cancel", _pairs_figure(found)))
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
    figure.update_layout(xaxis_title=f"{cost_label(table)}, {unit}", yaxis_title="predicted loss")
    figure.update_yaxes(type="log", exponentformat="power")
    return _styled(figure)


def _surface_figure(result: SearchResult) -> Any:
    import plotly.graph_objects as go

    found = result.surface()
    scaled = [_SCALES[result.problem.costs[cost].unit] for cost in found.costs]
    (x, x_unit), (y, y_unit) = (
        (limits / scale, unit) for limits, (scale, unit) in zip(found.limits, scaled, strict=True)
    )
    scores = np.array([[np.nan if s is None else s.score for s in row] for row in found.solutions])
    figure = go.Figure(
        go.Heatmap(
            x=x,
            y=y,
            z=np.log10(np.where(scores > 0, scores, np.nan)).T,
            customdata=scores.T,
            colorscale=_BIT_COLOURS,
            reversescale=True,
            colorbar={"title": "log10"},
            hovertemplate=(
                f"{found.costs[0]} <= %{{x:.4g}} {x_unit}<br>{found.costs[1]} <= %{{y:.4g}} "
                f"{y_unit}<br>predicted loss %{{customdata:.3g}}<extra></extra>"
            ),
        )
    )
    totals = result.solution.totals or {}
    figure.add_scatter(
        x=[totals[found.costs[0]] / scaled[0][0]],
        y=[totals[found.costs[1]] / scaled[1][0]],
        mode="markers",
        marker={"symbol": "star", "size": 15, "color": "#d95f02"},
        name="chosen",
    )
    names = [cost_label(result.problem.costs[cost]) for cost in found.costs]
    figure.update_layout(
        xaxis_title=f"{names[0]} budget, {x_unit}",
        yaxis_title=f"{names[1]} budget, {y_unit}; blank: nothing fits",
    )
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


def _pairs_figure(found: Additivity) -> Any:
    import plotly.graph_objects as go

    assert found.matrix is not None
    places = list(range(len(found.units)))
    names = np.array(found.units, dtype=object)
    figure = go.Figure(
        go.Heatmap(
            z=found.matrix,
            x=places,
            y=places,
            customdata=np.stack(np.broadcast_arrays(names[:, None], names[None, :]), axis=-1),
            colorscale=_EFFECT_COLOURS,
            zmid=0.0,
            colorbar={"title": "loss", "exponentformat": "power"},
            hovertemplate="%{customdata[0]}<br>%{customdata[1]}<br>%{z:.2e}<extra></extra>",
        )
    )
    figure.update_layout(
        xaxis_title="unit, in execution order (orange: reinforce, blue: cancel)",
        yaxis={"autorange": "reversed"},
    )
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
