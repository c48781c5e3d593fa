"""The stopwatch: times kernels side by side until their intervals are narrow enough."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from hw_cost_models.measured.alone import measuring_alone
from hw_cost_models.measured.interval import Estimate, estimate
from mpq.core.errors import InvalidInputError
from mpq.core.latency import KernelCase, KernelLatency

LEAST_ROUNDS = 6
# Relative standard deviations between processes minutes apart on a shared two-core machine, which
# no single process can see: of kernels that compute, and what is added for waiting for memory.
DRIFT_SD = 0.0125
MEMORY_DRIFT_SD = 0.06


@dataclass(frozen=True, slots=True)
class Op:
    """One kernel to time: `run()` executes it `runs` times, each time on other weights.

    After `rotation` runs the same weights come again, as in a network that is used again.
    `read_s` is how long the weights of one execution take to be read from memory. Where
    `returns_ns`, a run itself returns how many nanoseconds it took, by a clock of its device.
    """

    case: KernelCase
    run: Callable[[], object]
    runs: int = 1
    rotation: int = 1
    read_s: float = 0.0
    returns_ns: bool = False


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopwatch:
    """Interleaved rounds over all kernels, each beside a reference kernel.

    A round times every kernel once, in random order, between two timings of the reference. One
    timing is the fastest of a whole rotation and `inner` further runs: the rotation brings the
    weights where they are in steady use (a cache if all fit there, memory if not), and whatever
    else the machine does only adds. So times are those of an otherwise idle machine.
    Rounds go on until there are `min_rounds`, a quarter of `budget_s` has passed (a short
    measurement sees no drift) and every interval, as far as more rounds can narrow it, is within
    `target` of its median; or until `budget_s` is used and there are LEAST_ROUNDS. All kernels
    share all rounds: they are compared at the same moments. Measurements of several processes
    wait for each other. `clock` counts nanoseconds.

    An interval holds the next measurement too, so it has a least width that more rounds do not
    change: the machine's speed differs from one process to the next by `drift_sd` and, for the
    share of the time that reading the weights would take, by `memory_drift_sd`.
    """

    inner: int = 4
    min_rounds: int = 24
    target: float = 0.03
    budget_s: float = 60.0
    drift_sd: float = DRIFT_SD
    memory_drift_sd: float = MEMORY_DRIFT_SD
    seed: int = 0
    clock: Callable[[], int] = time.perf_counter_ns

    def __post_init__(self) -> None:
        if self.inner < 0 or not self.budget_s > 0 or not self.target > 0:
            raise InvalidInputError(
                "stopwatch",
                "a stopwatch needs inner >= 0, budget_s > 0 and target > 0, got "
                f"{self.inner}, {self.budget_s} and {self.target}",
            )

    def measure(
        self,
        ops: Sequence[Op],
        reference: Op,
        device: str,
        progress: Callable[[float], None] | None = None,
    ) -> list[KernelLatency]:
        """Return the time of each kernel, in order.

        `progress` gets the share of the time budget that is used, 1.0 at the end. A latency is
        `noisy` where its interval is wider than `target` of its median on either side.
        """
        if not ops:
            return []
        rng = np.random.default_rng(self.seed)
        rows: list[list[float]] = []
        reference_s: list[float] = []
        next_look = self.min_rounds
        with measuring_alone(), _no_garbage_collection():
            for op in (reference, *ops):
                for _ in range(2 * op.rotation):  # warm-up: first runs allocate
                    op.run()
            start = self.clock()
            while True:
                row = [0.0] * len(ops)
                before = self._fastest(reference)
                for i in rng.permutation(len(ops)):
                    row[i] = self._fastest(ops[i])
                reference_s.append((before + self._fastest(reference)) / 2)
                rows.append(row)
                used = (self.clock() - start) * 1e-9 / self.budget_s
                if progress is not None:
                    progress(min(used, 1.0))
                if used >= 1.0 and len(rows) >= LEAST_ROUNDS:
                    break
                if len(rows) >= next_look and used >= 0.25:
                    if (self._estimate(rows, reference_s).half_width() <= self.target).all():
                        break
                    next_look = len(rows) + len(rows) // 4
        if progress is not None:
            progress(1.0)
        found = self._estimate(rows, reference_s)
        read_s = np.array([op.read_s for op in ops])
        memory_share = np.minimum(read_s / found.seconds, 1.0)
        half = found.half_width(np.hypot(self.drift_sd, self.memory_drift_sd * memory_share))
        return [
            KernelLatency(
                device=device,
                case=op.case,
                median_s=float(value),
                low_s=float(value * np.exp(-width)),
                high_s=float(value * np.exp(width)),
                rounds=len(rows),
                noisy=bool(width > self.target),
            )
            for op, value, width in zip(ops, found.seconds, half, strict=True)
        ]

    def _fastest(self, op: Op) -> float:
        best = float("inf")
        for _ in range(op.rotation + self.inner):
            start = self.clock()
            found: Any = op.run()
            best = min(best, float(found) if op.returns_ns else self.clock() - start)
        return max(best, 1.0) * 1e-9 / op.runs  # a coarse clock never says that nothing is free

    def _estimate(self, rows: list[list[float]], reference_s: list[float]) -> Estimate:
        return estimate(np.array(rows), np.array(reference_s), seed=self.seed)
