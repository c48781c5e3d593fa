"""How sensitive each unit is to each scheme, by every metric that scored the run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpq.core.tables import Cells, Floats, SensitivityTable
from mpq.dashboard.colours import CIVIDIS
from mpq.dashboard.loaded import LoadedRun
from mpq.dashboard.plotted import verbatim
from mpq.store.store import Store

_STRONGEST = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragile:
    """A unit by the loss of its smallest scheme."""

    unit: str
    scheme: str
    loss: float
    stderr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityView:
    """The scores of one metric as a grid; `agreement` is Spearman's rank correlation of metrics.

    `losses[s][u]` is the loss of scheme s in unit u (NaN: not a choice), `errors` one standard
    error of it.
    """

    metric: str
    metrics: tuple[str, ...]
    units: tuple[str, ...]
    schemes: tuple[str, ...]
    losses: Floats
    errors: Floats
    fragile: tuple[Fragile, ...]
    agreement: Mapping[str, Mapping[str, float]]


def sensitivity_view(store: Store, run: LoadedRun, metric: str | None) -> SensitivityView:
    """Return the scores by one metric (None: the one that chose)."""
    names = tuple(store.scored_metrics(run.id))
    tables = {name: store.sensitivity(run.id, name) for name in names}
    own = run.problem.sensitivity.metric
    shown = metric if metric in tables else own if own in tables else names[0]
    table = tables[shown]
    schemes = list(dict.fromkeys(scheme for of in table.cells.schemes for scheme in of))
    schemes.sort(key=lambda s: (s.weights.bits, s.activations.bits, str(s)))
    rows = {scheme: row for row, scheme in enumerate(schemes)}
    losses = np.full((len(schemes), len(table.cells.units)), np.nan)
    errors = np.full_like(losses, np.nan)
    for number, (unit, scheme) in enumerate(table.cells):
        place = rows[scheme], table.cells.unit_number(unit)
        losses[place], errors[place] = table.values[number], table.stderr[number]
    return SensitivityView(
        metric=shown,
        metrics=names,
        units=table.cells.units,
        schemes=tuple(map(str, schemes)),
        losses=losses,
        errors=errors,
        fragile=_fragile(table),
        agreement=_agreement(tables),
    )


def _fragile(table: SensitivityTable) -> tuple[Fragile, ...]:
    """Return the units that lose most in their worst scheme."""
    offsets = table.cells.offsets
    worst = [
        int(start) + int(np.argmax(table.values[start:stop]))
        for start, stop in itertools.pairwise(offsets)
    ]
    order = sorted(range(len(worst)), key=lambda unit: -table.values[worst[unit]])
    return tuple(
        Fragile(
            unit=table.cells.units[unit],
            scheme=str(table.cells.schemes[unit][worst[unit] - int(offsets[unit])]),
            loss=float(table.values[worst[unit]]),
            stderr=float(table.stderr[worst[unit]]),
        )
        for unit in order[:_STRONGEST]
    )


def _agreement(tables: Mapping[str, SensitivityTable]) -> dict[str, dict[str, float]]:
    if len(tables) < 2:
        return {}
    ranks = {name: _ranks(table.values) for name, table in tables.items()}
    alike: Cells = next(iter(tables.values())).cells
    named = [name for name, table in tables.items() if table.cells == alike]
    return {a: {b: float(np.corrcoef(ranks[a], ranks[b])[0, 1]) for b in named} for a in named}


def _ranks(values: Floats) -> Floats:
    """Return ranks, of equal values their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def heat_map(view: SensitivityView) -> dict[str, Any]:
    """Return the figure of the grid, on a logarithmic scale."""
    shown = np.where(view.losses > 0, view.losses, np.nan)
    logs = np.log10(shown)
    texts = [
        [
            "not a choice"
            if np.isnan(loss)
            else f"{verbatim(unit)}<br>{scheme}: {loss:.3g} ± {1.96 * error:.1g}"
            for unit, loss, error in zip(view.units, losses, errors, strict=True)
        ]
        for scheme, losses, errors in zip(view.schemes, view.losses, view.errors, strict=True)
    ]
    trace = {
        "type": "heatmap",
        "z": logs,
        "x": list(range(len(view.units))),
        "y": list(view.schemes),
        "text": texts,
        "hovertemplate": "%{text}<extra></extra>",
        "colorscale": [[n / (len(CIVIDIS) - 1), c] for n, c in enumerate(CIVIDIS)],
        "colorbar": {"title": {"text": "log10 of loss"}, "thickness": 12},
        "hoverongaps": False,
    }
    layout = {
        "xaxis": {"title": {"text": "unit, in network order"}},
        "yaxis": {"type": "category"},
    }
    return {"data": [trace], "layout": layout}
