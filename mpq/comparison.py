"""How the allocations, totals and measurements of several runs differ."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from mpq.core.errors import InvalidInputError
from mpq.core.evaluation import CHOSEN, Evaluation
from mpq.core.jobs import JobSpec
from mpq.core.problem import Solution
from mpq.store.store import Store

_ALSO = {"predicted": "score", "gap": "gap"}  # beside the totals of costs, fields of solutions


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Runs side by side; every tuple has one entry a run, None (NaN) where a run lacks it.

    `settings` are the keys of the jobs that are not equal, `totals` what the chosen allocations
    cost, by cost, with the predicted loss and the gap; `units_of_measure` of the costs.
    `measured` is of the chosen allocation, by split and what was measured: its divergence (named
    "kl held_out"), with standard errors in `stderr`, and the metrics of `evaluate`. `layers` are
    the schemes of those layers that got different ones, `same` the number of the others.
    """

    runs: tuple[str, ...]
    names: tuple[str, ...]
    settings: Mapping[str, tuple[Any, ...]]
    totals: Mapping[str, tuple[float, ...]]
    units_of_measure: Mapping[str, str]
    measured: Mapping[str, tuple[float, ...]]
    stderr: Mapping[str, tuple[float, ...]]
    layers: Mapping[str, tuple[str | None, ...]]
    same: int

    def view(self) -> dict[str, Any]:
        """Return it as plain data that JSON can hold."""
        numbers = {
            name: {key: [_finite(v) for v in values] for key, values in found.items()}
            for name, found in (
                ("totals", self.totals),
                ("measured", self.measured),
                ("stderr", self.stderr),
            )
        }
        return {
            "runs": list(self.runs),
            "names": list(self.names),
            "settings": {key: list(values) for key, values in self.settings.items()},
            "units_of_measure": dict(self.units_of_measure),
            **numbers,
            "layers": {layer: list(schemes) for layer, schemes in self.layers.items()},
            "same_layers": self.same,
        }

    @classmethod
    def from_view(cls, view: Mapping[str, Any]) -> Self:
        """Read what `view` returned."""
        numbers = {
            name: {key: tuple(map(_or_nan, values)) for key, values in view[name].items()}
            for name in ("totals", "measured", "stderr")
        }
        return cls(
            runs=tuple(view["runs"]),
            names=tuple(view["names"]),
            settings={
                key: tuple(tuple(v) if isinstance(v, list) else v for v in values)
                for key, values in view["settings"].items()
            },
            units_of_measure=view["units_of_measure"],
            layers={layer: tuple(schemes) for layer, schemes in view["layers"].items()},
            same=view["same_layers"],
            **numbers,
        )


def compare_runs(store: Store, runs: Sequence[str]) -> Comparison:
    """Compare runs by id, name or "latest"; loads no model.

    Raises InvalidInputError where there are fewer than two, or one has no result yet.
    """
    ids = [store.resolve_run(run) for run in runs]
    if isinstance(runs, str) or len(set(ids)) < 2 or len(set(ids)) < len(ids):
        told = ", ".join(ids)
        raise InvalidInputError("compare", f"compare two different runs or more, got {told}")
    chosen = [_chosen(store, run_id) for run_id in ids]
    records = [store.run(run_id) for run_id in ids]
    layers = _aligned([_layers(store, i, s) for i, s in zip(ids, chosen, strict=True)], None)
    measured = [_of_chosen(store.evaluations(run_id)) for run_id in ids]
    numbers = [
        {**(s.totals or {}), **{name: getattr(s, field) for name, field in _ALSO.items()}}
        for s in chosen
    ]
    units = {name: unit for run_id in ids for name, unit in store.cost_units(run_id).items()}
    return Comparison(
        runs=tuple(ids),
        names=tuple(record.name for record in records),
        settings=_settings([record.spec for record in records]),
        totals=_aligned(numbers, math.nan),
        units_of_measure=units,
        measured=_aligned([{k: v[0] for k, v in one.items()} for one in measured], math.nan),
        stderr=_aligned([{k: v[1] for k, v in one.items()} for one in measured], math.nan),
        layers={layer: row for layer, row in layers.items() if len(set(row)) > 1},
        same=sum(len(set(row)) == 1 for row in layers.values()),
    )


def _chosen(store: Store, run_id: str) -> Solution:
    found = dict(store.solutions(run_id)).get(CHOSEN)
    if found is None or found.allocation is None:
        state = store.run(run_id).state
        raise InvalidInputError("run_unfinished", f"run {run_id} has no result: it is {state}")
    return found


def _layers(store: Store, run_id: str, chosen: Solution) -> dict[str, str]:
    assert chosen.allocation is not None
    graph = store.graph(run_id)
    found = {layer: chosen.allocation[unit.name] for unit in graph.units for layer in unit.layers}
    return {layer: str(scheme) for layer, scheme in graph.merged(found).items()}


def _of_chosen(evaluations: Sequence[Evaluation]) -> dict[str, tuple[float, float]]:
    found: dict[str, tuple[float, float]] = {}
    for e in evaluations:
        if e.candidate == CHOSEN:
            found[f"{e.divergence} {e.split}"] = (e.mean, e.stderr)
            found |= {f"{name} {e.split}": (value, math.nan) for name, value in e.metrics.items()}
    return found


def _settings(specs: Sequence[JobSpec]) -> dict[str, tuple[Any, ...]]:
    plain = [dataclasses.asdict(spec) for spec in specs]
    rows = {key: tuple(one[key] for one in plain) for key in plain[0] if key != "name"}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def _aligned(found: Sequence[Mapping[str, Any]], missing: Any) -> dict[str, tuple[Any, ...]]:
    keys = dict.fromkeys(key for one in found for key in one)
    return {key: tuple(one.get(key, missing) for one in found) for key in keys}


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
