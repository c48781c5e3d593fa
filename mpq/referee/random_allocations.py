"""Random allocations that use their budgets: what predictions can be tried on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mpq.auto import optimum
from mpq.core.formats import Scheme
from mpq.core.problem import Allocation, Budget
from mpq.core.tables import Cells, CostTable, SensitivityTable

_UNIT_SPREAD = 2.0  # standard deviation of the logarithm: about one and a half bits of weights
_CELL_SPREAD = 0.5
_TRIES = 3  # draws for each allocation that is wanted


def random_allocations(
    cells: Cells,
    costs: Mapping[str, CostTable],
    budgets: Sequence[Budget],
    count: int,
    seed: int,
) -> list[Allocation]:
    """Return up to `count` different allocations within the budgets that no metric proposed.

    Each is the optimum of made-up scores: a log-normal importance of the unit times 4^-bits of
    weights plus 4^-bits of activations, times log-normal noise of the cell. So more important
    units get more bits, which ones are important is chance, and the budgets are used up. Cost:
    one exact solution each.
    """
    generator = np.random.default_rng(seed)
    rounding = np.array([_rounding(scheme) for _, scheme in cells])
    sizes = np.diff(cells.offsets)
    found: dict[Allocation, None] = {}
    for _ in range(_TRIES * count):
        if len(found) == count:
            break
        importance = np.exp(_UNIT_SPREAD * generator.standard_normal(len(sizes)))
        noise = np.exp(_CELL_SPREAD * generator.standard_normal(len(cells)))
        table = SensitivityTable(
            metric="random",
            cells=cells,
            values=np.repeat(importance, sizes) * rounding * noise,
            stderr=np.zeros(len(cells)),
        )
        found[optimum(table, costs, budgets)] = None
    return list(found)


def _rounding(scheme: Scheme) -> float:
    """Return the rough size of the squared error that a scheme makes."""
    return sum(4.0 ** -min(16, fmt.bits) for fmt in (scheme.weights, scheme.activations))
