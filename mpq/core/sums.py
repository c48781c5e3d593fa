"""The correctly rounded sum of many numbers, in little time."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_FEW = 4096
_PASSES = 8
_LARGEST = 1020  # exponent beyond which the unit of a pass might overflow


def exact_sum(values: npt.NDArray[np.float64]) -> float:
    """Return what `math.fsum` returns, of many numbers several times as fast.

    Each pass takes from all numbers the bits above a common unit, so large that their sum is
    exact in any order (error-free vector transformation; Rump, Ogita and Oishi 2008); the few
    sums, and what is left after some passes, are added by `fsum`.
    """
    if len(values) < _FEW:
        return math.fsum(values.tolist())
    spare = len(values).bit_length() + 1
    parts: list[float] = []
    for _ in range(_PASSES):
        largest = float(np.abs(values).max())
        exponent = math.frexp(largest)[1] + spare
        if largest == 0.0 or exponent > _LARGEST:
            break
        unit = math.ldexp(1.0, exponent)
        high = (unit + values) - unit
        parts.append(float(high.sum()))
        values = values - high
    if values.any():
        parts += values.tolist()
    return math.fsum(parts)
