"""What is asked of a solver and what it answers."""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mpq.core.constraints import Constraint
from mpq.core.errors import InvalidInputError, unknown
from mpq.core.formats import Scheme, parse_scheme
from mpq.core.layers import UnitName
from mpq.core.sums import exact_sum
from mpq.core.tables import Cell, Cells, CostTable, Indices, Responses, SensitivityTable

_UNITS: dict[str, dict[str, float]] = {
    "bytes": {
        "B": 1,
        "bytes": 1,
        "kB": 1e3,
        "MB": 1e6,
        "GB": 1e9,
        "KiB": 2**10,
        "MiB": 2**20,
        "GiB": 2**30,
    },
    "s": {"s": 1, "ms": 1e-3, "us": 1e-6},
    "bitops": {"bitops": 1, "MBOPs": 1e6, "GBOPs": 1e9, "TBOPs": 1e12},
    "J": {"J": 1, "mJ": 1e-3, "uJ": 1e-6},
}
_BUDGET = re.compile(
    r"\s*(?P<cost>[\w-]+)\s*<=\s*"
    r"(?:uniform\s+(?P<uniform>\S+)|(?P<amount>[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?|nan|inf)\s*"
    r"(?P<unit>%|[A-Za-z]*))\s*"
)


@dataclass(frozen=True, slots=True)
class Budget:
    """An upper limit on the total of one cost, in the cost's own unit (bytes, s, ...)."""

    cost: str
    limit: float
    text: str = ""

    def __post_init__(self) -> None:
        if not math.isfinite(self.limit) or self.limit <= 0:
            raise InvalidInputError(
                "budget", f"a budget is a positive finite number, got {self.text or self.limit!r}"
            )


_COST_UNITS = {"memory": "bytes", "latency": "s", "bops": "bitops", "energy": "J"}


def budget_text(budget: Budget) -> str:
    """Return the text that `BudgetText.parse` reads back to the same limit."""
    if budget.cost not in _COST_UNITS:
        raise unknown("cost", budget.cost, _COST_UNITS)
    return f"{budget.cost} <= {float(budget.limit)!r} {_COST_UNITS[budget.cost]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetText:
    """A budget as written, before the costs are known.

    Forms: "memory <= 60%" (of the network as it is), "latency <= 3 ms", "memory <= 8.5 MB"
    (10^6 bytes) or "8.5 MiB" (2^20), "memory <= 4.25 bpw" (mean over the searched weights with
    all that their schemes store), "memory <= uniform int4" (what that uniform scheme costs).
    """

    text: str
    cost: str
    amount: float
    unit: str
    uniform: Scheme | None = None

    @classmethod
    def parse(cls, text: str) -> BudgetText:
        """Read one budget; raises InvalidInputError naming what is wrong."""
        if not isinstance(text, str):
            raise InvalidInputError(
                "budget", f"a budget is a text such as 'memory <= 60%', got {text!r}"
            )
        found = _BUDGET.fullmatch(text)
        if found is None:
            raise InvalidInputError(
                "budget",
                f"cannot read budget {text!r}: write for example 'memory <= 60%', "
                "'memory <= 8.5 MB', 'latency <= 3 ms' or 'memory <= uniform int4'",
            )
        if found["uniform"]:
            scheme = parse_scheme(found["uniform"])
            return cls(text=text, cost=found["cost"], amount=1.0, unit="uniform", uniform=scheme)
        amount = float(found["amount"])
        if not math.isfinite(amount) or amount <= 0:
            raise InvalidInputError(
                "budget", f"a budget is a positive finite number, got {found['amount']} in {text!r}"
            )
        known = ["%", "bpw", *(name for units in _UNITS.values() for name in units)]
        if found["unit"] not in known:
            raise unknown("budget unit", found["unit"], known)
        return cls(text=text, cost=found["cost"], amount=amount, unit=found["unit"])

    def resolve(self, costs: Mapping[str, CostTable]) -> Budget:
        """Return the budget in the cost's own unit."""
        if self.cost not in costs:
            raise unknown("cost", self.cost, costs)
        table = costs[self.cost]
        return Budget(self.cost, self._limit(table), self.text)

    def _limit(self, table: CostTable) -> float:
        if self.uniform is not None:
            # A unit without a choice (pinned) keeps what it has, as in a uniform allocation.
            cells = [
                table[unit, schemes[0] if len(schemes) == 1 else self.uniform]
                for unit, schemes in zip(table.cells.units, table.cells.schemes, strict=True)
            ]
            return table.fixed + math.fsum(cells)
        if self.unit == "%":
            return self._needs(table.baseline, "a known baseline") * self.amount / 100
        if self.unit == "bpw" and table.unit == "bytes":
            return table.fixed + self.amount * self._needs(table.weights, "a weight count") / 8
        scales = _UNITS.get(table.unit, {})
        if self.unit not in scales:
            raise InvalidInputError(
                "budget",
                f"{self.text!r}: {self.cost} is counted in {table.unit}, so write it in "
                f"{' or '.join([*scales, '%'])}",
            )
        return self.amount * scales[self.unit]

    def _needs(self, value: float, what: str) -> float:
        if not value > 0:
            raise InvalidInputError("budget", f"{self.text!r} needs {what} of cost {self.cost!r}")
        return value


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
        """Return the total of a cost for a choice, fixed part included."""
        table = self.costs[cost]
        return table.fixed + exact_sum(table.values[choice])

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

    def uniform(self) -> dict[Scheme, Allocation]:
        """Return every allocation that gives one scheme to all units that have a choice.

        Units with a single scheme keep it; a scheme that some free unit may not take is left out.
        """
        free = [set(schemes) for schemes in self.cells.schemes if len(schemes) > 1]
        if not free:
            return {}
        shared = set.intersection(*free)
        order = dict.fromkeys(s for schemes in self.cells.schemes for s in schemes)
        return {
            scheme: Allocation(
                {
                    unit: schemes[0] if len(schemes) == 1 else scheme
                    for unit, schemes in zip(self.cells.units, self.cells.schemes, strict=True)
                }
            )
            for scheme in order
            if scheme in shared
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
class Infeasibility:
    """Why nothing fits: per budget its smallest reachable value, alone and beside the others.

    `smallest[cost]` is reachable when only that budget counts; `relaxed[cost]` is the limit
    that would be enough if the other budgets stay (None: not even without this budget).
    `names` are the budgets that cannot be met.
    """

    names: tuple[str, ...]
    smallest: Mapping[str, float]
    relaxed: Mapping[str, float | None]
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The answer of a solver; `bound` <= best possible score, gap = (score - bound) / score."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontier:
    """Solutions along the limits of one cost, from the smallest to the largest."""

    cost: str
    solutions: tuple[Solution, ...]


__all__ = [
    "Allocation",
    "Budget",
    "BudgetText",
    "Cell",
    "Constraint",
    "Frontier",
    "Infeasibility",
    "Problem",
    "Solution",
    "Status",
]
