"""Whole networks of a runtime, timed side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from hw_cost_models.measured.bandwidth import bytes_per_second
from hw_cost_models.measured.protocol import Op, Stopwatch
from mpq.core.latency import KernelCase, KernelLatency
from mpq.deploy.target import Loaded, Target
from mpq.nn.batches import Batch


def network_case(target: Target, precision: str, shape: str) -> KernelCase:
    """Return what is timed when a whole network is, on a sample that `shape` describes."""
    return KernelCase(target.backend, f"network {precision}", shape)


def time_networks(
    target: Target,
    networks: Mapping[KernelCase, Loaded],
    sample: Batch,
    stored: Sequence[int],
    *,
    seconds: float,
    seed: int = 0,
    stopwatch: Stopwatch | None = None,
) -> list[KernelLatency]:
    """Time whole networks side by side, each beside the reference kernel, on one thread.

    A network runs again and again, so that its weights are where a steady use finds them;
    `stored` bytes tell what share of its time may wait for memory. The clock is the thread's
    processor time: a network runs longer than a busy machine leaves a thread alone.
    """
    speed = bytes_per_second()
    ops = [
        Op(case, network.runner(sample), read_s=size / speed)
        for (case, network), size in zip(networks.items(), stored, strict=True)
    ]
    stopwatch = stopwatch or Stopwatch(budget_s=seconds, seed=seed, clock=time.thread_time_ns)
    return stopwatch.measure(ops, target.reference(), target.device)
