"""Why nothing fits, and what would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """Conditions that cannot be met together: the costs of budgets, the names of constraints.

    `forbidden` tells whether the forbidden pairs, taken as one condition, are among them.
    """

    budgets: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()
    forbidden: bool = False

    def __len__(self) -> int:
        return len(self.budgets) + len(self.constraints) + self.forbidden


@dataclass(frozen=True, slots=True, kw_only=True)
class Infeasibility:
    """Why nothing fits: per budget its smallest reachable value, alone and beside the others.

    `smallest[cost]` is reachable when only that budget counts; `relaxed[cost]` is the limit
    that would be enough if the other budgets stay (None: not even without this budget).
    `names` are the budgets that cannot be met. Of the `conflict` no condition can be left out:
    without any one of them the others can be met. `raised` are limits that are enough together,
    for the least common factor by which all budgets in conflict have to be raised, which is
    `raised_by` (0.08: by 8 %; None where no budget is to blame).
    """

    names: tuple[str, ...]
    smallest: Mapping[str, float]
    relaxed: Mapping[str, float | None]
    message: str
    conflict: Conflict = field(default_factory=Conflict)
    raised: Mapping[str, float] = field(default_factory=dict)
    raised_by: float | None = None
    advice: str = ""

    @property
    def told(self) -> str:
        """The message and, where there is any, the advice about the budgets together: a line."""
        return f"{self.message}; {self.advice}" if self.advice else self.message
