"""Say where a metric found that quantization would help: curvature is not always positive."""

from __future__ import annotations

import warnings

import numpy as np

from mpq.core.errors import MpqWarning
from mpq.core.tables import SensitivityTable

_NAMED = 5


def warn_of_negative(table: SensitivityTable) -> None:
    """Warn, naming the units, where scores are negative; the table keeps them as they are."""
    cells = table.cells
    below = np.flatnonzero(table.values < 0)
    numbers = np.unique(np.searchsorted(cells.offsets, below, "right") - 1)
    units = [cells.units[number] for number in numbers]
    if units:
        more = ", ..." if len(units) > _NAMED else ""
        warnings.warn(
            f"{table.metric} is negative for {len(units)} of {len(cells.units)} units, which "
            f"count as free where a choice is made: {', '.join(units[:_NAMED])}{more}; "
            f"metric='gauss_newton' is never negative",
            MpqWarning,
            stacklevel=3,
        )
