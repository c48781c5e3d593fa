"""Which units reinforce or cancel each other in the chosen allocation."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpq.additivity import Additivity, additivity
from mpq.dashboard.colours import EFFECTS
from mpq.dashboard.loaded import LoadedRun

_MOST_DRAWN = 400  # units: a larger map has more cells than a screen has pixels


def pairs_of(run: LoadedRun) -> Additivity | None:
    """Return how the parts of the chosen allocation add up, None without responses."""
    chosen = run.chosen
    if chosen is None or chosen.allocation is None or run.problem.responses is None:
        return None
    return additivity(run.problem, chosen.allocation, run.evaluations)


def map_of(found: Additivity) -> dict[str, Any] | None:
    """Return the figure of the pairs, of the units with the strongest where there are many."""
    if found.matrix is None:
        return None
    matrix, kept = found.matrix, np.arange(len(found.units))
    if len(kept) > _MOST_DRAWN:
        kept = np.sort(np.argsort(-np.abs(matrix).max(axis=1))[:_MOST_DRAWN])
        matrix = matrix[np.ix_(kept, kept)]
    most = float(np.abs(matrix).max(initial=0.0)) or 1.0
    trace = {
        "type": "heatmap",
        "z": matrix,
        "x": kept,
        "y": kept,
        "colorscale": [list(stop) for stop in EFFECTS],
        "zmin": -most,
        "zmax": most,
        "colorbar": {"title": {"text": "loss"}, "exponentformat": "power", "thickness": 12},
        "hovertemplate": "unit %{x} and unit %{y}: %{z:.2e}<extra></extra>",
    }
    axis = {"title": {"text": "unit, in network order"}}
    layout = {"xaxis": axis, "yaxis": {**axis, "autorange": "reversed"}}
    return {"data": [trace], "layout": layout}
