"""Independent tasks: run wherever workers are, kept in the database as each one finishes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, TypeVar

import torch

from mpq.core.protocols import Executor, Partial
from mpq.nn.accelerator import placed_on_gpu
from mpq.nn.batches import Batch, checked_call, portions
from mpq.nn.shipping import ShippedWorkload, ship
from mpq.nn.workload import Workload
from mpq.progress import Progress
from mpq.store.store import Store

Item = TypeVar("Item")
Split = str  # "calibration" | "held_out"


@dataclass(frozen=True, slots=True)
class Work(Generic[Item]):
    """A task: its content key, what it is about, and what errors call it.

    `samples` are those of its batch that it takes at once; with fewer it needs less memory and
    finds the same, up to the order of sums. None: it cannot be done in portions.
    """

    key: str
    item: Item
    label: str
    samples: int | None = None

    def within(self, samples: int) -> Work[Item]:
        """Return the task with at most so many samples at once."""
        return replace(self, samples=samples)


@dataclass(slots=True)
class Bench:
    """What a worker holds: the workload, and the original outputs, each computed once."""

    workload: Workload
    _references: dict[tuple[Split, int], torch.Tensor] = field(default_factory=dict)

    def batches(self, split: Split) -> tuple[Batch, ...]:
        """Return the batches of a split."""
        of_split = {"calibration": self.workload.calibration, "held_out": self.workload.held_out}
        return of_split[split]

    def at_once(self, samples: int | None) -> Bench:
        """Return the bench that takes at most so many samples of a batch at once."""
        return replace(self, workload=replace(self.workload, at_once=samples))

    def reference(self, split: Split, number: int) -> torch.Tensor:
        """Return the original network's output on one batch."""
        if (split, number) not in self._references:
            where, batch = f"{split} batch {number}", self.batches(split)[number]
            with self.workload.evaluating(number, split), torch.no_grad():
                outputs = [
                    checked_call(self.workload.model, portion, where)
                    for portion in portions(batch, self.workload.at_once)
                ]
            whole = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
            self._references[split, number] = whole
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
        setup = partial(_set_up, source, on_gpu=executor.gpu)
        return cls(workload, executor, setup, store, progress)

    def finished(
        self,
        stage: str,
        fn: Callable[[Bench, Item], Partial],
        tasks: Sequence[Work[Item]],
    ) -> list[Partial]:
        """Return `fn(bench, task.item)` of each task, in order.

        What is in the database under its key is not done again; each result is there before it
        counts.
        """
        unique = {task.key: task for task in tasks}
        done = self.store.partials(unique)
        missing = [key for key in unique if key not in done]
        with self.progress.stage(stage, len(unique)) as advance:
            for _ in range(len(done)):
                advance()
            wanted = [unique[key] for key in missing]
            timed = partial(_timed, fn)
            for position, (found, seconds) in self.executor.map(self.setup, timed, wanted):
                self.store.put_partial(missing[position], found, seconds)
                done[missing[position]] = found
                advance()
        return [done[task.key] for task in tasks]


def _set_up(source: Workload | ShippedWorkload, *, on_gpu: bool = False) -> Bench:
    workload = source.unpack() if isinstance(source, ShippedWorkload) else source
    return Bench(placed_on_gpu(workload) if on_gpu else workload)


def _timed(
    fn: Callable[[Bench, Item], Partial], bench: Bench, task: Work[Item]
) -> tuple[Partial, float]:
    started = time.perf_counter()
    return fn(bench.at_once(task.samples), task.item), time.perf_counter() - started
