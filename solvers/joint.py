"""Joint costs in a knapsack: terms of two entries, and the linear program that counts them.

A term counts where two entries are both taken. Terms of two units that have one value and make
up a rectangle of entries are one block, with one variable (McCormick 1976). A block of value c > 0
adds c z with z >= x_i + x_j - 1, x the sums over its entries. The largest saving m of two units is
granted beforehand, and what is not had of it is paid for: a block of value c < 0 pays (m + c) y
with y <= x_i and y <= x_j, no block at all pays m n, and n + sum y >= 1. As a unit takes one
entry, the blocks of some entries together have sum y <= x: else parts of an entry would save
several times.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mpq.core.errors import InvalidInputError
from mpq.core.joint import JointCosts
from mpq.core.problem import Constraint, Problem
from mpq.core.sums import exact_sum
from mpq.core.tables import Cells, Floats, Indices

OBJECTIVE = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Term t adds `values[t]` to row `rows[t]`, or the objective, with both its entries.

    `granted` (rows + 1,) is the sum of the largest saving of each two units, the objective last.
    """

    first: Indices
    second: Indices
    values: Floats
    rows: Indices
    granted: Floats

    @classmethod
    def of(
        cls,
        rows: Sequence[Constraint],
        objective: JointCosts | None,
        cells: Cells,
        kept: Indices,
    ) -> Terms | None:
        """Return the terms among the `kept` cells, as entries; None where there are none."""
        parts = [(OBJECTIVE, objective), *((k, row.joint) for k, row in enumerate(rows))]
        found = [(number, joint) for number, joint in parts if joint]
        if not found:
            return None
        entry = np.full(len(cells), -1)
        entry[kept] = np.arange(len(kept))
        first = entry[np.concatenate([joint.first for _, joint in found])]
        second = entry[np.concatenate([joint.second for _, joint in found])]
        values = np.concatenate([joint.values for _, joint in found])
        numbers = np.repeat([number for number, _ in found], [len(joint) for _, joint in found])
        alive = (first >= 0) & (second >= 0) & (values != 0)
        if not alive.any():
            return None
        first, second, values, numbers = (a[alive] for a in (first, second, values, numbers))
        return cls(
            first=first,
            second=second,
            values=values,
            rows=numbers,
            granted=_granted(cells, kept[first], kept[second], values, numbers, len(rows)),
        )

    def fields(self, choice: Indices, size: int, num_rows: int) -> Floats:
        """Return what each entry adds beside a choice (rows + 1, size), the objective last."""
        taken = np.zeros(size, np.bool_)
        taken[choice] = True
        fields: Floats = np.zeros((num_rows + 1, size))
        for one, other in ((self.first, self.second), (self.second, self.first)):
            beside = taken[other]
            np.add.at(fields, (self.rows[beside], one[beside]), self.values[beside])
        return fields

    def kinds(self, size: int) -> Indices:
        """Return a number for each entry, equal where the terms are: 0 for none."""
        held: dict[int, list[tuple[int, int, float]]] = defaultdict(list)
        for row, i, j, value in zip(
            self.rows.tolist(),
            self.first.tolist(),
            self.second.tolist(),
            self.values.tolist(),
            strict=True,
        ):
            held[i].append((row, j, value))
            held[j].append((row, i, value))
        numbers: dict[tuple[tuple[int, int, float], ...], int] = {}
        kinds = np.zeros(size, np.int64)
        for entry, of_entry in held.items():
            kinds[entry] = numbers.setdefault(tuple(sorted(of_entry)), len(numbers) + 1)
        return kinds

    def linked(self, units: Indices, slack: Floats) -> Linked:
        """Return the variables and conditions that count the terms within some slack."""
        grouped: dict[tuple[int, int, int], list[tuple[int, int, float]]] = defaultdict(list)
        one, other = units[self.first], units[self.second]
        for t in range(len(self.values)):
            i, j = int(self.first[t]), int(self.second[t])
            key = (int(self.rows[t]), int(one[t]), int(other[t]))
            grouped[key].append((i, j, float(self.values[t])))
        rows: list[int] = []
        amounts: list[float] = []
        links: list[Link] = []
        for (row, _, _), terms in grouped.items():
            of_pair, of_links = _counted(_blocks(terms), len(rows))
            rows += [row] * len(of_pair)
            amounts += of_pair
            links += of_links
        fits = np.array(amounts) <= np.append(slack, np.inf)[rows]  # the objective is row -1
        return Linked(
            rows=np.array(rows),
            amounts=np.where(fits, amounts, 0.0),
            most=np.where(fits, 1.0, 0.0),
            links=tuple(links),
        )


@dataclass(frozen=True, slots=True)
class Link:
    """The condition `sign` (sum of some variables - sum of some entries) >= `least`."""

    variables: tuple[int, ...]
    entries: tuple[int, ...]
    sign: float
    least: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Linked:
    """Variables z from 0 to `most`, 1 or 0, and what links them to the entries.

    Variable j adds `amounts[j]` >= 0 to row `rows[j]`, or to the objective; it is at most 0 where
    that is more than the row has.
    """

    rows: Indices
    amounts: Floats
    most: Floats
    links: tuple[Link, ...]


@dataclass(frozen=True, slots=True)
class _Block:
    """All pairs of an entry of one unit and one of another have the same term."""

    first: frozenset[int]
    second: frozenset[int]
    value: float


def _blocks(terms: Sequence[tuple[int, int, float]]) -> list[_Block]:
    """Put the terms of two units together: of one value, the entries with the same partners."""
    partners: dict[tuple[float, int], set[int]] = defaultdict(set)
    for i, j, value in terms:
        partners[value, i].add(j)
    alike: dict[tuple[float, frozenset[int]], set[int]] = defaultdict(set)
    for (value, i), others in partners.items():
        alike[value, frozenset(others)].add(i)
    return [_Block(frozenset(firsts), others, v) for (v, others), firsts in alike.items()]


def _counted(blocks: Sequence[_Block], begin: int) -> tuple[list[float], list[Link]]:
    """Return the amounts of the variables of two units, numbered from `begin`, and the links."""
    saving = [block for block in blocks if block.value < 0]
    costing = [block for block in blocks if block.value > 0]
    amounts = [block.value for block in costing]
    links = [
        Link((begin + z,), (*sorted(block.first), *sorted(block.second)), 1.0, -1.0)
        for z, block in enumerate(costing)
    ]
    if not saving:
        return amounts, links
    most = max(-block.value for block in saving)
    own = range(begin + len(amounts), begin + len(amounts) + len(saving))
    links.append(Link((*own, own.stop), (), 1.0, 1.0))
    amounts += [*(most + block.value for block in saving), most]
    for sides in ([block.first for block in saving], [block.second for block in saving]):
        for entries in dict.fromkeys(sides):
            inside = tuple(y for y, side in zip(own, sides, strict=True) if side <= entries)
            links.append(Link(inside, tuple(sorted(entries)), -1.0, 0.0))
    return amounts, links


def _granted(
    cells: Cells, first: Indices, second: Indices, values: Floats, rows: Indices, num_rows: int
) -> Floats:
    """Return the sum of the largest saving of each two units, for each row and the objective."""
    one, other = (np.searchsorted(cells.offsets, c, "right") - 1 for c in (first, second))
    order = np.lexsort((values, other, one, rows))
    keys = np.stack([rows, one, other])[:, order]
    begins = order[np.r_[True, (np.diff(keys, axis=1) != 0).any(axis=0)]]
    largest = np.maximum(-values[begins], 0.0)
    of_row = [exact_sum(largest[rows[begins] == k]) for k in (*range(num_rows), OBJECTIVE)]
    return np.array(of_row)


def refuse_joint(problem: Problem, solver: str, further: Iterable[str] = ()) -> None:
    """Raise InvalidInputError (`joint_costs`) where a cost that is limited, or one more, has any.

    For solvers that know no more than a number for each cell.
    """
    for cost in (*problem.limits(), *further):
        joint = problem.costs[cost].joint
        if joint:
            raise InvalidInputError(
                "joint_costs",
                f"{solver} adds up what each unit costs alone, and {cost} counts {len(joint):,} "
                "pairs of cells: use solver 'auto' or 'ilp'",
            )
