"""Metric-decoupled search: each group of units is scored by the quality that it moves.

Our reading of MixDQ (Zhao et al. 2024, sec. 3.3): layers that change what an image shows and
layers that change how clean it is need different metrics, whose numbers do not add up. So each
group is scored by its own metric and gets its own share of the budget; the split is scanned, and
the real joint measurement decides between the allocations that the splits give.

With n_g the size of group g (its cost in the largest uniform scheme that fits, else the mean cost
of its cells) and A what the budget leaves for the searched units, a split K gives group g the share
A n_g k_g / sum_h n_h k_h. Two groups have
(k_1, k_2) = (sqrt K, 1 / sqrt K), as MixDQ; in general log k runs over a lattice of sum 0 around
proportional shares (all k equal). All other budgets hold for the allocation as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import numpy.typing as npt

from mpq.core.errors import InvalidInputError, unknown
from mpq.core.formats import Scheme
from mpq.core.jobs import JobSpec
from mpq.core.layers import LayerGraph, UnitName
from mpq.core.patterns import matching
from mpq.core.problem import Allocation, Budget, Problem
from mpq.core.tables import Cells, CostTable, Floats, SensitivityTable
from mpq.quality_tables import quality_tables
from mpq.tasks import Workers
from solvers import solve

Groups = Mapping[str, Sequence[UnitName]]  # the units that each quality scores

_RADIUS = {1: 0, 2: 8, 3: 2}  # of the lattice of splits, by number of groups: 1, 17, 19 points
_ROUNDING = 1e-9  # of a share, relative
_LARGEST_RATIO = 4.0  # between the k of two groups: 8 bit in one where the other has 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """What a scan of splits found: the distinct allocations by name, and how many were tried."""

    cost: str  # whose budget is split
    allocations: Mapping[str, Allocation]
    tried: int
    infeasible: int


def check_groups(spec: JobSpec, graph: LayerGraph) -> None:
    """Raise InvalidInputError where the groups are no partition of the units into qualities."""
    asked, most = spec.quality_groups, max(_RADIUS)
    if asked == "auto":
        if len(spec.quality) > most:
            raise InvalidInputError(
                "quality_groups",
                f"{len(spec.quality)} qualities cannot all have a group, {most} can: name the "
                f"groups in quality_groups, the other qualities are measured only",
            )
        return
    for name in asked:
        if name not in spec.quality:
            raise unknown("quality", name, spec.quality)
    if not 0 < len(asked) <= most:
        raise InvalidInputError(
            "quality_groups", f"give 1 to {most} quality groups, got {len(asked)}"
        )
    groups_by_pattern(graph, asked)


def decoupled(workers: Workers, problem: Problem, spec: JobSpec, run_id: str) -> Splits:
    """Score every cell by every quality, group the units and scan the splits of the budget.

    The tables are kept with the run. Among the allocations is the optimum of all qualities'
    summed scores, without groups. Costs one forward pass for each cell and batch.
    """
    scored = quality_tables(workers)
    tables = {name: scored[name] for name in spec.quality}
    for table in tables.values():
        workers.store.put_sensitivity(run_id, table)
    if spec.quality_groups == "auto":
        groups = groups_by_effect(tables)
    else:
        groups = groups_by_pattern(workers.workload.graph, spec.quality_groups)
    splits = scan_splits(problem, tables, groups)
    of_groups = ", ".join(f"{name} ({len(units)} units)" for name, units in groups.items())
    workers.store.log(
        run_id,
        "decoupled",
        f"{splits.tried} splits of {splits.cost} between {of_groups}: "
        f"{len(splits.allocations)} different allocations, {splits.infeasible} splits infeasible",
    )
    joint = solve(joint_scores(problem, tables)).allocation
    if joint is None:
        return splits
    return replace(splits, allocations={**splits.allocations, "qualities summed": joint})


def groups_by_pattern(graph: LayerGraph, asked: Mapping[str, Sequence[str]]) -> Groups:
    """Return the units of each group: the first pattern that matches a unit or its layer wins.

    Raises InvalidInputError where a pattern matches nothing, a unit has no group or a group no
    unit: names that drifted must not silently move layers to another metric.
    """
    owner = {layer: unit.name for unit in graph.units for layer in unit.layers}
    owner |= {unit.name: unit.name for unit in graph.units}
    group_of: dict[UnitName, str] = {}
    for name, patterns in asked.items():
        for pattern in patterns:
            for found in matching(f"quality_groups[{name!r}]", pattern, owner):
                group_of.setdefault(owner[found], name)
    left = [unit.name for unit in graph.units if unit.name not in group_of]
    if left:
        more = f" and {len(left) - 1} more units" if len(left) > 1 else ""
        raise InvalidInputError(
            "quality_groups",
            f"unit {left[0]!r}{more} match no pattern of quality_groups: end the last group with "
            f"'*'",
        )
    empty = [name for name in asked if name not in group_of.values()]
    if empty:
        raise InvalidInputError(
            "quality_groups",
            f"quality group {empty[0]!r} has no unit left, earlier groups match them all: put it "
            f"first or leave it out",
        )
    return {name: [u.name for u in graph.units if group_of[u.name] == name] for name in asked}


def groups_by_effect(tables: Mapping[str, SensitivityTable]) -> Groups:
    """Return the units of each group: a unit belongs to the quality that it moves most.

    Its mean degradation over schemes is taken relative to the quality's median over the units
    that move it at all, so that neither the unit of the metric nor a few large layers decide.
    The first of equals wins; a quality that no unit prefers gets no group.
    """
    names = list(tables)
    cells = tables[names[0]].cells
    counts = np.diff(cells.offsets)
    moved = np.stack(
        [np.add.reduceat(tables[n].values, cells.offsets[:-1]) / counts for n in names]
    )
    for row in moved:
        row /= np.median(row[row > 0]) if (row > 0).any() else 1.0
    chosen = moved.argmax(axis=0)
    return {
        name: [cells.units[u] for u in np.flatnonzero(chosen == number)]
        for number, name in enumerate(names)
        if (chosen == number).any()
    }


def scan_splits(problem: Problem, tables: Mapping[str, SensitivityTable], groups: Groups) -> Splits:
    """Return the exact allocation of each split of the budget between the groups.

    The memory budget is split or, where there is none, the first. Splits come from proportional
    shares outwards; those that leave a group less than it can do with are counted, and of equal
    allocations the first keeps its name. Costs one exact solve for each feasible split.
    """
    budget = next((b for b in problem.budgets if b.cost == "memory"), problem.budgets[0])
    table = problem.costs[budget.cost]
    inside = {name: _inside(problem, units) for name, units in groups.items()}
    grouped = _grouped(problem, table, tables, inside)
    sizes, smallest, largest = _sizes(problem, table, inside)
    widest = float((largest / np.maximum(smallest, 1e-300)).max())
    found: dict[Allocation, str] = {}
    tried = infeasible = 0
    for factors in _factors(len(inside), min(_LARGEST_RATIO, widest)):
        tried += 1
        shares = (budget.limit - table.fixed) * sizes * factors / (sizes @ factors)
        allocation = None
        if (shares >= smallest * (1 - _ROUNDING)).all() and (shares > 0).all():
            shares = np.maximum(shares * (1 + _ROUNDING), smallest)  # the whole budget holds too
            own = {
                name: Budget(_share_of(table, name), share)
                for name, share in zip(inside, shares.tolist(), strict=True)
            }
            allocation = _within_shares(grouped, own, groups)
        if allocation is None:
            infeasible += 1
        else:
            found.setdefault(allocation, _split_name(list(inside), factors))
    named = {name: allocation for allocation, name in found.items()}
    return Splits(cost=table.name, allocations=named, tried=tried, infeasible=infeasible)


def _within_shares(
    problem: Problem, shares: Mapping[str, Budget], groups: Groups
) -> Allocation | None:
    """Return the optimum in which each group keeps its share, None where there is none.

    Where the groups' own optima meet all other budgets together, nothing better meets them.
    """
    apart: dict[UnitName, Scheme] = {}
    for name, share in shares.items():
        own = _only(problem, share, groups[name])
        solution = solve(own)
        if solution.allocation is None:
            return None
        apart |= solution.allocation
    together = Allocation({unit: apart[unit] for unit in problem.cells.units})
    if problem.fits(together):
        return together
    return solve(problem.with_budgets([*problem.budgets, *shares.values()])).allocation


def _only(problem: Problem, share: Budget, units: Sequence[UnitName]) -> Problem:
    """Return the problem of some units under their share alone."""
    members = set(units)
    both = zip(problem.cells.units, problem.cells.schemes, strict=True)
    schemes = {unit: of_unit for unit, of_unit in both if unit in members}  # in the cells' order
    cells = Cells(units=tuple(schemes), schemes=tuple(schemes.values()))
    inside = _inside(problem, units)
    table, cost = problem.sensitivity, problem.costs[share.cost]
    return Problem(
        sensitivity=SensitivityTable(
            metric=table.metric,
            cells=cells,
            values=table.values[inside],
            stderr=table.stderr[inside],
        ),
        costs={
            share.cost: replace(
                CostTable.exact(cost.name, cost.unit, cells, cost.values[inside]),
                joint=cost.joint and cost.joint.restrict(cells, np.flatnonzero(inside)),
            )
        },
        budgets=(share,),
    )


def joint_scores(problem: Problem, tables: Mapping[str, SensitivityTable]) -> Problem:
    """Return the problem whose score is the sum of all qualities, each over its scale.

    It needs no groups: the additive prediction of what decides between measured candidates.
    """
    values = sum((tables[n].values / s for n, s in _scales(problem, tables).items()), np.zeros(1))
    return _scored(problem, "qualities", values)


def _scored(problem: Problem, metric: str, values: Floats) -> Problem:
    cells = problem.cells
    table = SensitivityTable(metric=metric, cells=cells, values=values, stderr=np.zeros(len(cells)))
    return replace(problem, sensitivity=table, responses=None)


def _scales(problem: Problem, tables: Mapping[str, SensitivityTable]) -> dict[str, float]:
    """Return what each quality is counted in: its least predicted total of a uniform scheme.

    Only uniform schemes within the budgets count or, where none is, the mean cell of each unit.
    """
    uniform = [a.choice(problem.cells) for a in problem.uniform().values() if problem.fits(a)]
    scales = {}
    for name, table in tables.items():
        totals = [abs(float(table.values[choice].sum())) for choice in uniform]
        totals = totals or [float(np.abs(table.values).mean()) * len(problem.cells.units)]
        least = min(totals)
        scales[name] = least if least > 0 else 1.0
    return scales


def _inside(problem: Problem, units: Sequence[UnitName]) -> npt.NDArray[np.bool_]:
    """Tell of each cell whether its unit is in the group."""
    members = set(units)
    of_unit = np.array([unit in members for unit in problem.cells.units])
    return np.repeat(of_unit, np.diff(problem.cells.offsets))


def _grouped(
    problem: Problem,
    table: CostTable,
    tables: Mapping[str, SensitivityTable],
    inside: Mapping[str, npt.NDArray[np.bool_]],
) -> Problem:
    """Return the problem with each group's own scores, and the split cost once for each group."""
    scales = _scales(problem, tables)
    values = np.zeros(len(problem.cells))
    costs = dict(problem.costs)
    for name, mask in inside.items():
        values[mask] = tables[name].values[mask] / scales[name]
        own = _share_of(table, name)
        alone = CostTable.exact(own, table.unit, problem.cells, table.values * mask)
        costs[own] = replace(alone, joint=table.joint and table.joint.among(mask))
    return replace(_scored(problem, "decoupled", values), costs=costs)


def _sizes(
    problem: Problem, table: CostTable, inside: Mapping[str, npt.NDArray[np.bool_]]
) -> tuple[Floats, Floats, Floats]:
    """Return the size of each group, and its least and largest cost."""
    starts, counts = table.cells.offsets[:-1], np.diff(table.cells.offsets)
    uniform = [a.choice(problem.cells) for a in problem.uniform().values() if problem.fits(a)]
    members = np.stack([mask[starts] for mask in inside.values()]).astype(np.float64)
    middle = np.add.reduceat(table.values, starts) / counts
    if uniform:  # then equal factors leave room for that uniform scheme, to the byte
        middle = table.values[max(uniform, key=lambda choice: table.values[choice].sum())]
    least = np.minimum.reduceat(table.values, starts)
    most = np.maximum.reduceat(table.values, starts)
    return members @ middle, members @ least, members @ most


def _factors(groups: int, ratio: float) -> Iterator[Floats]:
    """Yield the k of every split, all equal first; two of them differ by `ratio` at most."""
    radius = _RADIUS[groups]
    places = [
        np.array(place)
        for place in product(range(-radius, radius + 1), repeat=groups)
        if sum(place) == 0
    ]
    places.sort(key=lambda place: int(np.abs(place).sum()))
    step = math.log(ratio) / (2 * max(1, radius))
    for place in places:
        yield np.exp(step * place)


def _share_of(table: CostTable, group: str) -> str:
    return f"{table.name} of {group}"


def _split_name(names: Sequence[str], factors: Floats) -> str:
    if len(names) == 1:
        return f"decoupled {names[0]}"
    return f"decoupled K={':'.join(f'{k:.2f}' for k in factors[:-1] / factors[-1])}"
