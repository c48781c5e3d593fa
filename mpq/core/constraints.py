"""Linear conditions on a choice of cells, beside budgets or made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from mpq.core.errors import InvalidInputError
from mpq.core.joint import JointCosts, checked_joint, joined_sum
from mpq.core.tables import Cell, Cells, CostTable, Floats, Indices, checked


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """`fixed` plus the coefficients of the chosen cells is at most `limit`.

    Coefficients (num_cells,) and limit may be of any sign; `joint` adds its terms.
    Raises InvalidInputError for numbers that are not finite.
    """

    name: str
    cells: Cells
    coefficients: Floats
    limit: float
    fixed: float = 0.0
    joint: JointCosts | None = None

    def __post_init__(self) -> None:
        what = f"constraint {self.name!r}"
        object.__setattr__(self, "joint", checked_joint(what, self.cells, self.joint))
        object.__setattr__(self, "coefficients", checked(what, self.cells, self.coefficients))
        if not (math.isfinite(self.limit) and math.isfinite(self.fixed)):
            raise InvalidInputError(
                "constraint", f"{what} needs finite numbers, got limit {self.limit!r}"
            )

    @classmethod
    def from_cells(
        cls, name: str, cells: Cells, coefficients: Mapping[Cell, float], limit: float
    ) -> Constraint:
        """Build one from the coefficients of some cells, those of all others being 0."""
        values = np.zeros(len(cells))
        for cell, coefficient in coefficients.items():
            values[cells.index(cell)] = coefficient
        return cls(name=name, cells=cells, coefficients=values, limit=limit)

    @classmethod
    def at_most(cls, cost: CostTable, limit: float) -> Constraint:
        """Return what a budget of `limit` on a cost asks for."""
        return cls(
            name=cost.name,
            cells=cost.cells,
            coefficients=cost.values,
            limit=limit,
            fixed=cost.fixed,
            joint=cost.joint,
        )

    @classmethod
    def at_least(cls, cost: CostTable, limit: float) -> Constraint:
        """Return the condition that the total of a cost is `limit` or more."""
        return cls(
            name=f"{cost.name} >= {limit:g}",
            cells=cost.cells,
            coefficients=-cost.values,
            limit=-limit,
            fixed=-cost.fixed,
            joint=cost.joint and cost.joint.scaled(-1.0),
        )

    def total(self, choice: Indices) -> float:
        """Return what a choice of cells comes to, to be compared with the limit."""
        return self.fixed + joined_sum(self.coefficients[choice], self.joint, choice)

    def met(self, choice: Indices) -> bool:
        """Tell whether a choice of cells meets it."""
        return self.total(choice) <= self.limit

    def relaxed(self) -> Constraint:
        """Return a condition without joint terms that every choice meets which meets this one.

        Each cell is granted half of the largest saving that it can have with each other unit.
        """
        if not self.joint:
            return self
        joint, saved = self.joint, np.zeros(len(self.cells))
        for one, other in ((joint.first, joint.second), (joint.second, joint.first)):
            units = np.searchsorted(self.cells.offsets, other, "right") - 1
            order = np.lexsort((joint.values, units, one))
            begins = np.flatnonzero(
                (np.diff(one[order], prepend=-1) != 0) | (np.diff(units[order], prepend=-1) != 0)
            )
            largest = order[begins]
            np.add.at(saved, one[largest], np.minimum(joint.values[largest], 0.0) / 2)
        rounding = 4 * np.spacing(np.abs(self.coefficients) + np.abs(saved)) * len(joint)
        lowered = np.where(saved < 0, self.coefficients + saved - rounding, self.coefficients)
        return replace(self, coefficients=lowered, joint=None)

    def restrict(self, cells: Cells, numbers: Indices) -> Constraint:
        """Return the condition over fewer cells (see `Cells.restrict`)."""
        joint = self.joint and self.joint.restrict(cells, numbers)
        return replace(self, cells=cells, coefficients=self.coefficients[numbers], joint=joint)
