"""What a stochastic estimator returns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean of independent draws and its standard error.

    `mean` +- t * `stderr` with Student's t of `draws` - 1 degrees of freedom holds the exact value
    as often as t says; `stderr` is 0 where the value is exact, infinite after a single draw.
    """

    mean: float
    stderr: float
    draws: int

    @classmethod
    def of(cls, draws: torch.Tensor, exact: float = 0.0) -> Estimate:
        """Return the estimate that independent draws, shape (n,), and an exact part add up to."""
        count = len(draws)
        wide = draws.double()
        stderr = float(wide.std()) / math.sqrt(count) if count > 1 else math.inf
        return cls(exact + float(wide.mean()), stderr, count)
