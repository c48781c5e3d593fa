"""Why nothing fits, and what would."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mpq.core.budgets import Budget, BudgetText
from mpq.core.errors import InvalidInputError
from mpq.core.problem import Conflict, Infeasibility, Problem
from mpq.core.provenance import modelled_note
from mpq.core.quantities import percent, quantity
from solvers.conflict import in_conflict, irreducible, raised_together
from solvers.exact import Minimise, minimise
from solvers.knapsack import cheapest

_CHEAPER = {"bytes": "smaller", "s": "faster"}


def explain(problem: Problem, *, time_limit_s: float, by: Minimise = minimise) -> Infeasibility:
    """Find the smallest reachable value of each budgeted cost, alone and beside the others.

    For a problem in which nothing fits. Also which of its conditions cannot be met together, and
    by what common factor the budgets among them have to be raised. `time_limit_s` bounds each
    of the integer programs; a value that is not proven smallest in that time is still reachable.
    """
    limits = problem.limits()
    if problem.constraints or problem.forbidden:
        free = by(problem, np.zeros(len(problem.cells)), [], time_limit_s=time_limit_s)
        if free.choice is None:
            conflict = irreducible(problem, [], by, time_limit_s)
            message = _conflict(problem, conflict)
            return Infeasibility(
                names=(), smallest={}, relaxed={}, message=message, conflict=conflict
            )
    smallest = {}
    for cost in limits:
        table = problem.costs[cost]
        least = by(problem, table.values, [], time_limit_s=time_limit_s, joint=table.joint)
        smallest[cost] = math.inf if least.choice is None else problem.total(cost, least.choice)
    relaxed: dict[str, float | None] = {}
    for cost in limits:
        others = [Budget(name, limit) for name, limit in limits.items() if name != cost]
        table = problem.costs[cost]
        least = by(problem, table.values, others, time_limit_s=time_limit_s, joint=table.joint)
        relaxed[cost] = None if least.choice is None else problem.total(cost, least.choice)
    alone = [cost for cost in limits if smallest[cost] > limits[cost]]
    joint = [cost for cost in limits if relaxed[cost] is not None]
    told = _Told(problem, limits)
    if alone:
        names, message = alone, told.alone(alone, smallest)
    elif joint:
        names, message = joint, told.together(joint, relaxed)
    else:
        names, message = list(limits), told.several(smallest)
    if note := modelled_note(problem.costs[cost] for cost in limits):
        message += f" ({note})"
    conflicts = in_conflict(problem, by, time_limit_s)
    blamed = [cost for conflict in conflicts for cost in conflict.budgets]
    raised = raised_together(problem, blamed)
    raised_by = max((raised[cost] / limits[cost] - 1 for cost in raised), default=None)
    return Infeasibility(
        names=tuple(names),
        smallest=smallest,
        relaxed=relaxed,
        message=message,
        conflict=conflicts[0] if conflicts else Conflict(),
        raised=raised,
        raised_by=raised_by,
        advice=told.advice(conflicts, raised, raised_by),
    )


def _conflict(problem: Problem, conflict: Conflict) -> str:
    end = "drop one of them" if len(conflict) > 1 else "drop that"
    return f"no allocation meets {_conditions(problem, conflict)}, whatever the budgets: {end}"


def _conditions(problem: Problem, conflict: Conflict) -> str:
    """Return the constraints and forbidden pairs of a conflict as text."""
    named = [repr(name) for name in conflict.constraints]
    pairs = len(problem.forbidden) if conflict.forbidden else 0
    parts = [f"constraint{'s' if len(named) > 1 else ''} {_listed(named)}"] if named else []
    parts += [f"{pairs} forbidden pair{'s' if pairs > 1 else ''}"] if pairs else []
    return " and ".join(parts)


@dataclass(frozen=True, slots=True)
class _Told:
    problem: Problem
    limits: Mapping[str, float]

    def alone(self, names: list[str], smallest: Mapping[str, float]) -> str:
        parts = []
        for name in names:
            limit, need = self.texts(name, smallest[name])
            reached = self.reached_by(name, smallest[name])
            parts.append(f"{limit}: the smallest possible is {need} ({reached})")
        units = {self.problem.costs[name].unit for name in names}
        cheaper = _CHEAPER.get(units.pop(), "cheaper") if len(units) == 1 else "cheaper"
        budget = "budget" if len(names) == 1 else "budgets"
        return (
            f"no allocation fits {', nor '.join(parts)}; "
            f"raise the {budget} or add a {cheaper} format"
        )

    def together(self, names: list[str], relaxed: Mapping[str, float | None]) -> str:
        needs = {name: value for name in names if (value := relaxed[name]) is not None}
        texts = {name: self.texts(name, value) for name, value in needs.items()}
        every = [self.texts(n, needs.get(n, self.limits[n]))[0] for n in self.limits]
        parts = []
        for name in names:
            kept = _listed([other for other in self.limits if other != name])
            parts.append(f"with {kept} kept, {name} needs {texts[name][1]}")
        end = "raise it" if len(names) == 1 else "raise one of them"
        return f"no allocation fits {_listed(every)} together: {'; '.join(parts)}; {end}"

    def several(self, smallest: Mapping[str, float]) -> str:
        texts = [self.texts(name, smallest[name]) for name in self.limits]
        needs = [f"{name} {need}" for name, (_, need) in zip(self.limits, texts, strict=True)]
        return (
            f"no allocation fits {_listed([limit for limit, _ in texts])} together, nor when any "
            f"one of them is dropped; each alone needs {_listed(needs)}; raise at least two"
        )

    def advice(
        self, conflicts: list[Conflict], raised: Mapping[str, float], raised_by: float | None
    ) -> str:
        """Return what else is in the way, and what is enough for several budgets at once."""
        beside = dict.fromkeys(filter(None, (_conditions(self.problem, c) for c in conflicts)))
        parts = [f"in the way as well: {_listed(list(beside))}"] if beside else []
        if len(raised) > 1 and raised_by is not None:
            limits = [f"{name} <= {self.texts(name, need)[1]}" for name, need in raised.items()]
            parts.append(f"enough together: {_listed(limits)} ({percent(raised_by)} more)")
        return "; ".join(parts)

    def texts(self, name: str, need: float) -> tuple[str, str]:
        """Return "memory <= 10.0 MB" and "11.7 MB"; the two amounts never print equal.

        The need is rounded up, so that it suffices when it is typed in as the next budget.
        """
        limit, unit = self.limits[name], self.problem.costs[name].unit
        digits = 4
        while digits < 17 and need != limit:
            if quantity(limit, unit, digits=digits) != quantity(need, unit, digits=digits):
                break
            digits += 1
        amount = quantity(limit, unit, digits=digits)
        written = next(
            (b.text for b in self.problem.budgets if (b.cost, b.limit) == (name, limit)), ""
        )
        relative = any(word in written for word in ("%", "bpw", "uniform"))
        text = f"{written.strip()} ({amount})" if relative else f"{name} <= {amount}"
        enough = quantity(need, unit, digits=digits, up=True)
        if self._typed(name, enough) < need:  # 4.1 times 1e-3 is less than 4.1e-3
            enough = quantity(math.nextafter(need, math.inf), unit, digits=digits, up=True)
        return text, enough

    def _typed(self, name: str, amount: str) -> float:
        """Return the limit that a budget of this amount has, infinity where it cannot be typed."""
        try:
            text = BudgetText.parse(f"{name} <= {amount}")
            return text.resolve(self.problem.costs).limit
        except InvalidInputError:
            return math.inf

    def reached_by(self, name: str, least: float) -> str:
        """Return which allocation has the smallest total of a cost."""
        problem, table = self.problem, self.problem.costs[name]
        if all(len(schemes) == 1 for schemes in problem.cells.schemes):
            return "no unit has a choice"
        alone = problem.total(name, cheapest(problem, table.values))
        least = least if table.joint else alone
        for scheme, allocation in problem.uniform().items():
            if problem.total(name, allocation.choice(problem.cells)) == least:
                return f"every unit at {scheme}"
        word = _CHEAPER.get(table.unit, "cheaper")
        if least != alone:
            return f"the {word.removesuffix('er')}est schemes together, pairs of units counted"
        return f"every unit at its {word.removesuffix('er')}est scheme"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
