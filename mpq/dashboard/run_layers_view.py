"""The layers of one run: what each is, takes and costs, and why others were not searched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mpq.core.latency import REST_INCLUDED
from mpq.core.provenance import cost_label
from mpq.core.quantities import quantity, with_error
from mpq.dashboard.loaded import LoadedRun


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """One searched layer; `share` of all parameters, `time_share` of its unit in the latency.

    `loss` is that of its unit in the chosen scheme, with one standard error.
    """

    layer: str
    unit: str
    kind: str
    shape: str
    share: float
    time_share: float | None
    scheme: str
    loss: float
    stderr: float
    costs: tuple[str, ...]
    is_pinned: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedRow:
    """A tensor that was not searched, and why."""

    name: str
    elements: int
    share: float
    size: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersView:
    """All layers of a run; `coverage` is the share of the parameters that was searched."""

    costs: tuple[str, ...]
    layers: tuple[LayerRow, ...]
    skipped: tuple[SkippedRow, ...]
    coverage: float
    size: str
    time_note: str


def layers_view(run: LoadedRun) -> LayersView:
    """Return the layers of a run with what the chosen allocation gives them."""
    graph, problem = run.graph, run.problem
    assert run.chosen is not None
    assert run.chosen.allocation is not None
    allocation, layers = run.chosen.allocation, graph.by_name
    elements = graph.searched_weights + sum(part.elements for part in graph.unsearched)
    times = _time_shares(run)
    rows = []
    for unit in graph.units:
        cell = (unit.name, allocation[unit.name])
        number = problem.cells.index(cell)
        costs = tuple(
            with_error(float(t.values[number]), t.half_width([number]), t.unit)
            for t in problem.costs.values()
        )
        for name in unit.layers:
            layer = layers[name]
            rows.append(
                LayerRow(
                    layer=name,
                    unit=unit.name,
                    kind=layer.kind,
                    shape="×".join(map(str, layer.weight_shape)),
                    share=0.0 if layer.source else layer.num_weights / max(elements, 1),
                    time_share=times.get(unit.name),
                    scheme=str(cell[1]),
                    loss=float(problem.sensitivity.values[number]),
                    stderr=float(problem.sensitivity.stderr[number]),
                    costs=costs,
                    is_pinned=len(problem.cells.schemes[problem.cells.unit_number(unit.name)]) == 1,
                )
            )
    order = {layer.name: place for place, layer in enumerate((*graph.layers, *graph.apart))}
    return LayersView(
        costs=tuple(cost_label(table) for table in problem.costs.values()),
        layers=tuple(sorted(rows, key=lambda row: order[row.layer])),
        skipped=tuple(
            SkippedRow(
                name=part.name,
                elements=part.elements,
                share=part.elements / max(elements, 1),
                size=quantity(part.bytes, "bytes"),
                reason=part.reason,
            )
            for part in sorted(graph.unsearched, key=lambda part: -part.bytes)
        ),
        coverage=graph.coverage,
        size=quantity(graph.native_bytes, "bytes"),
        time_note=_time_note(run),
    )


def _time_shares(run: LoadedRun) -> Mapping[str, float]:
    """Return the share of each unit in the latency of the chosen allocation."""
    table = run.problem.costs.get("latency")
    if table is None or run.chosen is None or run.chosen.allocation is None:
        return {}
    choice = run.chosen.allocation.choice(run.problem.cells)
    whole = table.total(choice)
    own = table.values[choice]
    return {
        unit: float(seconds) / whole
        for unit, seconds in zip(run.problem.cells.units, own, strict=True)
        if whole > 0
    }


def _time_note(run: LoadedRun) -> str:
    table = run.problem.costs.get("latency")
    if table is None:
        return "This run has no latency table."
    note = f"Shares of time are those of a unit's kernels in the latency ({table.provenance})"
    if REST_INCLUDED in table.provenance:
        note += "; the rest of the network is in none of them"
    return f"{note}."
