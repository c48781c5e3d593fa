"""Independent tasks: run wherever workers are, kept in the database as each one finishes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch

from mpq.core.protocols import Executor, Partial
from mpq.nn.batches import Batch, checked_call
from mpq.nn.shipping import ShippedWorkload, ship
from mpq.nn.workload import Workload
from mpq.progress import Progress
from mpq.store.store import Store

Item = TypeVar("Item")
Split = str  # "calibration" | "held_out"


@dataclass(slots=True)
class Bench:
    """What a worker holds: the workload, and the original outputs, each computed once."""

    workload: Workload
    _references: dict[tuple[Split, int], torch.Tensor] = field(default_factory=dict)

    def batches(self, split: Split) -> tuple[Batch, ...]:
        """Return the batches of a split."""
        of_split = {"calibration": self.workload.calibration, "held_out": self.workload.held_out}
        return of_split[split]

    def reference(self, split: Split, number: int) -> torch.Tensor:
        """Return the original network's output on one batch."""
        if (split, number) not in self._references:
            batch = self.batches(split)[number]
            with self.workload.evaluating(number, split), torch.no_grad():
                output = checked_call(self.workload.model, batch, f"{split} batch {number}")
            self._references[split, number] = output
        return self._references[split, number]


@dataclass(frozen=True, slots=True)
class Workers:
    """Those who run the tasks of one run, and the database that keeps what they find."""

    workload: Workload
    executor: Executor
    setup: Callable[[], Bench]
    store: Store
    progress: Progress

    @classmethod
    def of(
        cls, workload: Workload, executor: Executor, store: Store, progress: Progress
    ) -> Workers:
        """Prepare workers; other processes get the network's weights once, as shared memory."""
        source = workload if executor.in_process else ship(workload)
        return cls(workload, executor, partial(_set_up, source), store, progress)

    def finished(
        self,
        label: str,
        fn: Callable[[Bench, Item], Partial],
        work: Sequence[tuple[str, Item]],
    ) -> list[Partial]:
        """Return `fn(bench, item)` of each (key, item), in order.

        What is in the database under its key is not done again; each result is there before it
        counts.
        """
        unique = dict(work)
        done = self.store.partials(unique)
        missing = [key for key in unique if key not in done]
        with self.progress.stage(label, len(unique)) as advance:
            for _ in range(len(done)):
                advance()
            items = [(fn, unique[key]) for key in missing]
            for position, (found, seconds) in self.executor.map(self.setup, _timed, items):
                self.store.put_partial(missing[position], found, seconds)
                done[missing[position]] = found
                advance()
        return [done[key] for key, _ in work]


def _set_up(source: Workload | ShippedWorkload) -> Bench:
    return Bench(source.unpack() if isinstance(source, ShippedWorkload) else source)


def _timed(
    bench: Bench, work: tuple[Callable[[Bench, Item], Partial], Item]
) -> tuple[Partial, float]:
    fn, item = work
    started = time.perf_counter()
    return fn(bench, item), time.perf_counter() - started
