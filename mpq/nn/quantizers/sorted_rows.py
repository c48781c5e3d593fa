"""Rows of numbers in order, with the sums of any segment of them at once."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F


def middles(numbers: torch.Tensor) -> torch.Tensor:
    """Return the middle between each two neighbours of ascending numbers, float32."""
    return ((numbers[:, 1:] + numbers[:, :-1]) / 2).float()


class SortedRows:
    """Rows (rows, n) sorted once, with prefix sums in float64.

    One-dimensional fits only need the weight and the moment of the numbers between boundaries,
    which take a search in each row instead of a pass over it. Numbers without weight count for
    nothing.
    """

    def __init__(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        if weights is None:
            self.values = torch.from_numpy(np.sort(rows.numpy(), axis=1))  # much faster than torch
            each = torch.ones_like(rows).double()
        else:
            self.values, order = rows.sort(dim=1)
            each = weights.gather(1, order).double()
        wide = self.values.double()
        self.weight = F.pad(each.cumsum(1), (1, 0))  # (rows, n + 1): of all before
        self.moment = F.pad((each * wide).cumsum(1), (1, 0))

    def segments(self, boundaries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return weight, moment and end of the segments between ascending boundaries.

        Boundaries are float32 (rows, k) and belong to the segment below them; weights and moments
        are (rows, k + 1), ends (rows, k).
        """
        ends = torch.searchsorted(self.values, boundaries.contiguous(), right=True)
        edges = F.pad(F.pad(ends, (1, 0)), (0, 1), value=self.values.shape[1])
        return self.weight.gather(1, edges).diff(), self.moment.gather(1, edges).diff(), ends
