"""Limits on measured metrics: what a candidate must reach to be chosen at all."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from mpq.core.errors import InvalidInputError

_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_LIMIT = re.compile(
    r"\s*(?P<metric>[^\s<>=](?:[^<>=]*[^\s<>=])?)\s*(?P<relation><=|>=)\s*"
    rf"(?P<bound>{_NUMBER})\s*(?P<percent>%?)(?:\s+from\s+(?P<base>{_NUMBER}))?\s*"
)
_CHANGE = re.compile(r"(?P<metric>.*\S)\s+(?P<change>drop|rise)")
_ROUNDING = 1e-12  # relative: what is lost exactly as allowed meets the limit


@dataclass(frozen=True, slots=True)
class Limit:
    """A bound on a metric: "accuracy >= 0.99", "ssim <= 0.02", "accuracy drop <= 1%".

    A `change` bounds how far the metric may drop or rise from `base`, what the unquantized
    network has: "1%" is relative, a hundredth of the size of that value (0.97 may become 0.9603),
    "0.01" is in the metric's own unit (0.97 may become 0.96). The base is measured, or written
    behind: "accuracy drop <= 1% from 0.97".
    """

    metric: str
    relation: Literal["<=", ">="]
    bound: float
    change: Literal["", "drop", "rise"] = ""
    percent: bool = False
    base: float | None = None

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Read one limit; raises InvalidInputError for what is none."""
        found = _LIMIT.fullmatch(text) if isinstance(text, str) else None
        if found is None or not math.isfinite(float(found["bound"])):
            raise _unreadable(text)
        relation: Literal["<=", ">="] = "<=" if found["relation"] == "<=" else ">="
        bound = float(found["bound"])
        changes = _CHANGE.fullmatch(found["metric"])
        if changes is None:
            if found["percent"] or found["base"]:
                raise _unreadable(text)
            return cls(found["metric"], relation, bound)
        change: Literal["drop", "rise"] = "drop" if changes["change"] == "drop" else "rise"
        if relation == ">=" or bound < 0:
            raise InvalidInputError(
                "limit",
                f"limit {text!r}: a {change} is limited from above, write for example "
                f"'{changes['metric']} {change} <= 1%'",
            )
        base = None if found["base"] is None else float(found["base"])
        return cls(changes["metric"], relation, bound, change, bool(found["percent"]), base)

    def from_base(self, value: float) -> Limit:
        """Return the limit with what the unquantized network has, where it needs that.

        Raises InvalidInputError where nothing can be relative to the value: 0 or NaN.
        """
        if not self.change or self.base is not None:
            return self
        if math.isnan(value) or (self.percent and value == 0):
            raise InvalidInputError(
                "limit",
                f"limit '{self}': the unquantized network has {self.metric} {value:g}, nothing is "
                f"relative to that: limit {self.metric} itself",
            )
        return replace(self, base=float(value))

    @property
    def threshold(self) -> float:
        """The value that just meets the limit; a change needs its base."""
        if not self.change:
            return self.bound
        if self.base is None:
            raise ValueError(f"limit '{self}' has no base yet")
        size = abs(self.base)
        amount = self.bound / 100 * size if self.percent else self.bound
        amount += _ROUNDING * max(size, amount)
        return self.base - amount if self.change == "drop" else self.base + amount

    @property
    def text(self) -> str:
        """The text that `parse` reads back to the same limit."""
        return self._written(repr)

    def __str__(self) -> str:
        return self._written(lambda number: f"{number:g}")

    def _written(self, number: Callable[[float], str]) -> str:
        change = f" {self.change}" if self.change else ""
        base = "" if self.base is None else f" from {number(self.base)}"
        percent = "%" if self.percent else ""
        return f"{self.metric}{change} {self.relation} {number(self.bound)}{percent}{base}"

    @property
    def _is_upper(self) -> bool:
        return self.change == "rise" or (not self.change and self.relation == "<=")

    def met(self, value: float) -> bool:
        """Tell whether a value is within the limit; NaN is not."""
        return value <= self.threshold if self._is_upper else value >= self.threshold

    def nearest(self, values: Iterable[float]) -> float:
        """Return the best of some values, NaN where there is no number."""
        numbers = [value for value in values if not math.isnan(value)]
        if not numbers:
            return math.nan
        return min(numbers) if self._is_upper else max(numbers)


def _unreadable(text: object) -> InvalidInputError:
    return InvalidInputError(
        "limit",
        f"cannot read limit {text!r}: write a metric, <= or >= and a number, for example "
        "'accuracy >= 0.99', 'ssim <= 0.02' or 'accuracy drop <= 1%'",
    )
