"""What is told of the results of a run: its network, solutions and trade-offs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from mpq.core.errors import InvalidInputError
from mpq.core.frontier import Frontier, Surface
from mpq.core.layers import LayerGraph
from mpq.core.problem import Solution
from mpq.dashboard.views import finite, finite_values
from mpq.store.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerView:
    """A searched layer; `weights` counts elements, `macs` those of one sample batch."""

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    weights: int
    macs: int
    order: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitView:
    """Layers that share one scheme, and why."""

    name: str
    reason: str
    layers: tuple[LayerView, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnsearchedView:
    """A tensor that no unit covers, and why."""

    name: str
    elements: int
    bytes: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitsView:
    """The network of a run; `coverage` is the share of its parameters that is searched."""

    units: tuple[UnitView, ...]
    unsearched: tuple[UnsearchedView, ...]
    coverage: float
    native_bytes: int
    sample: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetView:
    """An upper limit, in the unit of its cost."""

    cost: str
    limit: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InfeasibilityView:
    """Why nothing fits, and what would; see `Infeasibility`."""

    message: str
    names: tuple[str, ...]
    smallest: Mapping[str, float | None]
    relaxed: Mapping[str, float | None]
    raised: Mapping[str, float | None]
    raised_by: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SolutionView:
    """The answer of a solver; infinite bounds and gaps are None.

    `allocation` is the scheme of each unit, `layers` of each layer; None where nothing was found
    or they were not asked for.
    """

    label: str
    status: str
    solver: str
    budgets: tuple[BudgetView, ...]
    score: float | None
    bound: float | None
    gap: float | None
    seconds: float
    totals: Mapping[str, float | None]
    risk: float | None
    quantiles: Mapping[str, float | None] | None
    allocation: Mapping[str, str] | None
    layers: Mapping[str, str] | None
    infeasibility: InfeasibilityView | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierView:
    """Solutions along the limits of one cost, from the smallest to the largest."""

    cost: str
    complete: bool
    solutions: tuple[SolutionView, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SurfaceView:
    """Solutions at every pair of limits of two costs; None where nothing fits both."""

    costs: tuple[str, str]
    limits: tuple[tuple[float, ...], tuple[float, ...]]
    solutions: tuple[tuple[SolutionView | None, ...], ...]


def units_view(graph: LayerGraph) -> UnitsView:
    """Return the network of a run."""
    named = graph.by_name
    units = [
        UnitView(
            name=unit.name,
            reason=unit.reason,
            layers=tuple(
                LayerView(
                    name=layer.name,
                    kind=layer.kind,
                    weight_shape=layer.weight_shape,
                    weights=0 if layer.source else layer.num_weights,
                    macs=layer.macs,
                    order=layer.order,
                )
                for layer in (named[name] for name in unit.layers)
            ),
        )
        for unit in graph.units
    ]
    return UnitsView(
        units=tuple(units),
        unsearched=tuple(UnsearchedView(**asdict(part)) for part in graph.unsearched),
        coverage=graph.coverage,
        native_bytes=graph.native_bytes,
        sample=graph.sample,
    )


def solutions_view(
    store: Store, run_id: str, labels: Sequence[str] = (), *, allocations: bool = False
) -> list[SolutionView]:
    """Return the solutions of a run with these labels, or all, in the order they were found."""
    found = [(label, s) for label, s in store.solutions(run_id) if not labels or label in labels]
    if labels and not found:
        raise InvalidInputError("not_stored", f"run {run_id} has no solution {labels[0][:100]!r}")
    graph = store.graph(run_id) if allocations and found else None
    return [solution_view(solution, label, graph) for label, solution in found]


def solution_view(
    solution: Solution, label: str = "", graph: LayerGraph | None = None
) -> SolutionView:
    """Return a solution, with its allocation where its network is given."""
    told = graph is not None and solution.allocation is not None
    by_unit = solution.allocation.text() if told and solution.allocation is not None else None
    by_layer = None
    if graph is not None and by_unit is not None:
        by_layer = {layer: by_unit[unit.name] for unit in graph.units for layer in unit.layers}
    why = solution.infeasibility
    return SolutionView(
        label=label,
        status=solution.status.value,
        solver=solution.solver,
        budgets=tuple(BudgetView(**asdict(budget)) for budget in solution.budgets),
        score=finite(solution.score),
        bound=finite(solution.bound),
        gap=finite(solution.gap),
        seconds=solution.seconds,
        totals=finite_values(solution.totals or {}),
        risk=solution.risk,
        quantiles=None if solution.quantiles is None else finite_values(solution.quantiles),
        allocation=by_unit,
        layers=by_layer,
        infeasibility=None
        if why is None
        else InfeasibilityView(
            message=why.told,
            names=why.names,
            smallest=finite_values(why.smallest),
            relaxed={name: finite(value) for name, value in why.relaxed.items()},
            raised=finite_values(why.raised),
            raised_by=finite(why.raised_by),
        ),
    )


def frontier_view(found: Frontier, graph: LayerGraph | None = None) -> FrontierView:
    """Return a trade-off of one cost, with allocations where the network is given."""
    return FrontierView(
        cost=found.cost,
        complete=found.complete,
        solutions=tuple(solution_view(s, graph=graph) for s in found.solutions),
    )


def surface_view(found: Surface) -> SurfaceView:
    """Return a trade-off of two costs, without allocations."""
    first, second = (tuple(map(float, axis)) for axis in found.limits)
    rows = tuple(
        tuple(None if s is None else solution_view(s) for s in row) for row in found.solutions
    )
    return SurfaceView(costs=found.costs, limits=(first, second), solutions=rows)
