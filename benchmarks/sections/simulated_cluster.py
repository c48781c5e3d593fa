"""A cluster that is not there: processes, nodes, deaths and a clock, the same for the same seed."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from mpq.core.errors import MpqError, RunFailedError, StorageError
from workers.pool import Died, Event, Finished, Outcome, Ready, SetupFailed, Started, Work
from workers.portions import named


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Some processors that come and may go."""

    slots: int
    joins_s: float = 0.0
    leaves_s: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """How often what goes wrong: chances of each task that is run, and tasks that always fail."""

    dies: float = 0.0
    hangs: float = 0.0
    raises: float = 0.0
    slow: float = 0.0  # stragglers, which take 20 times as long
    broken: float = 0.0  # of a process: it fails its setup
    kills: frozenset[int] = frozenset()
    poison: frozenset[int] = frozenset()
    stuck: frozenset[int] = frozenset()
    hungry: frozenset[int] = frozenset()  # run out of memory where another task runs
    starving: frozenset[int] = frozenset()  # run out of memory wherever they run
    most_samples: float = math.inf  # of an item at once, beyond which there is no memory


@dataclass(slots=True)
class _Simulated:
    node: int | None = None
    alive: bool = True
    busy: bool = False


@dataclass
class SimulatedCluster:
    """A pool of simulated processes; the result of task i about x is (i, x).

    What an ended process had under way still arrives, as it may in a real cluster.
    """

    seconds: Callable[[int], float]
    nodes: Sequence[Node]
    faults: Faults = Faults()
    start_s: float = 0.5
    setup_s: float = 2.0
    seed: int = 0
    clock: float = 0.0
    runs: Counter[int] = field(default_factory=Counter)  # times that each task was begun
    wanted: list[int] = field(default_factory=list)  # what an autoscaler would have heard
    deaths: int = 0
    most_alive: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._coming: list[tuple[float, int, Callable[[], Event | None]]] = []
        self._tie = itertools.count()
        self._processes: list[_Simulated] = []
        self._free: deque[int] = deque()
        self._pending: deque[int] = deque()
        self._members: dict[int, set[int]] = {}
        self._alive = self._working = 0
        for number, node in enumerate(self.nodes):
            self._at(node.joins_s, partial(self._join, number))
            if node.leaves_s < math.inf:
                self._at(node.leaves_s, partial(self._leave, number))
        while self._coming and self._coming[0][0] <= 0:
            heapq.heappop(self._coming)[2]()

    def now(self) -> float:
        """Return the simulated time."""
        return self.clock

    def capacity(self) -> int:
        """Return the processors of all nodes that are there."""
        return len(self._free) + sum(map(len, self._members.values()))

    def want(self, processes: int) -> None:
        """Remember what was asked for."""
        self.wanted.append(processes)

    def start(self) -> int:
        """Ask for a process; it waits until a processor is free."""
        self._processes.append(_Simulated())
        self._pending.append(len(self._processes) - 1)
        self._place()
        return len(self._processes) - 1

    def submit(self, process: int, work: Sequence[Work]) -> None:
        """Let a process do tasks, or die, hang or fail at one of them."""
        simulated = self._processes[process]
        if not simulated.alive:
            return
        simulated.busy = True
        self._working += 1
        spent, outcomes, faults, chance = 0.0, [], self.faults, self._random.random
        for position, item in work:
            self.runs[position] += 1
            seconds = self.seconds(position) * (20.0 if chance() < faults.slow else 1.0)
            if position in faults.kills or chance() < faults.dies:
                self._at(self.clock + spent + seconds * chance(), partial(self._die, process))
                return
            if position in faults.stuck or chance() < faults.hangs:
                return
            spent += seconds
            error, starves = None, self._starves(position, item)
            if starves:
                error = self._error(position, item, "MemoryError: none")
            elif position in faults.poison or chance() < faults.raises:
                error = self._error(position, item, "ValueError: no")
            outcomes.append(
                Outcome(
                    position=position,
                    seconds=seconds,
                    result=None if error else (position, item),
                    error=error,
                    out_of_memory=starves,
                )
            )
        answer = partial(self._answer, process, tuple(outcomes))
        self._at(self.clock + spent, answer)

    def wait(self, timeout_s: float) -> Sequence[Event]:
        """Move the clock to the next event, and return all there are until then."""
        until = self.clock + timeout_s
        events: list[Event] = []
        while self._coming and self._coming[0][0] <= (self.clock if events else until):
            when, _, happen = heapq.heappop(self._coming)
            self.clock = max(self.clock, when)
            event = happen()
            if event is not None:
                events.append(event)
        if not events:
            self.clock = until
        return events

    def kill(self, process: int) -> None:
        """End a process; its processor is free."""
        self._gone(process)

    def no_resources(self, patience_s: float) -> MpqError | None:
        """Return the error of a cluster that is full."""
        return StorageError("no_resources", f"no worker started in {patience_s:.0f} s")

    def _at(self, when: float, happen: Callable[[], Event | None]) -> None:
        heapq.heappush(self._coming, (when, next(self._tie), happen))

    def _error(self, position: int, item: object, why: str) -> MpqError:
        return RunFailedError("task_failed", f"{named(position, item)} failed: {why}")

    def _starves(self, position: int, item: object) -> bool:
        beside = position in self.faults.hungry and (self._working > 1 or self._alive > 1)
        too_many = getattr(item, "samples", 0) > self.faults.most_samples
        return beside or too_many or position in self.faults.starving

    def _place(self) -> None:
        while self._free and self._pending:
            number = self._pending.popleft()
            process = self._processes[number]
            if not process.alive:
                continue
            process.node = self._free.popleft()
            self._members[process.node].add(number)
            self._alive += 1
            self.most_alive = max(self.most_alive, self._alive)
            began = self.clock + self.start_s
            self._at(began, partial(self._if_alive, number, Started(number)))
            ready: Event = Ready(number)
            if self._random.random() < self.faults.broken:
                ready = SetupFailed(number, RunFailedError("task_failed", "setting up failed: no"))
            self._at(began + self.setup_s, partial(self._if_alive, number, ready))

    def _if_alive(self, process: int, event: Event) -> Event | None:
        return event if self._processes[process].alive else None

    def _answer(self, process: int, outcomes: tuple[Outcome, ...]) -> Event:
        simulated = self._processes[process]
        if simulated.alive:
            simulated.busy = False
            self._working -= 1
        return Finished(process, outcomes)

    def _die(self, process: int) -> Event:
        self.deaths += 1
        self._gone(process)
        return Died(process, "signal 9")

    def _gone(self, process: int) -> None:
        simulated = self._processes[process]
        if not simulated.alive:
            return
        simulated.alive = False
        self._working -= simulated.busy
        if simulated.node is not None:
            self._alive -= 1
            if simulated.node in self._members:
                self._members[simulated.node].remove(process)
                self._free.append(simulated.node)
                self._place()

    def _join(self, node: int) -> None:
        self._members[node] = set()
        self._free.extend([node] * self.nodes[node].slots)
        self._place()

    def _leave(self, node: int) -> None:
        self._free = deque(other for other in self._free if other != node)
        for process in sorted(self._members.pop(node)):
            self._gone(process)
            self.deaths += 1
            self._at(self.clock, partial(Died, process, "its node has gone"))
