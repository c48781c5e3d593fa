"""Predictions beside what was really measured: loss, bytes, latency."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpq.core.deployment import Deployment
from mpq.core.evaluation import CHOSEN, DIVERGENCE_NAMES, Evaluation, in_order, without_trials
from mpq.core.quantities import quantity
from mpq.dashboard.loaded import LoadedRun

_HOVER = "%{text}<br>predicted %{x:.3g}<br>measured %{y:.3g}<extra></extra>"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRow:
    """One candidate measured on one split, beside its prediction."""

    candidate: str
    split: str
    is_chosen: bool
    predicted: float | None
    measured: float
    stderr: float
    ratio: float | None
    predicted_bytes: str
    measured_bytes: str
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChecksView:
    """All that was measured of a run; `median_ratio` is measured over predicted loss."""

    divergence: str
    rows: tuple[CheckRow, ...]
    trials: int
    median_ratio: float | None
    spread: float | None
    deployed: tuple[str, ...]
    latency: str


def checks_view(run: LoadedRun, deployments: list[Deployment]) -> ChecksView:
    """Return what was measured, the chosen allocation of each split first."""
    shown = in_order(without_trials(run.evaluations))
    ratios = sorted(ratio for e in run.evaluations if (ratio := _ratio(e)) is not None)
    middle = ratios[len(ratios) // 2] if ratios else None
    table = run.problem.costs.get("latency")
    return ChecksView(
        divergence=DIVERGENCE_NAMES[run.evaluations[0].divergence] if run.evaluations else "loss",
        rows=tuple(map(_row, shown)),
        trials=len(run.evaluations) - len(shown),
        median_ratio=middle,
        spread=_spread(ratios),
        deployed=tuple(line for made in deployments for line in made.lines()),
        latency="" if table is None else table.provenance,
    )


def _row(e: Evaluation) -> CheckRow:
    return CheckRow(
        candidate=e.candidate,
        split=e.split.replace("_", "-"),
        is_chosen=e.candidate == CHOSEN,
        predicted=e.predicted,
        measured=e.mean,
        stderr=e.stderr,
        ratio=_ratio(e),
        predicted_bytes="" if e.predicted_bytes is None else quantity(e.predicted_bytes, "bytes"),
        measured_bytes="" if e.measured_bytes is None else quantity(e.measured_bytes, "bytes"),
        metrics=e.metrics,
    )


def _ratio(e: Evaluation) -> float | None:
    if e.predicted is None or not e.predicted > 0 or not 0 < e.mean < math.inf:
        return None
    return e.mean / e.predicted


def _spread(ratios: list[float]) -> float | None:
    """Return the factor that two thirds of the ratios are within, around their median."""
    logs = sorted(abs(math.log(r / ratios[len(ratios) // 2])) for r in ratios)
    return math.exp(logs[2 * len(logs) // 3]) if len(logs) > 2 else None


def losses_figure(run: LoadedRun) -> dict[str, Any]:
    """Return measured against predicted loss, the line being where they agree."""
    traces = []
    for split, symbol in (("calibration", "circle"), ("held_out", "diamond-open")):
        found = [
            e
            for e in run.evaluations
            if e.split == split and e.predicted is not None and e.predicted > 0 and e.mean > 0
        ]
        traces.append(
            {
                "x": [e.predicted for e in found],
                "y": [e.mean for e in found],
                "error_y": {"array": [1.96 * e.stderr for e in found], "thickness": 1},
                "text": [e.candidate for e in found],
                "mode": "markers",
                "marker": {"symbol": symbol, "size": 8},
                "name": split.replace("_", "-"),
                "hovertemplate": _HOVER,
            }
        )
    numbers = [n for trace in traces for axis in ("x", "y") for n in trace[axis]]  # type: ignore[attr-defined]
    if numbers:
        ends = [min(numbers), max(numbers)]
        traces.append(
            {
                "x": ends,
                "y": ends,
                "mode": "lines",
                "name": "equal",
                "line": {"dash": "dash", "width": 1},
                "hoverinfo": "skip",
            }
        )
    layout = {
        "xaxis": {"type": "log", "title": {"text": "predicted loss"}, "exponentformat": "power"},
        "yaxis": {"type": "log", "title": {"text": "measured loss"}, "exponentformat": "power"},
    }
    return {"data": traces, "layout": layout}
