"""Level switches: one unit gains, another one pays, and every budget still holds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpq.core.problem import Problem
from mpq.core.tables import Floats, Indices
from solvers.knapsack import Knapsack, fitting

_ROOM = 10**7  # elements of the largest array


@dataclass(frozen=True, slots=True)
class Switches:
    """Random changes of choices that meet a problem, into others that do."""

    problem: Problem
    knapsack: Knapsack

    @classmethod
    def of(cls, problem: Problem) -> Switches | None:
        """Return the switches of a problem; None where there is one choice at most."""
        everything = np.arange(len(problem.cells))
        rows = [row.relaxed() for row in problem.rows()]
        knapsack = fitting(problem, problem.sensitivity.values, rows, everything)
        if knapsack is None or len(knapsack.cells) == len(problem.cells.units):
            return None
        return cls(problem, knapsack)

    def mutated(
        self, parent: Indices, count: int, most: int, rng: np.random.Generator
    ) -> list[Indices]:
        """Return up to `count` different changes of a parent, each one to `most` switches away.

        How many switches is the lesser of two draws, so few are more likely (EvoPress, Sieberling
        et al. 2025). What takes a forbidden pair or rounds to over a budget is left out.
        """
        count = min(count, max(1, _ROOM // (len(self.knapsack.cells) * (1 + len(self._weights)))))
        start = np.searchsorted(self.knapsack.cells, parent)
        choices = np.tile(start, (count, 1))
        steps = rng.integers(1, most + 1, (2, count)).min(axis=0)
        for step in range(most):
            moving = np.flatnonzero(steps > step)
            choices[moving] = self._switched(choices[moving], rng)
        different = np.unique(choices[(choices != start).any(axis=1)], axis=0)
        cells = self.knapsack.cells[rng.permutation(different)]
        return [choice for choice in cells if self.problem.meets(choice)]

    @property
    def _weights(self) -> Floats:
        return self.knapsack.weights

    def _switched(self, choices: Indices, rng: np.random.Generator) -> Indices:
        """Return (n, units) entries after one switch each, unchanged where none fits.

        The first entry is any other one; where it gains and fits, that is all. Else the second
        one, of another unit, is drawn from those that go the other way and make both fit.
        """
        rows, units = np.arange(len(choices)), self.knapsack.units
        value = self.knapsack.objective
        current = choices[:, units]
        taken = current == np.arange(len(units))
        change = value - value[current]
        gains = change < 0
        room = self.knapsack.slack[:, None] - self._weights[:, choices].sum(axis=2)
        first = np.where(taken, -1.0, rng.random(taken.shape)).argmax(axis=1)
        extra = self._weights[:, first] - self._weights[:, current[rows, first]]
        first_gains = gains[rows, first]
        alone = first_gains & (extra <= room).all(axis=0)
        both = ~taken & (units != units[first][:, None]) & (gains != first_gains[:, None])
        for weights, used, left in zip(self._weights, extra, room, strict=True):
            both &= weights - weights[current] <= (left - used)[:, None]
        second = np.where(both, rng.random(both.shape), -1.0).argmax(axis=1)
        paired = ~alone & both.any(axis=1)
        switched = choices.copy()
        moved = alone | paired
        switched[rows[moved], units[first[moved]]] = first[moved]
        switched[rows[paired], units[second[paired]]] = second[paired]
        return switched
