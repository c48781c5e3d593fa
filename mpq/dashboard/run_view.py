"""The overview of one run: what can be moved, where the answers lie, what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mpq.core.errors import InvalidInputError
from mpq.core.evaluation import CHOSEN, DIVERGENCE_NAMES, UNIFORM, Evaluation, without_trials
from mpq.core.layers import LayerGraph, Unit
from mpq.core.problem import Problem
from mpq.core.provenance import cost_label
from mpq.core.quantities import quantity
from mpq.core.tables import CostTable
from mpq.dashboard import colours
from mpq.dashboard.loaded import LoadedRun

Totals = Sequence[tuple[Mapping[str, float], float]]
_FIRST = ("memory", "latency")  # costs that are shown first


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """A cost that a budget can be set on: `least` and `most` are what allocations reach."""

    cost: str
    label: str
    unit: str
    least: float
    most: float
    least_text: str
    most_text: str
    limit: float | None
    provenance: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitView:
    """One unit in network order; `share` is its part of the searched weights."""

    name: str
    layers: tuple[str, ...]
    reason: str
    shape: str
    share: float
    schemes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PaletteView:
    """A scheme with its colour."""

    scheme: str
    bits: float
    colour: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """An allocation by its totals and its loss: predicted, and measured with its error."""

    name: str
    totals: Mapping[str, float]
    predicted: float | None
    measured: float | None = None
    stderr: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """Everything that the first page of a run draws."""

    knobs: tuple[Knob, ...]
    palette: tuple[PaletteView, ...]
    units: tuple[UnitView, ...]
    frontiers: Mapping[str, tuple[Point, ...]]
    uniforms: tuple[Point, ...]
    measured: tuple[Point, ...]
    divergence: str
    metric: str


def overview(run: LoadedRun, frontiers: Mapping[str, Totals]) -> Overview:
    """Return the overview of a run; `frontiers` are the points of the stored ones by cost."""
    problem, schemes = run.problem, run.palette
    return Overview(
        knobs=_knobs(run),
        palette=tuple(
            PaletteView(
                scheme=str(scheme),
                bits=scheme.weights.bits,
                colour=colours.at(place / max(len(schemes) - 1, 1)),  # each one of its own
            )
            for place, scheme in enumerate(schemes)
        ),
        units=units(run.graph, problem),
        frontiers={cost: _frontier_points(found) for cost, found in frontiers.items()},
        uniforms=_uniform_points(problem),
        measured=measured_points(problem, run.evaluations),
        divergence=_divergence(run.evaluations),
        metric=problem.sensitivity.metric,
    )


def _knobs(run: LoadedRun) -> tuple[Knob, ...]:
    chosen, problem = run.chosen, run.problem
    limits = {} if chosen is None else {b.cost: b.limit for b in chosen.budgets}
    place = {name: number for number, name in enumerate(_FIRST)}
    names = sorted(
        problem.costs, key=lambda name: (name not in limits, place.get(name, len(place)), name)
    )
    return tuple(_knob(problem, problem.costs[name], limits.get(name)) for name in names)


def _knob(problem: Problem, table: CostTable, limit: float | None) -> Knob:
    begins = problem.cells.offsets[:-1]
    least = table.fixed + math.fsum(np.minimum.reduceat(table.values, begins))
    most = table.fixed + math.fsum(np.maximum.reduceat(table.values, begins))
    return Knob(
        cost=table.name,
        label=cost_label(table),
        unit=table.unit,
        least=least,
        most=max(most, limit or most),
        least_text=quantity(least, table.unit),
        most_text=quantity(max(most, limit or most), table.unit),
        limit=limit,
        provenance=table.provenance,
    )


def units(graph: LayerGraph, problem: Problem) -> tuple[UnitView, ...]:
    """Return the units of a network in its order."""
    whole, named = max(graph.searched_weights, 1), {unit.name: unit for unit in graph.units}
    layers = graph.by_name

    def weights(unit: Unit) -> int:
        return sum(layer.num_weights for layer in graph.stored_layers(unit))

    texts = {id(kind): tuple(map(str, kind)) for kind in problem.cells.kinds}

    def shape(unit: Unit) -> str:
        return ", ".join(
            dict.fromkeys("×".join(map(str, layers[n].weight_shape)) for n in unit.layers)
        )

    return tuple(
        UnitView(
            name=name,
            layers=named[name].layers,
            reason=named[name].reason,
            shape=shape(named[name]),
            share=weights(named[name]) / whole,
            schemes=texts[id(schemes)],
        )
        for name, schemes in zip(problem.cells.units, problem.cells.schemes, strict=True)
    )


def _frontier_points(found: Totals) -> tuple[Point, ...]:
    return tuple(
        Point(name=f"point {number}", totals=totals, predicted=score)
        for number, (totals, score) in enumerate(found)
    )


def _uniform_points(problem: Problem) -> tuple[Point, ...]:
    choices = {str(s): a.choice(problem.cells) for s, a in problem.uniform().items()}
    return tuple(
        Point(name=name, totals=problem.totals(choice), predicted=problem.score(choice))
        for name, choice in choices.items()
    )


def measured_points(problem: Problem, evaluations: Sequence[Evaluation]) -> tuple[Point, ...]:
    """Return what was measured on calibration data, the chosen allocation last: it is on top."""
    shown = [e for e in without_trials(evaluations) if e.allocation and e.split == "calibration"]
    points = []
    for evaluation in sorted(shown, key=lambda e: e.candidate == CHOSEN):
        try:
            totals = problem.totals(evaluation.allocation.choice(problem.cells))
        except (
            KeyError,
            InvalidInputError,
        ):  # measured only to compare with
            continue
        points.append(
            Point(
                name=evaluation.candidate.removeprefix(UNIFORM)
                if evaluation.candidate.startswith(UNIFORM)
                else evaluation.candidate,
                totals=totals,
                predicted=evaluation.predicted,
                measured=evaluation.mean,
                stderr=evaluation.stderr,
            )
        )
    return tuple(points)


def _divergence(evaluations: Sequence[Evaluation]) -> str:
    return DIVERGENCE_NAMES[evaluations[0].divergence] if evaluations else "loss"
