"""What the budgets of an answer are worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mpq.core.problem import Allocation
from mpq.core.quantities import percent, quantity

_EACH = {"bytes": "byte", "bitops": "bitop"}
_MANY_TIMES = 5.0  # from which on percents are hard to read


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """The best allocation under some conditions, with its additive score and all its totals.

    Where `proven` is true nothing is better or, without an allocation, nothing meets them.
    """

    allocation: Allocation | None = None
    score: float = float("nan")
    totals: Mapping[str, float] | None = None
    proven: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowPrice:
    """What one budget is worth while the others are kept.

    `price` is the score that one unit of the cost (`unit`: byte, second) buys, by the Lagrangian
    dual. `without` is the least score when the budget is dropped; it `binds` if that is lower
    (None: neither found nor ruled out in time). `raised` is the least score at `raised_limit`.
    `better` has the smallest total of the cost of all that score strictly less than the optimum,
    `cheaper` the least score of all whose total of the cost is strictly below the optimum's.
    """

    cost: str
    unit: str
    limit: float
    price: float
    binds: bool | None
    without: Alternative
    raised_limit: float
    raised: Alternative
    better: Alternative
    cheaper: Alternative

    def told(self, optimum: Alternative) -> str:
        """Return one or two sentences for people."""
        amount = quantity(self.raised_limit, self.unit)
        more = percent(self.raised_limit / self.limit - 1)
        least = "" if self.raised.proven else "at least "
        if self.binds:
            first = (
                f"{self.cost}: {more} more ({amount}) buys {least}{_change(optimum, self.raised)} "
                f"(shadow price {self.price:.2g} per {_EACH.get(self.unit, self.unit)})"
            )
        elif self.binds is None:
            first = f"{self.cost}: whether more than this budget would help is not settled"
        else:
            first = f"{self.cost}: more than this budget would not help"
        neighbours = [("better", self.better)] if self.binds else []
        neighbours.append(("cheaper", self.cheaper))
        return f"{first}; {', '.join(self._neighbour(*n, optimum) for n in neighbours)}"

    def _neighbour(self, kind: str, found: Alternative, optimum: Alternative) -> str:
        if found.totals is None or optimum.totals is None:
            return f"no {kind} allocation " + ("fits" if found.proven else "was found in time")
        step = found.totals[self.cost] - optimum.totals[self.cost]
        amount = f"{quantity(abs(step), self.unit)} {'more' if step > 0 else 'less'}"
        article = "the next" if found.proven else "a"
        return f"{article} {kind} allocation takes {amount} for {_change(optimum, found)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowPrices:
    """The allocation of least additive score under the budgets, and what each of them is worth."""

    optimum: Alternative
    budgets: tuple[ShadowPrice, ...]

    def told(self) -> list[str]:
        """Return a line of one or two sentences for each budget."""
        return [budget.told(self.optimum) for budget in self.budgets]


def _change(optimum: Alternative, other: Alternative) -> str:
    """Return "12 % less loss"; scores that are not positive are told as they are."""
    if other.allocation is None:
        return "what was not found in time"
    if other.score == optimum.score:
        return "no less loss"
    word = "less" if other.score < optimum.score else "more"
    if optimum.score <= 0:
        return f"{word} loss ({optimum.score:.3g} to {other.score:.3g})"
    if other.score > _MANY_TIMES * optimum.score:
        return f"{other.score / optimum.score:.3g} times the loss"
    return f"{percent(abs(other.score - optimum.score) / optimum.score)} {word} loss"
