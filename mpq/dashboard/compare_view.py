"""Runs side by side: what of them differs, in numbers, layers and frontiers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mpq.comparison import Comparison, compare_runs
from mpq.core.evaluation import CHOSEN, DIVERGENCE_NAMES
from mpq.core.formats import Scheme
from mpq.core.frontier import Frontier
from mpq.dashboard import colours
from mpq.dashboard.masking import masked_text
from mpq.dashboard.plotted import Figure, amount, axis_scale, verbatim
from mpq.dashboard.strip import Strip, strip
from mpq.dashboard.views import finite
from mpq.store.store import Store

MOST_RUNS = 6
ROWS = 200  # of layers on one page
Shown = Literal["differing", "all"]
_PLOT_PX, _LEGEND_PX = 330, 22
_TIMES = 10.0  # a ratio from here on is no percentage
_COUNTED = {"predicted": "predicted loss", "gap": "gap to the proven bound"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRun:
    """A column: a run with its colour and the bits of its layers."""

    id: str
    name: str
    colour: str
    strip: Strip


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRow:
    """A setting that is not equal, as each run has it."""

    label: str
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberRow:
    """A number of each run, None where it lacks it; `changes` are against the first run."""

    label: str
    values: tuple[float | None, ...]
    texts: tuple[str, ...]
    changes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """A layer with the scheme that each run gave it, "" where it was not searched."""

    layer: str
    schemes: tuple[str, ...]
    differs: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareView:
    """Everything that the comparison shows but its plot; `rows` are one page of `wanted`."""

    runs: tuple[ComparedRun, ...]
    models: tuple[str, ...]
    settings: tuple[TextRow, ...]
    totals: tuple[NumberRow, ...]
    measured: tuple[NumberRow, ...]
    same: int
    differing: int
    rows: tuple[LayerRow, ...]
    wanted: int
    page: int
    pages: int
    costs: Mapping[str, str]


def compare_view(
    store: Store, refs: Sequence[str], shown: Shown = "differing", page: int = 1
) -> CompareView:
    """Compare runs; raises InvalidInputError as `compare_runs` does."""
    found = compare_runs(store, refs)
    schemes = [_layers(store, run_id) for run_id in found.runs]
    order = tuple(dict.fromkeys(layer for one in schemes for layer in one))
    wanted = order if shown == "all" else tuple(name for name in order if name in found.layers)
    pages = max(math.ceil(len(wanted) / ROWS), 1)
    page = min(max(page, 1), pages)
    models = [store.run(run_id).spec.model for run_id in found.runs]
    return CompareView(
        models=tuple(dict.fromkeys(models)),
        runs=tuple(
            ComparedRun(
                id=run_id,
                name=name,
                colour=colour,
                strip=strip(order, one),
            )
            for run_id, name, colour, one in zip(
                found.runs, found.names, colours.RUNS, schemes, strict=False
            )
        ),
        settings=tuple(
            TextRow(label=key, texts=tuple(map(_setting, values)))
            for key, values in found.settings.items()
        ),
        totals=tuple(_totals(found)),
        measured=tuple(_measured(found)),
        same=found.same,
        differing=len(found.layers),
        rows=tuple(
            LayerRow(
                layer=name,
                schemes=tuple(str(one[name]) if name in one else "" for one in schemes),
                differs=name in found.layers,
            )
            for name in wanted[(page - 1) * ROWS : page * ROWS]
        ),
        wanted=len(wanted),
        page=page,
        pages=pages,
        costs={
            name: found.units_of_measure.get(name, "")
            for name in found.totals
            if name not in _COUNTED
        },
    )


def _layers(store: Store, run_id: str) -> dict[str, Scheme]:
    """Return the chosen scheme of each searched layer in network order."""
    chosen, graph = dict(store.solutions(run_id))[CHOSEN].allocation, store.graph(run_id)
    assert chosen is not None
    found = {layer: chosen[unit.name] for unit in graph.units for layer in unit.layers}
    merged = graph.merged(found)
    shown = (layer.name for layer in (*graph.layers, *graph.apart))
    return {name: merged[name] for name in shown if name in merged}


def _setting(value: Any) -> str:
    if value is None or value == "" or value == () or value == {}:
        return "–"
    if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        return masked_text(", ".join(value))
    return masked_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _totals(found: Comparison) -> list[NumberRow]:
    rows = []
    for name, values in found.totals.items():
        if name == "gap":
            texts = tuple("–" if finite(v) is None else f"{100 * v:.3g} %" for v in values)
            changes = ("",) * len(values)
        else:
            unit = found.units_of_measure.get(name, "")
            texts = tuple(amount(v, unit) if unit else _number(v) for v in values)
            changes = _changes(values)
        label = _COUNTED.get(name, name)
        numbers = tuple(map(finite, values))
        rows.append(NumberRow(label=label, values=numbers, texts=texts, changes=changes))
    return rows


def _measured(found: Comparison) -> list[NumberRow]:
    rows = []
    for what, values in found.measured.items():
        name, _, split = what.rpartition(" ")
        errors = found.stderr[what]
        texts = (
            _number(v) + (f" ± {e:.2g}" if finite(e) is not None and finite(v) is not None else "")
            for v, e in zip(values, errors, strict=True)
        )
        rows.append(
            NumberRow(
                label=f"{DIVERGENCE_NAMES.get(name, name)}, {split.replace('_', '-')} batches",
                values=tuple(map(finite, values)),
                texts=tuple(texts),
                changes=_changes(values),
            )
        )
    return rows


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "–"


def _changes(values: Sequence[float]) -> tuple[str, ...]:
    """Return how much each value is above or below the first, "" where that says nothing."""
    first = values[0]
    if not math.isfinite(first) or first == 0:
        return ("",) * len(values)
    return ("", *(_change(value / first) for value in values[1:]))


def _change(ratio: float) -> str:
    if not math.isfinite(ratio):
        return ""
    return f"× {ratio:.3g}" if ratio >= _TIMES else f"{100 * (ratio - 1):+.3g} %"


def frontiers_figure(
    view: CompareView, frontiers: Mapping[str, Frontier], cost: str
) -> Figure | None:
    """Draw the stored frontiers of one cost, by run id, over each other; None without any."""
    unit = view.costs[cost]
    chosen = {row.label: row.values for row in view.totals}
    ends = [v for f in frontiers.values() for s in f.solutions if (v := (s.totals or {}).get(cost))]
    ends += [v for v in chosen[cost] if v is not None]
    if not frontiers or not ends:
        return None
    scale, size = axis_scale(max(ends), unit)
    data, told = [], []
    for number, run in enumerate(view.runs):
        label = verbatim(_named(run))
        hover = f"%{{fullData.name}}<br>%{{x:.4g}} {scale}<br>loss %{{y:.4g}}<extra></extra>"
        line = {"color": run.colour, "dash": colours.DASHES[number], "shape": "hv"}
        solutions = frontiers[run.id].solutions if run.id in frontiers else ()
        points = [(s.totals[cost], s.score) for s in solutions if s.totals and s.score > 0]
        if points:
            told.append(_span(run, points, unit))
        else:
            told.append(f"{_named(run)} has none")
        data.append(
            {
                "name": label,
                "x": [x / size for x, _ in points],
                "y": [y for _, y in points],
                "mode": "lines",
                "line": line,
                "legendgroup": run.id,
                "showlegend": bool(points),
                "hovertemplate": hover,
            }
        )
        total, score = chosen[cost][number], chosen["predicted loss"][number]
        is_drawn = total is not None and score is not None and score > 0
        data.append(
            {
                "name": f"{label}: chosen",
                "x": [total / size] if total is not None and is_drawn else [],
                "y": [score] if is_drawn else [],
                "mode": "markers",
                "marker": {"color": run.colour, "symbol": colours.SYMBOLS[number], "size": 12},
                "legendgroup": run.id,
                "showlegend": not points and is_drawn,
                "hovertemplate": hover,
            }
        )
    layout = {
        "xaxis": {"title": {"text": f"{verbatim(cost)}, {scale}"}},
        "yaxis": {
            "type": "log",
            "exponentformat": "power",
            "title": {"text": "predicted loss"},
        },
    }
    text = f"Predicted loss against {cost}; the marks are the chosen allocations. {'; '.join(told)}"
    height = _PLOT_PX + _LEGEND_PX * len(view.runs)
    return Figure(data=data, layout=layout, text=f"{text}.", height=height)


def _named(run: ComparedRun) -> str:
    return f"{run.name or 'search'} {run.id}"


def _span(run: ComparedRun, points: Sequence[tuple[float, float]], unit: str) -> str:
    (least, worst), (most, best) = points[0], points[-1]
    return (
        f"{_named(run)} from {worst:.3g} at {amount(least, unit)} to {best:.3g} at "
        f"{amount(most, unit)}"
    )
