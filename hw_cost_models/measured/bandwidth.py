"""How fast one thread reads memory: what tells kernels that wait for it from those that compute."""

from __future__ import annotations

import functools
import time

import numpy as np

_BYTES = 64_000_000  # does not fit into a cache
_READS = 12


@functools.cache
def bytes_per_second() -> float:
    """Return the speed of one thread that reads 64 MB, the fastest of 12 times."""
    numbers = np.ones(_BYTES // 8, np.int64)  # zeros would all be one page, in cache
    best = float("inf")
    for _ in range(_READS):
        start = time.perf_counter_ns()
        numbers.max()
        best = min(best, (time.perf_counter_ns() - start) * 1e-9)
    return _BYTES / best
