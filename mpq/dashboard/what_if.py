"""What a run would choose under other budgets, pins and risk: the view behind the sliders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from mpq.core.problem import Allocation, Problem, Solution, Status
from mpq.core.quantities import quantity
from mpq.dashboard.loaded import LoadedRun
from mpq.dashboard.views import finite
from mpq.pins import parse_pins
from mpq.stated import under
from solvers import solve


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Conditions as a URL writes them: budget texts, "unit=scheme" pins, a probability."""

    budgets: tuple[str, ...] = ()
    pins: tuple[str, ...] = ()
    risk: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CostNow:
    """The total of one cost, its limit if it has one, and both as people read them."""

    name: str
    total: float
    text: str
    limit: float | None
    limit_text: str
    quantile_text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIfView:
    """An answer: `choice` is the place in `palette` of each unit's scheme, in network order.

    `moved` numbers the units that differ from the stored choice. `is_proven` tells whether
    nothing better exists; `gap` how far at most the answer is from the best (None: not known).
    """

    status: Status
    solver: str
    is_proven: bool
    score: float | None
    stored_score: float | None
    gap: float | None
    seconds: float
    said: str
    costs: tuple[CostNow, ...] = ()
    choice: tuple[int, ...] = ()
    moved: tuple[int, ...] = ()
    pins: Mapping[str, str] = field(default_factory=dict)


def answer(run: LoadedRun, asked: Asked, near: Allocation | None = None) -> Solution:
    """Solve in milliseconds, without a bound where pairs are counted."""
    pins = parse_pins(asked.pins)
    return run.what_if.solve(asked.budgets, pin=pins, risk=asked.risk, near=near)


def proven_answer(run: LoadedRun, asked: Asked) -> Solution:
    """Solve with a bound, which takes longer."""
    pins = parse_pins(asked.pins)
    plain, risk = under(
        run.graph, run.problem, run.spec.risk, asked.budgets, pin=pins, risk=asked.risk
    )
    return solve(plain, "auto" if plain.responses is None else "pairs", risk)


def what_if_view(run: LoadedRun, asked: Asked, solution: Solution) -> WhatIfView:
    """Return an answer for people, beside the stored choice."""
    gap = finite(solution.gap)
    stored = run.chosen.allocation if run.chosen is not None else None
    alike = None if stored is None else finite(run.stored_score(solution.solver))
    view = WhatIfView(
        status=solution.status,
        solver=solution.solver,
        is_proven=solution.status in (Status.OPTIMAL, Status.INFEASIBLE),
        # Refined around another network, the stored score is not in the same terms.
        score=alike if solution is run.chosen else finite(solution.score),
        stored_score=alike,
        gap=gap,
        seconds=solution.seconds,
        said=_said(solution, gap),
        pins=parse_pins(asked.pins),
    )
    allocation = solution.allocation
    if allocation is None:
        return view
    choice = allocation.choice(run.problem.cells)
    moved = () if stored is None else np.flatnonzero(choice != stored.choice(run.problem.cells))
    return replace(
        view,
        costs=costs_now(run.problem, solution),
        choice=tuple(run.places[choice].tolist()),
        moved=tuple(int(number) for number in moved),
    )


def costs_now(problem: Problem, solution: Solution) -> tuple[CostNow, ...]:
    """Return every total of a solution beside its limit."""
    limits = {budget.cost: budget.limit for budget in solution.budgets}
    totals, upper = solution.totals or {}, solution.quantiles or {}
    return tuple(
        CostNow(
            name=name,
            total=totals[name],
            text=quantity(totals[name], table.unit),
            limit=limits.get(name),
            limit_text=quantity(limits[name], table.unit) if name in limits else "",
            quantile_text=(
                quantity(upper[name], table.unit)
                if name in limits and upper.get(name, totals[name]) > totals[name]
                else ""
            ),
        )
        for name, table in problem.costs.items()
    )


def _said(solution: Solution, gap: float | None) -> str:
    """Return one line on what the answer is worth."""
    if solution.infeasibility is not None:
        return f"Nothing fits: {solution.infeasibility.message}"
    if solution.allocation is None:
        return "No allocation was found in time: widen the budgets."
    if solution.status is Status.OPTIMAL:
        return "Proven: no allocation is better."
    if gap is not None:
        return f"At most {100 * gap:.2g} % above the best possible."
    return "A quick answer with pairs of layers; let go of the slider for one with a bound."
