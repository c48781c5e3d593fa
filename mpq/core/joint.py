"""What two units cost or save together, beside what each of them costs alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mpq.core.errors import InvalidInputError
from mpq.core.quantities import quantity
from mpq.core.sums import exact_sum

Mask = npt.NDArray[np.bool_]

if TYPE_CHECKING:
    from mpq.core.tables import Cell, Cells, CostTable, Floats, Indices


@dataclass(frozen=True, slots=True, kw_only=True)
class JointCosts:
    """Terms `values` (n,) of any sign, each added where cells `first` and `second` are both chosen.

    The two cells are of different units: two neighbours in int8 save the dequantize and quantize
    between them, formats that differ cost a change of layout. Pairs are kept in ascending order,
    the lesser cell first; what is given twice for a pair is added up. Raises InvalidInputError
    (`joint`, `table_not_finite`) for cells of one unit or none, or numbers that are not finite.
    """

    cells: Cells
    first: Indices
    second: Indices
    values: Floats

    def __post_init__(self) -> None:
        first, second = _numbers(self.first), _numbers(self.second)
        values = np.array(self.values, np.float64)
        if not (first.ndim == 1 and first.shape == second.shape == values.shape):
            raise InvalidInputError(
                "joint",
                f"joint costs need as many first cells as second cells and values, got "
                f"{first.shape}, {second.shape} and {values.shape}",
            )
        self._check(first, second, values)
        pairs = np.sort(np.stack([first, second], axis=1), axis=1)
        found, of_term = np.unique(pairs, axis=0, return_inverse=True)
        if len(found) < len(pairs):
            order = np.argsort(of_term.ravel(), kind="stable")
            ends = np.cumsum(np.bincount(of_term.ravel()))
            values = np.array([exact_sum(part) for part in np.split(values[order], ends[:-1])])
        else:
            values = values[np.argsort(of_term.ravel())]
        kept = {"first": found[:, 0].copy(), "second": found[:, 1].copy(), "values": values}
        for name, array in kept.items():
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    def _check(self, first: Indices, second: Indices, values: Floats) -> None:
        outside = [n for n in (*first, *second) if not 0 <= n < len(self.cells)]
        if outside:
            raise InvalidInputError(
                "joint", f"joint costs name cell {outside[0]}, the last is {len(self.cells) - 1}"
            )
        one, other = (np.searchsorted(self.cells.offsets, n, "right") - 1 for n in (first, second))
        if (one == other).any():
            unit = self.cells.units[int(one[one == other][0])]
            raise InvalidInputError(
                "joint",
                f"a joint cost is of two units, got unit {unit!r} twice: what one unit costs "
                "alone goes into the values of the table",
            )
        if not np.isfinite(values).all():
            bad = int(np.flatnonzero(~np.isfinite(values))[0])
            pair = " and ".join(repr(self.cells.units[int(u[bad])]) for u in (one, other))
            raise InvalidInputError(
                "table_not_finite",
                f"the joint cost of {pair} is {values[bad]}",
            )

    @classmethod
    def from_cells(cls, cells: Cells, values: Mapping[tuple[Cell, Cell], float]) -> JointCosts:
        """Build them from a mapping of pairs of cells."""
        pairs = [(cells.index(one), cells.index(other)) for one, other in values]
        numbers = np.array(pairs, np.int64).reshape(-1, 2)
        return cls(
            cells=cells,
            first=numbers[:, 0],
            second=numbers[:, 1],
            values=np.array(list(values.values()), np.float64),
        )

    def __len__(self) -> int:
        return len(self.values)

    def taken(self, choice: Indices) -> Floats:
        """Return the values of the pairs that a choice of cells holds."""
        chosen = np.zeros(len(self.cells), np.bool_)
        chosen[choice] = True
        return self.values[chosen[self.first] & chosen[self.second]]

    def total(self, choice: Indices) -> float:
        """Return what the pairs in a choice of cells come to."""
        return exact_sum(self.taken(choice))

    def scaled(self, factor: float) -> JointCosts:
        """Return every value times a factor."""
        return JointCosts(
            cells=self.cells, first=self.first, second=self.second, values=factor * self.values
        )

    @classmethod
    def summed(cls, parts: Iterable[JointCosts | None]) -> JointCosts | None:
        """Return the terms of several costs over the same cells together; None for none."""
        found = [part for part in parts if part]
        if len(found) < 2:
            return found[0] if found else None
        return cls(
            cells=found[0].cells,
            first=np.concatenate([part.first for part in found]),
            second=np.concatenate([part.second for part in found]),
            values=np.concatenate([part.values for part in found]),
        )

    def moved(self, cells: Cells, begin: int) -> JointCosts:
        """Return the terms over more cells, of which its own are those from `begin` on."""
        return JointCosts(
            cells=cells,
            first=self.first + begin,
            second=self.second + begin,
            values=self.values,
        )

    def among(self, cells: Mask) -> JointCosts | None:
        """Return the terms of which both cells are in a mask (num_cells,); None for none."""
        kept = cells[self.first] & cells[self.second]
        if not kept.any():
            return None
        return JointCosts(
            cells=self.cells,
            first=self.first[kept],
            second=self.second[kept],
            values=self.values[kept],
        )

    def restrict(self, cells: Cells, numbers: Indices) -> JointCosts | None:
        """Return the terms over fewer cells (see `Cells.restrict`); None where none is left."""
        new = np.full(len(self.cells), -1)
        new[numbers] = np.arange(len(numbers))
        first, second = new[self.first], new[self.second]
        kept = (first >= 0) & (second >= 0)
        if not kept.any():
            return None
        return JointCosts(
            cells=cells, first=first[kept], second=second[kept], values=self.values[kept]
        )


def checked_joint(what: str, cells: Cells, joint: JointCosts | None) -> JointCosts | None:
    """Return joint costs over these cells, None for no pair; raises InvalidInputError (`cells`)."""
    if joint is not None and joint.cells is not cells and joint.cells != cells:
        raise InvalidInputError("cells", f"the joint costs of {what} are over other cells than it")
    return joint or None


def joint_lines(table: CostTable, choice: Indices, most: int = 10) -> list[str]:
    """Return for people what pairs of cells add to a cost, the largest `most` one by one."""
    joint = table.joint
    if joint is None:
        return []
    cells = list(joint.cells)
    chosen = set(np.asarray(choice).tolist())
    terms = zip(joint.first.tolist(), joint.second.tolist(), joint.values.tolist(), strict=True)
    taken = [(i, j, value) for i, j, value in terms if i in chosen and j in chosen]
    taken.sort(key=lambda term: -abs(term[2]))
    total = quantity(joint.total(choice), table.unit)
    lines = [f"{table.name}: {len(taken):,} of {len(joint):,} pairs of cells are taken, {total}"]
    for i, j, value in taken[:most]:
        one, other = (f"{unit} in {scheme}" for unit, scheme in (cells[i], cells[j]))
        lines.append(f"  {one} with {other}: {quantity(value, table.unit)}")
    if len(taken) > most:
        lines.append(f"  and {len(taken) - most:,} more")
    return lines


def joined_sum(values: Floats, joint: JointCosts | None, choice: Indices) -> float:
    """Return the correctly rounded sum of `values` and of the joint terms in a choice of cells."""
    if joint is None:
        return exact_sum(values)
    return exact_sum(np.concatenate([values, joint.taken(choice)]))


def _numbers(cells: npt.ArrayLike) -> npt.NDArray[Any]:
    """Return the numbers of cells as integers; raises InvalidInputError (`joint`) for others."""
    array = np.asarray(cells)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise InvalidInputError(
            "joint", f"joint costs name cells by whole numbers, got {array.dtype}"
        )
    return array.astype(np.int64)
