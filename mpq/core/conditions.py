"""Conditions on the numbers of finished runs, by which they are found."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from mpq.core.budgets import AMOUNTS
from mpq.core.errors import InvalidInputError, unknown

_CONDITION = re.compile(
    r"\s*(?P<name>[^<>=]*[^\s<>=])\s*(?P<relation><=|>=)\s*"
    r"(?P<amount>[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<unit>[A-Za-z]*)\s*"
)
_NAME = re.compile(r"[^\x00-\x1f\"'\\<>=$\[\]]{1,200}")  # what no path into JSON needs quoted


@dataclass(frozen=True, slots=True)
class Condition:
    """A bound on a number of the chosen allocation: "memory <= 4 MB", "divergence <= 0.1".

    `name` is "divergence" (held-out, measured), "predicted" (the predicted loss), a cost, or a
    metric of `evaluate`; `bound` is in the unit that it is stored in (bytes, s, ...).
    """

    name: str
    relation: Literal["<=", ">="]
    bound: float

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read one condition; raises InvalidInputError (`condition`)."""
        found = _CONDITION.fullmatch(text) if isinstance(text, str) and len(text) < 300 else None
        if found is None or not math.isfinite(float(found["amount"])):
            raise InvalidInputError(
                "condition",
                f"cannot read the condition {str(text)[:300]!r}: write for example "
                "'divergence <= 0.1', 'memory <= 4 MB' or 'accuracy >= 0.99'",
            )
        if found["unit"] and found["unit"] not in AMOUNTS:
            raise unknown("unit", found["unit"], AMOUNTS)
        relation: Literal["<=", ">="] = "<=" if found["relation"] == "<=" else ">="
        scale = AMOUNTS[found["unit"]] if found["unit"] else 1.0
        return cls(checked_name(found["name"]), relation, float(found["amount"]) * scale)


def checked_name(name: str) -> str:
    """Return the name of a number; raises InvalidInputError (`number_name`) for what is none."""
    if not _NAME.fullmatch(name):
        raise InvalidInputError(
            "number_name",
            f"{name[:200]!r} names no number of a run: write 'divergence', 'predicted', a cost "
            "such as 'memory', or a metric",
        )
    return name
