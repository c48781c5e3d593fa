"""Choices of a problem as named parameters, and which of them were tried."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mpq.core.tables import Indices
from solvers.descent import repair
from solvers.knapsack import with_terms
from solvers.switches import Switches

_LONGEST_NAME = 500  # a database keeps 512 characters of it
_NEIGHBOURS = 32  # drawn around a choice that was tried before
_MOST_SWITCHES = 3


class Parameters:
    """One categorical parameter, the scheme, for each unit that has a choice.

    Schemes that fit beside no choice of the other units are left out.
    """

    def __init__(self, switches: Switches, additive: Indices, seed: int) -> None:
        knapsack = switches.knapsack
        self._whole = with_terms(switches.problem, knapsack)
        self._switches, self._rng = switches, np.random.default_rng(seed)
        self._additive = np.searchsorted(knapsack.cells, additive)
        self._tried: set[bytes] = set()
        self.fruitless = 0
        schemes = [str(scheme) for _, scheme in switches.problem.cells]
        labels = [schemes[cell] for cell in knapsack.cells.tolist()]
        self._entries: dict[str, dict[str, int]] = {}  # of each parameter, by scheme
        for unit, name in enumerate(switches.problem.cells.units):
            entries = range(int(knapsack.starts[unit]), int(knapsack.starts[unit + 1]))
            if len(entries) > 1:  # numbered: a sampler goes by the order of names
                self._entries[f"{unit:04d} {name}"[:_LONGEST_NAME]] = {
                    labels[i]: i for i in entries
                }

    @property
    def schemes(self) -> dict[str, tuple[str, ...]]:
        """Return the schemes that each parameter can be."""
        return {name: tuple(entries) for name, entries in self._entries.items()}

    def of(self, choice: Indices) -> dict[str, str]:
        """Return the parameters of a choice of cells, which counts as tried from now on."""
        self._tried.add(choice.tobytes())
        chosen = set(np.searchsorted(self._switches.knapsack.cells, choice).tolist())
        return {
            name: next(scheme for scheme, entry in entries.items() if entry in chosen)
            for name, entries in self._entries.items()
        }

    def choice(self, params: Mapping[str, str]) -> Indices:
        """Return the choice of cells that parameters stand for."""
        return self._switches.knapsack.cells[self._chosen(params)]

    def fitted(self, params: Mapping[str, str]) -> dict[str, str]:
        """Return parameters near the given ones that meet the problem and were not tried yet.

        Where nothing new is found they were tried, and `fruitless` counts on.
        """
        knapsack = self._switches.knapsack
        repaired = repair(self._whole, self._chosen(params))
        choice = knapsack.cells[self._additive if repaired is None else repaired]
        if not self._switches.problem.meets(choice):
            choice = knapsack.cells[self._additive]
        if choice.tobytes() in self._tried:
            near = self._switches.mutated(choice, _NEIGHBOURS, _MOST_SWITCHES, self._rng)
            new = [other for other in near if other.tobytes() not in self._tried]
            self.fruitless = 0 if new else self.fruitless + 1
            choice = new[0] if new else choice
        return self.of(choice)

    def _chosen(self, params: Mapping[str, str]) -> Indices:
        chosen = self._additive.copy()  # what has no parameter has no choice
        entries = [self._entries[name][scheme] for name, scheme in params.items()]
        chosen[self._switches.knapsack.units[entries]] = entries
        return chosen
