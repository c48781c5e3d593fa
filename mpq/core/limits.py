"""Limits on measured metrics: what a candidate must reach to be chosen at all."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mpq.core.errors import InvalidInputError

_LIMIT = re.compile(
    r"\s*(?P<metric>[^\s<>=](?:[^<>=]*[^\s<>=])?)\s*(?P<relation><=|>=)\s*"
    r"(?P<bound>[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*"
)


@dataclass(frozen=True, slots=True)
class Limit:
    """A bound on a metric, such as "accuracy >= 0.99" or "ssim <= 0.02"."""

    metric: str
    relation: Literal["<=", ">="]
    bound: float

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Read one limit; raises InvalidInputError for what is none."""
        found = _LIMIT.fullmatch(text) if isinstance(text, str) else None
        if found is None or not math.isfinite(float(found["bound"])):
            raise InvalidInputError(
                "limit",
                f"cannot read limit {text!r}: write a metric, <= or >= and a number, for example "
                "'accuracy >= 0.99' or 'ssim <= 0.02'",
            )
        relation: Literal["<=", ">="] = "<=" if found["relation"] == "<=" else ">="
        return cls(found["metric"], relation, float(found["bound"]))

    def __str__(self) -> str:
        return f"{self.metric} {self.relation} {self.bound:g}"

    def met(self, value: float) -> bool:
        """Tell whether a value is within the limit; NaN is not."""
        return value <= self.bound if self.relation == "<=" else value >= self.bound

    def nearest(self, values: Iterable[float]) -> float:
        """Return the best of some values, NaN where there is no number."""
        numbers = [value for value in values if not math.isnan(value)]
        if not numbers:
            return math.nan
        return min(numbers) if self.relation == "<=" else max(numbers)
