"""Joint costs in a knapsack: terms of two entries, and the linear program that counts them.

A term counts where two entries are both taken. Terms of two units that have one value and make
up a rectangle of entries are one block, with one variable. A block of value c > 0 adds c z with
z >= x_i + x_j - 1, x the sums over its entries (McCormick 1976). The largest saving m of two units
is granted beforehand and paid back where it is not had: block b pays (m + c_b) y_b, no block at
all pays m n, with n + sum y >= 1 and y_b <= x_i, y_b <= x_j. As a unit takes one entry, at most
one block counts, so that the blocks within some entries have sum y <= x: else parts of an entry
would save several times. An entry that has a block with every entry of the other unit has one of
them: sum y >= x.
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
        sizes = np.bincount(units).tolist()
        for (row, u, v), terms in grouped.items():
            of_pair, of_links = _counted(_blocks(terms), (sizes[u], sizes[v]), len(rows))
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


def _counted(
    blocks: Sequence[_Block], sizes: tuple[int, int], begin: int
) -> tuple[list[float], list[Link]]:
    """Return the amounts of the variables of two units, numbered from `begin`, and the links."""
    numbers = range(begin, begin + len(blocks))
    sides = [[block.first for block in blocks], [block.second for block in blocks]]
    full = [
        _full(blocks, own, other, size)
        for own, other, size in zip(sides, sides[::-1], sizes[::-1], strict=True)
    ]
    links = [
        Link((z,), (*sorted(block.first), *sorted(block.second)), 1.0, -1.0)
        for z, block in zip(numbers, blocks, strict=True)
        if block.value > 0 and not (block.first <= full[0] or block.second <= full[1])
    ]
    most = max(0.0, *(-block.value for block in blocks))
    if most == 0.0 and not any(full):
        return [block.value for block in blocks], links
    amounts = [*(most + block.value for block in blocks), most]
    links.append(Link((*numbers, numbers.stop), (), 1.0, 1.0))
    for own, always in zip(sides, full, strict=True):
        for entries in dict.fromkeys(own):
            inside = tuple(w for w, side in zip(numbers, own, strict=True) if side <= entries)
            links.append(Link(inside, tuple(sorted(entries)), -1.0, 0.0))
        for entry in sorted(always):
            beside = tuple(w for w, side in zip(numbers, own, strict=True) if entry in side)
            links.append(Link(beside, (entry,), 1.0, 0.0))
    return amounts, links


def _full(
    blocks: Sequence[_Block],
    own: Sequence[frozenset[int]],
    other: Sequence[frozenset[int]],
    size: int,
) -> frozenset[int]:
    """Return the entries of one unit with a block for each entry of the other, not all savings."""
    beside: dict[int, int] = defaultdict(int)
    costs: set[int] = set()
    for block, mine, others in zip(blocks, own, other, strict=True):
        for entry in mine:
            beside[entry] += len(others)
            if block.value > 0:
                costs.add(entry)
    return frozenset(entry for entry in costs if beside[entry] == size)


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
