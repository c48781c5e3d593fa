"""What is asked of a solver and what it answers."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mpq.core.budgets import Budget, BudgetText, budget_text
from mpq.core.constraints import Constraint
from mpq.core.errors import InvalidInputError, unknown
from mpq.core.formats import Scheme, parse_scheme
from mpq.core.infeasibility import Conflict, Infeasibility
from mpq.core.layers import UnitName
from mpq.core.sums import exact_sum
from mpq.core.tables import Cell, Cells, CostTable, Indices, Responses, SensitivityTable
from mpq.core.uniform import uniform_choices


class Allocation(Mapping[UnitName, Scheme]):
    """One scheme for each unit; immutable."""

    __slots__ = ("_cells", "_choice", "_named")

    def __init__(self, schemes: Mapping[UnitName, Scheme]) -> None:
        self._named: dict[UnitName, Scheme] | None = dict(schemes)
        self._cells: Cells | None = None
        self._choice: Indices | None = None

    @property
    def _schemes(self) -> dict[UnitName, Scheme]:
        if self._named is None:  # a million units are named when somebody asks for a name
            assert self._cells is not None
            assert self._choice is not None
            places = (self._choice - self._cells.offsets[:-1]).tolist()
            chosen = (schemes[p] for schemes, p in zip(self._cells.schemes, places, strict=True))
            self._named = dict(zip(self._cells.units, chosen, strict=True))
        return self._named

    def __getitem__(self, unit: UnitName) -> Scheme:
        if unit not in self._schemes:
            raise KeyError(unit)
        return self._schemes[unit]

    def __iter__(self) -> Iterator[UnitName]:
        return iter(self._schemes)

    def __len__(self) -> int:
        return len(self._schemes) if self._cells is None else len(self._cells.units)

    def __hash__(self) -> int:
        return hash(frozenset(self._schemes.items()))

    def __repr__(self) -> str:
        return f"Allocation({self.text()})"

    def text(self) -> dict[UnitName, str]:
        """Return the text form that `from_text` reads back."""
        return {unit: str(scheme) for unit, scheme in self._schemes.items()}

    @classmethod
    def from_text(cls, text: Mapping[UnitName, str]) -> Allocation:
        """Read `{"unit": "scheme"}`."""
        return cls({unit: parse_scheme(scheme) for unit, scheme in text.items()})

    @classmethod
    def from_choice(cls, cells: Cells, choice: Indices) -> Allocation:
        """Build an allocation from the number of the chosen cell of each unit.

        Raises ValueError where that is not one cell of each unit, in the order of the units.
        """
        chosen = np.array(choice, np.int64)
        if (
            chosen.shape != (len(cells.units),)
            or not ((cells.offsets[:-1] <= chosen) & (chosen < cells.offsets[1:])).all()
        ):
            raise ValueError("a choice is one cell of each unit, in the order of the units")
        chosen.setflags(write=False)
        made = cls({})
        made._named, made._cells, made._choice = None, cells, chosen
        return made

    def choice(self, cells: Cells) -> Indices:
        """Return the number of the chosen cell of each unit of `cells`."""
        if self._choice is not None and cells is self._cells:
            return self._choice
        return np.array([cells.index((unit, self[unit])) for unit in cells.units], np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Least sensitivity under every budget, one cell per unit.

    `constraints` are further linear conditions; of each pair of cells in `forbidden` at most one
    is taken.
    """

    sensitivity: SensitivityTable
    costs: Mapping[str, CostTable]
    budgets: tuple[Budget, ...]
    responses: Responses | None = None
    constraints: tuple[Constraint, ...] = ()
    forbidden: tuple[tuple[Cell, Cell], ...] = ()

    def __post_init__(self) -> None:
        cells = self.cells
        axes = [table.cells for table in self.costs.values()]
        axes += [self.responses.cells] if self.responses else []
        axes += [constraint.cells for constraint in self.constraints]
        if any(axis is not cells and axis != cells for axis in axes):
            raise InvalidInputError("cells", "the tables of a problem are over different cells")
        for budget in self.budgets:
            if budget.cost not in self.costs:
                raise unknown("cost", budget.cost, self.costs)
        for one, other in self.forbidden:
            cells.index(one)
            cells.index(other)
            if one[0] == other[0]:
                raise InvalidInputError(
                    "forbidden",
                    f"a forbidden pair is of two units, got unit {one[0]!r} twice: to rule out a "
                    "scheme of one unit, pin the unit to the others",
                )

    @property
    def cells(self) -> Cells:
        """The choices."""
        return self.sensitivity.cells

    def score(self, choice: Indices) -> float:
        """Return the additive predicted loss of a choice."""
        return exact_sum(self.sensitivity.values[choice])

    def total(self, cost: str, choice: Indices) -> float:
        """Return the total of a cost for a choice, fixed and joint parts included."""
        return self.costs[cost].total(choice)

    def totals(self, choice: Indices) -> dict[str, float]:
        """Return the totals of all costs."""
        return {name: self.total(name, choice) for name in self.costs}

    def rows(self) -> tuple[Constraint, ...]:
        """Return all linear conditions: the tightest budget of each cost, then the constraints."""
        limits = self.limits().items()
        return (
            *(Constraint.at_most(self.costs[cost], limit) for cost, limit in limits),
            *self.constraints,
        )

    def limits(self) -> dict[str, float]:
        """Return the smallest limit of each budgeted cost, in the order of the budgets."""
        limits: dict[str, float] = {}
        for budget in self.budgets:
            limits[budget.cost] = min(budget.limit, limits.get(budget.cost, math.inf))
        return limits

    def meets(self, choice: Indices) -> bool:
        """Tell whether a choice meets every budget and constraint and takes no forbidden pair."""
        return self.allows(choice) and all(row.met(choice) for row in self.rows())

    def allows(self, choice: Indices) -> bool:
        """Tell whether a choice takes no forbidden pair."""
        if not self.forbidden:
            return True
        taken = set(np.asarray(choice).tolist())
        return not any(i in taken and j in taken for i, j in self.forbidden_cells())

    def forbidden_cells(self) -> list[tuple[int, int]]:
        """Return the numbers of the cells of each forbidden pair."""
        return [(self.cells.index(one), self.cells.index(other)) for one, other in self.forbidden]

    def with_budgets(self, budgets: Sequence[Budget]) -> Problem:
        """Return the same tables under other budgets."""
        return replace(self, budgets=tuple(budgets))

    def pinned(self, allowed: Mapping[UnitName, Sequence[Scheme]]) -> Problem:
        """Return the problem in which the named units may take only the given schemes."""
        cells, numbers = self.cells.restrict(allowed)
        return Problem(
            sensitivity=self.sensitivity.restrict(cells, numbers),
            costs={name: table.restrict(cells, numbers) for name, table in self.costs.items()},
            budgets=self.budgets,
            responses=self.responses.restrict(cells, numbers) if self.responses else None,
            constraints=tuple(row.restrict(cells, numbers) for row in self.constraints),
            forbidden=tuple(
                pair
                for pair in self.forbidden
                if all(scheme in cells.schemes[cells.unit_number(unit)] for unit, scheme in pair)
            ),
        )

    def uniform(self) -> dict[Scheme | str, Allocation]:
        """Return every allocation that gives one scheme to all units that have a choice.

        Units with a single scheme keep it; a scheme that some free unit may not take is left out.
        Caches and inputs searched apart have a uniform scheme of their own: all combinations.
        """
        return {
            scheme: Allocation.from_choice(self.cells, choice)
            for scheme, choice in uniform_choices(self.cells).items()
        }

    def fits(self, allocation: Allocation) -> bool:
        """Tell whether an allocation meets every budget and constraint."""
        return self.meets(allocation.choice(self.cells))


class Status(enum.StrEnum):
    """How much a solver proved."""

    OPTIMAL = "optimal"  # the gap is proven
    FEASIBLE = "feasible"  # meets every budget; `gap` says how far it can be from the best
    INFEASIBLE = "infeasible"  # proven: no allocation meets every budget
    UNKNOWN = "unknown"  # stopped before it found any


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The answer of a solver; `bound` <= best possible score, gap = (score - bound) / score.

    `quantiles` are what the totals stay below with probability `risk`, where that was asked.
    """

    status: Status
    solver: str
    budgets: tuple[Budget, ...]
    allocation: Allocation | None = None
    score: float = float("nan")
    totals: Mapping[str, float] | None = None
    bound: float = float("-inf")
    gap: float = float("inf")
    seconds: float = 0.0
    infeasibility: Infeasibility | None = None
    risk: float | None = None
    quantiles: Mapping[str, float] | None = None


__all__ = [
    "Allocation",
    "Budget",
    "BudgetText",
    "Cell",
    "Conflict",
    "Constraint",
    "Infeasibility",
    "Problem",
    "Solution",
    "Status",
    "budget_text",
]
