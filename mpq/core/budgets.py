"""Budgets: upper limits on the total of a cost, and how they are written."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mpq.core.errors import InvalidInputError, unknown
from mpq.core.formats import Scheme, parse_scheme
from mpq.core.tables import CostTable
from mpq.core.uniform import uniform_choice

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
    "MACs": {"MACs": 1, "MMACs": 1e6, "GMACs": 1e9},
    "LUTs": {"LUTs": 1, "kLUTs": 1e3},
}
AMOUNTS = {name: scale for units in _UNITS.values() for name, scale in units.items()}
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


COST_UNITS = {  # of the costs whose names are known; profiles name others, in s
    "memory": "bytes",
    "latency": "s",
    "bops": "bitops",
    "energy": "J",
    "macs": "MACs",
    "luts": "LUTs",
    "resident": "bytes",
    "peak": "bytes",
}


def budget_text(budget: Budget, profiles: Collection[str] = ()) -> str:
    """Return the text that `BudgetText.parse` reads back to the same limit.

    `profiles` names further costs, counted in seconds.
    """
    units = {**dict.fromkeys(profiles, "s"), **COST_UNITS}
    if budget.cost not in units:
        raise unknown("cost", budget.cost, units)
    return f"{budget.cost} <= {float(budget.limit)!r} {units[budget.cost]}"


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
            return table.total(uniform_choice(table, self.uniform))
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


def resolved(budgets: Sequence[str | Budget], costs: Mapping[str, CostTable]) -> tuple[Budget, ...]:
    """Return budgets given as texts or records; raises InvalidInputError naming what is wrong."""
    if isinstance(budgets, str | Budget):
        raise InvalidInputError("budgets", f"budgets is a list, got {budgets!r}: write [it]")
    return tuple(
        b if isinstance(b, Budget) else BudgetText.parse(b).resolve(costs) for b in budgets
    )
