"""A good first choice from the linear relaxation."""

from __future__ import annotations

import numpy as np

from mpq.core.tables import Indices
from solvers.descent import descend, repair
from solvers.knapsack import Knapsack
from solvers.relaxation import Relaxation


def round_to_fit(knapsack: Knapsack, relaxed: Relaxation) -> Indices | None:
    """Return entries that fit: the largest share of each unit, repaired, then improved.

    All but about one unit per budget are whole in the relaxed optimum already. None where no
    fitting choice is found that way.
    """
    order = np.lexsort((-relaxed.shares, knapsack.units))
    choice = repair(knapsack, order[knapsack.starts[:-1]])
    return None if choice is None else descend(knapsack, choice, prices=relaxed.prices)
