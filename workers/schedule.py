"""Which task goes to which process: tries, deaths, hangs, late joiners, sizes of batches.

A pure loop over a `Pool`, which knows how processes are started and asked: workers of Ray, or a
simulation with a clock of its own.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpq.core.errors import MpqError, MpqWarning, RunFailedError
from workers.errors import HOPELESS, in_one, of_user
from workers.pool import Died, Event, Finished, Outcome, Pool, Ready, SetupFailed, Started, Work
from workers.portions import Portions, named, too_large, warn_of_portions

_CHANCE = 1e-3  # that any innocent task of a run is given up because processes died under it
_MOST_TRIES = 10
_REMEMBERED = 1001  # seconds of finished tasks that a hang is judged by


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the scheduler allows.

    A task is tried `tries` times. One that has not answered after `grace_s`, or after
    `grace_medians` times the median of finished tasks where that is longer, hangs; so does a
    setup, or a task while none has finished, after `first_grace_s`. `patience_s` is the time in
    which one process at least must have started. Tasks shorter than `batch_s` are sent several at
    a time. Every `look_s` the scheduler looks for hanging and for further processes. Machines are
    asked for where each further process would have `worth_s` seconds of work.
    """

    tries: int = 3
    grace_s: float = 600.0
    grace_medians: float = 20.0
    first_grace_s: float = 3600.0
    patience_s: float = 60.0
    batch_s: float = 1.0
    look_s: float = 5.0
    worth_s: float = 60.0


@dataclass(slots=True)
class _Process:
    since: float  # the beginning of its present state
    state: str = "starting"  # then "setting up", then "idle" and "busy" in turns
    work: Sequence[Work] = ()
    failures: int = 0  # tasks in a row that raised here


@dataclass(slots=True)
class _Tasks:
    """What one run has still to do, and what it has learned of its tasks."""

    waiting: deque[Work]
    alone: deque[Work] = field(default_factory=deque)  # the process died under it and others
    last: deque[Work] = field(default_factory=deque)  # ran out of memory: when nothing else runs
    tries: Counter[int] = field(default_factory=Counter)
    deaths: Counter[int] = field(default_factory=Counter)
    hangs: Counter[int] = field(default_factory=Counter)
    starved: set[int] = field(default_factory=set)
    failed: dict[int, MpqError] = field(default_factory=dict)
    refused: MpqError | None = None  # what the user gave cannot be done: ends the run at once
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    typical_s: float | None = None
    finished: int = 0
    batches: int = 0  # that were sent, and those under which a process died
    died: int = 0
    total: int = 0
    names: dict[int, str] = field(default_factory=dict)  # of failed tasks

    def __post_init__(self) -> None:
        self.total = len(self.waiting)

    def fail(self, position: int, item: Any, error: MpqError) -> None:
        self.failed[position], self.names[position] = error, named(position, item)

    def left(self) -> int:
        return len(self.waiting) + len(self.alone) + len(self.last)

    def hopeless(self) -> bool:
        """Tell whether the tasks that were not tried are better left so."""
        return len(self.failed) >= HOPELESS and not self.finished

    def tries_allowed(self, position: int, least: int) -> int:
        """Return `least`, more where so many processes die that as many in a row may be chance."""
        own = self.deaths[position]
        rate = min((self.died - own) / max(self.batches - own, 1), 0.5)
        if rate <= 0:
            return least
        by_chance = math.ceil(math.log(_CHANCE / self.total) / math.log(rate))
        return min(max(least, by_chance), _MOST_TRIES)


class Schedule:
    """Runs tasks over the processes of a pool, which stay for the next run."""

    def __init__(self, pool: Pool, limits: Limits) -> None:
        self.limits = limits
        self._pool = pool
        self._portions = Portions()
        self._processes: dict[int, _Process] = {}
        self._idle: list[int] = []
        self._busy = 0
        self._target = 1  # how many processes there may be
        self._lost_starts = 0  # processes in a row that never became ready
        self._next_look = -math.inf
        self._wanted = 0  # processes, by what brings machines

    def run(self, items: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Yield (position, result) of each item once, as each finishes, whatever dies meanwhile.

        A task whose process dies or hangs, or that raises, is tried three times in all (more
        where so many processes die that three in a row may be chance); one that fails each time
        ends the run after all others have finished. One that runs out of memory runs again in
        halves (workers.portions), at last once more at the end and alone. Raises
        InvalidInputError and InfeasibleError of a task or a setup at once, RunFailedError for what
        failed on every try, the pool's own error where no process starts.
        """
        tasks = _Tasks(deque(enumerate(items)))
        began = self._pool.now()
        for process in self._processes.values():
            process.since = began
        self._lost_starts, self._next_look = 0, -math.inf
        try:
            self._look(tasks)
            self._fill(tasks)
            while tasks.left() or self._busy:
                results: list[tuple[int, Any]] = []
                for event in self._pool.wait(max(0.0, self._next_look - self._pool.now())):
                    results += self._heard(event, tasks)
                self._look(tasks)  # only after all answers were heard: the caller may be slow
                if tasks.refused is None:
                    self._fill(tasks)  # before the caller takes its time over the results
                yield from results
                if tasks.refused is not None:
                    raise tasks.refused
                if tasks.hopeless() and not self._busy:
                    break
        finally:  # stopped midway: the results of those at work are not wanted
            for number in [n for n, p in self._processes.items() if p.state == "busy"]:
                self._end(number)
            self._want(0)
        if tasks.failed:
            raise in_one(tasks.failed, tasks.names)

    def close(self) -> None:
        """End every process."""
        for number in list(self._processes):
            self._end(number)

    def _look(self, tasks: _Tasks) -> None:
        """From time to time: end what hangs, see how many processes there may be."""
        now, limits = self._pool.now(), self.limits
        if now < self._next_look:
            return
        self._next_look = now + min(limits.look_s, limits.patience_s / 2, limits.grace_s / 4)
        self._target = max(1, self._pool.capacity())
        self._want(self._worth(tasks))
        median_s = statistics.median(tasks.seconds) if tasks.seconds else None
        for number, process in list(self._processes.items()):
            waited = now - process.since
            if process.state == "busy" and waited > self._grace(process.work, median_s, tasks):
                self._end(number)
                tasks.hangs.update(position for position, _ in process.work)
                self._lost_work(process.work, f"no answer in {waited:.0f} s", tasks)
            elif process.state in ("starting", "setting up") and waited > limits.first_grace_s:
                self._end(number)
                self._lost_start(f"{process.state} gave no answer in {waited:.0f} s")
        begun = [process.since for process in self._processes.values()]
        starting = all(process.state == "starting" for process in self._processes.values())
        if begun and starting and now - min(begun) > limits.patience_s:
            error = self._pool.no_resources(limits.patience_s)
            if error is not None:
                raise error

    def _worth(self, tasks: _Tasks) -> int:
        """Return how many processes have enough to do: one until it is known what tasks take."""
        left = tasks.left() + self._busy
        seconds = 0.0 if tasks.typical_s is None else left * tasks.typical_s
        return min(left, max(1, math.ceil(seconds / self.limits.worth_s)))

    def _want(self, processes: int) -> None:
        if processes != self._wanted:
            self._wanted = processes
            self._pool.want(processes)

    def _grace(self, work: Sequence[Work], median_s: float | None, tasks: _Tasks) -> float:
        if median_s is None:
            return max(self.limits.grace_s, self.limits.first_grace_s)
        usual = self.limits.grace_medians * median_s * len(work)
        # A task that takes longer than all others is no hang: each try has twice the time.
        return float(max(self.limits.grace_s, usual) * 2 ** max(tasks.hangs[p] for p, _ in work))

    def _fill(self, tasks: _Tasks) -> None:
        """Send tasks to idle processes, and ask for as many more as there are tasks for."""
        if tasks.hopeless():
            return
        if tasks.last and not (tasks.waiting or tasks.alone or self._busy):
            self._fill_alone(tasks)
            return
        while self._idle and (tasks.waiting or tasks.alone):
            self._submit(self._idle.pop(), self._next_work(tasks), tasks)
        wanted = self._busy + len(tasks.waiting) + len(tasks.alone)
        while len(self._processes) < min(self._target, wanted):
            self._processes[self._pool.start()] = _Process(self._pool.now())

    def _fill_alone(self, tasks: _Tasks) -> None:
        """Run one task with no other process beside it: it needs their memory."""
        keep = self._idle[-1] if self._idle else next(iter(self._processes), None)
        for number in [number for number in self._processes if number != keep]:
            self._end(number)
        if self._idle:
            self._submit(self._idle.pop(), [tasks.last.popleft()], tasks)
        elif not self._processes and self._target:
            self._processes[self._pool.start()] = _Process(self._pool.now())

    def _submit(self, number: int, work: list[Work], tasks: _Tasks) -> None:
        process = self._processes[number]
        process.state, process.since, process.work = "busy", self._pool.now(), work
        self._busy += 1
        tasks.batches += 1
        self._pool.submit(number, work)

    def _next_work(self, tasks: _Tasks) -> list[Work]:
        if tasks.alone:
            return [self._fitting(tasks.alone.popleft())]
        size = 1
        if tasks.typical_s is not None:
            share = len(tasks.waiting) // (2 * max(self._target, len(self._processes)))
            size = max(1, min(int(self.limits.batch_s / max(tasks.typical_s, 1e-6)), share))
        count = min(size, len(tasks.waiting))
        return [self._fitting(tasks.waiting.popleft()) for _ in range(count)]

    def _fitting(self, work: Work) -> Work:
        return work[0], self._portions.fitting(work[1])

    def _heard(self, event: Event, tasks: _Tasks) -> list[tuple[int, Any]]:
        """Take note of an event; returns the results that came with it."""
        process = self._processes.get(event.process)
        if process is None:  # it was ended meanwhile
            return []
        if isinstance(event, Finished):
            return self._finished(event, process, tasks)
        if isinstance(event, Started):
            process.state, process.since = "setting up", self._pool.now()
        elif isinstance(event, Ready):
            process.state, self._lost_starts = "idle", 0
            self._idle.append(event.process)
        elif isinstance(event, SetupFailed):
            self._end(event.process)
            if of_user(event.error):
                tasks.refused = event.error
            self._lost_start(event.error)
        else:
            self._end(event.process)
            if process.state == "busy":
                self._lost_work(process.work, event.reason, tasks, event)
            elif process.state != "idle":
                self._lost_start(event.reason)
        return []

    def _finished(self, event: Finished, process: _Process, tasks: _Tasks) -> list[tuple[int, Any]]:
        items = dict(process.work)
        results = []
        for outcome in event.outcomes:
            if outcome.error is None:
                results.append((outcome.position, outcome.result))
                tasks.seconds.append(outcome.seconds)
                process.failures = 0
            else:
                process.failures += 1
                self._raised(outcome, items[outcome.position], len(items), tasks)
        tasks.finished += len(results)
        mean_s = sum(outcome.seconds for outcome in event.outcomes) / len(event.outcomes)
        before = mean_s if tasks.typical_s is None else tasks.typical_s
        tasks.typical_s = before + (mean_s - before) / 5
        process.state, process.work = "idle", ()
        self._busy -= 1
        self._idle.append(event.process)
        if process.failures > 1:  # perhaps it is the process that is broken
            self._end(event.process)
        return results

    def _raised(self, outcome: Outcome, item: Any, together: int, tasks: _Tasks) -> None:
        """Decide about a task that raised."""
        position, error = outcome.position, outcome.error
        assert error is not None
        if outcome.out_of_memory:  # first: a network that runs out of memory cannot run a batch
            if together > 1:
                tasks.alone.append((position, item))
            else:
                self._starved(position, item, str(error), tasks)
        elif of_user(error):
            tasks.refused = error
        else:
            tasks.tries[position] += 1
            if tasks.tries[position] >= self.limits.tries:
                tasks.fail(position, item, error)
            elif tasks.finished:
                tasks.waiting.append((position, item))  # at the end: likely elsewhere
            else:  # perhaps every task fails: then it is soon told
                tasks.alone.append((position, item))

    def _lost_work(
        self, work: Sequence[Work], reason: str, tasks: _Tasks, death: Died | None = None
    ) -> None:
        """Decide about tasks whose process died, or was ended because it gave no answer."""
        tasks.died += 1
        if len(work) > 1:  # none is blamed for what another may have done
            tasks.alone.extend(work)
            return
        position, item = work[0]
        if death is not None and death.out_of_memory:
            self._starved(position, item, reason, tasks)
            return
        tasks.deaths[position] += 1
        tasks.tries[position] += 1
        tries = tasks.tries[position]
        if tries < tasks.tries_allowed(position, self.limits.tries):
            tasks.alone.append((position, item))
            return
        name = named(position, item)
        if death is not None:
            deaths = tasks.deaths[position]
            told = f"the worker process died {deaths} times on {name}: {reason}"
            tasks.fail(position, item, RunFailedError("worker_died", told))
        else:
            told = f"{name} hangs, it was tried {tries} times: {reason}"
            tasks.fail(position, item, RunFailedError("task_hangs", told))

    def _starved(self, position: int, item: Any, why: str, tasks: _Tasks) -> None:
        """Decide about a task that ran out of memory: in halves, at last alone."""
        name = named(position, item)
        less = self._portions.halved(item)
        if less is not None:
            warn_of_portions(name, less.samples)
            tasks.alone.append((position, less))
        elif position in tasks.starved:
            tasks.fail(position, item, too_large(name, why))
        else:
            tasks.starved.add(position)
            tasks.last.append((position, item))
            warnings.warn(
                f"{name} ran out of memory ({why}): it runs again at the end, alone",
                MpqWarning,
                stacklevel=2,
            )

    def _lost_start(self, why: MpqError | str) -> None:
        """Take note of a process that never became ready; raises where none ever does."""
        self._lost_starts += 1
        if self._lost_starts > 1:  # no more before the next look
            self._target = max(1, len(self._processes))
        usable = any(process.state in ("idle", "busy") for process in self._processes.values())
        most = self.limits.tries if isinstance(why, MpqError) else _MOST_TRIES
        if usable or self._lost_starts < most:
            return
        raise (
            why
            if isinstance(why, MpqError)
            else RunFailedError(
                "worker_died", f"{self._lost_starts} workers in a row never started: {why}"
            )
        )

    def _end(self, number: int) -> None:
        process = self._processes.pop(number)
        if process.state == "busy":
            self._busy -= 1
        elif process.state == "idle":
            self._idle.remove(number)
        self._pool.kill(number)
