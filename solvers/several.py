"""Several models under one budget: their problems put together, and the answer taken apart."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from mpq.core.budgets import Budget, resolved
from mpq.core.errors import InvalidInputError, MpqWarning, unknown
from mpq.core.formats import Scheme
from mpq.core.joint import JointCosts
from mpq.core.layers import UnitName
from mpq.core.problem import Allocation, Constraint, Problem
from mpq.core.tables import Cell, Cells, CostTable, Floats, SensitivityTable

_BETWEEN = "/"


def together(
    problems: Mapping[str, Problem],
    budgets: Sequence[str | Budget] = (),
    weights: Mapping[str, float] | None = None,
) -> Problem:
    """Return the problem of choosing for several models at once, under budgets on all of them.

    Unit "layer" of model "encoder" is "encoder/layer". Costs that all models have are kept and
    add up, with their fixed parts, baselines and weight counts, so a budget in percent is of
    all models; a model's score counts `weights[model]` times (default 1). Constraints and
    forbidden pairs hold as before, the models' own budgets do not. Responses are left out, with
    a warning: pairs of units are not known across models. Raises InvalidInputError for a name
    with "/", scores of different metrics without weights, or a cost in different units.
    """
    if not problems:
        raise InvalidInputError("problems", "no problem to put together")
    for model in problems:
        if not model or _BETWEEN in model:
            raise InvalidInputError(
                "model_name", f"a model's name has letters and no {_BETWEEN!r}, got {model!r}"
            )
    factors = _factors(problems, weights)
    paired = [model for model, problem in problems.items() if problem.responses is not None]
    if paired:
        warnings.warn(
            MpqWarning(f"several models are chosen for without pairs of units: {_listed(paired)}"),
            stacklevel=2,
        )
    parts = list(problems.values())
    cells = Cells(
        units=tuple(
            _joint(m, unit) for m, problem in problems.items() for unit in problem.cells.units
        ),
        schemes=tuple(schemes for problem in parts for schemes in problem.cells.schemes),
    )
    shared = [name for name in parts[0].costs if all(name in part.costs for part in parts)]
    made = Problem(
        sensitivity=_sensitivity(problems, factors, cells),
        costs={name: _cost(name, problems, cells) for name in shared},
        budgets=(),
        constraints=_constraints(problems, cells),
        forbidden=tuple(
            (_of(model, one), _of(model, other))
            for model, problem in problems.items()
            for one, other in problem.forbidden
        ),
    )
    return made.with_budgets(resolved(budgets, made.costs))


def apart(allocation: Allocation) -> dict[str, Allocation]:
    """Return the allocation of each model of one over the units of several (see `together`)."""
    found: dict[str, dict[UnitName, Scheme]] = {}
    for unit, scheme in allocation.items():
        model, between, name = unit.partition(_BETWEEN)
        if not between:
            raise InvalidInputError("unit", f"unit {unit!r} names no model: 'model/unit' does")
        found.setdefault(model, {})[name] = scheme
    return {model: Allocation(schemes) for model, schemes in found.items()}


def _factors(
    problems: Mapping[str, Problem], weights: Mapping[str, float] | None
) -> dict[str, float]:
    metrics = {model: problem.sensitivity.metric for model, problem in problems.items()}
    if weights is None and len(set(metrics.values())) > 1:
        told = _listed([f"{metric} of {model}" for model, metric in metrics.items()])
        raise InvalidInputError(
            "weights", f"scores of different metrics, {told}, do not add up: give weights"
        )
    for model, weight in (weights or {}).items():
        if model not in problems:
            raise unknown("model", model, problems)
        if not (math.isfinite(weight) and weight > 0):
            raise InvalidInputError(
                "weights",
                f"the weight of a model is a positive number, got {weight!r} of {model!r}",
            )
    return dict.fromkeys(problems, 1.0) | {m: float(w) for m, w in (weights or {}).items()}


def _sensitivity(
    problems: Mapping[str, Problem], factors: Mapping[str, float], cells: Cells
) -> SensitivityTable:
    tables = {model: problem.sensitivity for model, problem in problems.items()}
    return SensitivityTable(
        metric=", ".join(dict.fromkeys(table.metric for table in tables.values())),
        cells=cells,
        values=np.concatenate([factors[m] * table.values for m, table in tables.items()]),
        stderr=np.concatenate([factors[m] * table.stderr for m, table in tables.items()]),
    )


def _cost(name: str, problems: Mapping[str, Problem], cells: Cells) -> CostTable:
    tables = {model: problem.costs[name] for model, problem in problems.items()}
    if len({table.unit for table in tables.values()}) > 1:
        told = _listed([f"{table.unit} in {model}" for model, table in tables.items()])
        raise InvalidInputError("cost_unit", f"cost {name!r} is counted in {told}: use one unit")
    counts = [table.weights for table in tables.values()]
    return CostTable(
        name=name,
        unit=next(iter(tables.values())).unit,
        cells=cells,
        values=np.concatenate([table.values for table in tables.values()]),
        low=np.concatenate([table.low for table in tables.values()]),
        high=np.concatenate([table.high for table in tables.values()]),
        fixed=math.fsum(table.fixed for table in tables.values()),
        baseline=math.fsum(table.baseline for table in tables.values()),
        weights=sum(counts) if all(counts) else 0,  # of some unknown: of all unknown
        provenance="; ".join(dict.fromkeys(table.provenance for table in tables.values())),
        joint=_pairs([table.joint for table in tables.values()], problems, cells),
    )


def _pairs(
    parts: Sequence[JointCosts | None], problems: Mapping[str, Problem], cells: Cells
) -> JointCosts | None:
    """Return the pairs of cells of all models over the cells of all."""
    found, begin = [], 0
    for part, problem in zip(parts, problems.values(), strict=True):
        if part:
            found.append(part.moved(cells, begin))
        begin += len(problem.cells)
    return JointCosts.summed(found)


def _constraints(problems: Mapping[str, Problem], cells: Cells) -> tuple[Constraint, ...]:
    found, begin = [], 0
    for model, problem in problems.items():
        end = begin + len(problem.cells)
        for row in problem.constraints:
            coefficients: Floats = np.zeros(len(cells))
            coefficients[begin:end] = row.coefficients
            found.append(
                replace(
                    row,
                    name=_joint(model, row.name),
                    cells=cells,
                    coefficients=coefficients,
                    joint=row.joint and row.joint.moved(cells, begin),
                )
            )
        begin = end
    return tuple(found)


def _of(model: str, cell: Cell) -> Cell:
    return _joint(model, cell[0]), cell[1]


def _joint(model: str, name: str) -> str:
    return f"{model}{_BETWEEN}{name}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
