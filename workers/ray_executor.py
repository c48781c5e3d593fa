"""Run tasks on Ray: one actor per worker, one thread each, results as they finish."""

from __future__ import annotations

import importlib
import json
import math
import os
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from mpq.core.errors import InvalidInputError, MpqError, StorageError
from mpq.core.memory import ran_out_of_memory
from mpq.core.protocols import Executor
from workers.errors import sent, told
from workers.pool import Died, Event, Finished, Outcome, Ready, SetupFailed, Started, Work
from workers.portions import named
from workers.ray_cluster import INSECURE, ask_for_machines, connected
from workers.schedule import Limits, Schedule

State = TypeVar("State")
Item = TypeVar("Item")
Result = TypeVar("Result")

PATIENCE = "MPQ_RAY_PATIENCE"  # seconds; for clusters whose machines take minutes to come
_WARM = 1  # workers: the first score needs one
_MOST_ASKED = 1000  # workers, of an autoscaler: about what one search can keep busy
_PATIENCE_S = 60.0  # with processes that do not start because others hold the CPUs


def patience_s() -> float:
    """Return how long a first worker may take to start; raises InvalidInputError (`patience`)."""
    text = os.environ.get(PATIENCE)
    try:
        seconds = _PATIENCE_S if text is None else float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidInputError("patience", f"{PATIENCE} is a number of seconds, got {text!r}")
    return seconds


class RayExecutor:
    """An executor over worker processes of Ray; starts a local Ray where none is connected.

    With `address`, "auto" or "host:port", the processes are those of a cluster: as many as it has
    free CPUs (at most `num_workers`), nodes that join later included. Every node needs this
    package, and what the network's classes are imported from. `resources` is what each worker
    takes beside one CPU: {"gpu": 1}, {"device:jetson": 1}. `setup` is put into the object store
    once: numpy arrays in it are mapped, not copied, by every worker of a node. Ray gives each
    worker one OpenMP thread: two that share a core slow each other.
    """

    in_process = False

    def __init__(
        self,
        num_workers: int | None = None,
        address: str | None = None,
        *,
        insecure: bool = False,
        resources: Mapping[str, float] | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._num_workers = num_workers
        self._address = address
        self._insecure = insecure or os.environ.get(INSECURE) == "1"
        self._resources = dict(resources or {})
        self.gpu = self._resources.get("gpu", 0) > 0
        self._limits = limits or Limits(patience_s=patience_s())
        self._setup: Callable[[], Any] | None = None
        self._pool: _RayPool | None = None
        self._schedule: Schedule | None = None
        self._warm: list[Any] = []  # actors that nothing has been asked of yet

    def map(
        self,
        setup: Callable[[], State],
        fn: Callable[[State, Item], Result],
        items: Iterable[Item],
    ) -> Iterator[tuple[int, Result]]:
        """Run `fn(state, item)` for each item, yielding (position, result) as each finishes.

        A task whose worker process dies or hangs, or that raises, runs again on another, as often
        as the limits allow; an exception in `setup` or `fn` is raised here as itself where it is
        an MpqError, else as RunFailedError with its text, after all other tasks have finished.
        """
        items = list(items)
        if not items:
            return
        ray = self._connected()
        if self._schedule is None or self._pool is None or self._setup is not setup:
            if self._schedule is not None:
                self._schedule.close()
            local = self._address is None
            most = self._num_workers or (os.cpu_count() if local else None)
            self._setup = setup
            self._pool = _RayPool(ray, setup, self._resources, most, not local, self._warm)
            self._schedule = Schedule(self._pool, self._limits)
        self._pool.take(fn)
        yield from self._schedule.run(items)

    def run_exclusively(
        self, fn: Callable[[], Result], resources: Mapping[str, float] | None = None
    ) -> Result:
        """Return `fn()`, run in a worker on a node where no other such call runs meanwhile.

        It takes the resource `bench`, of which a local Ray has one: `ray start
        --resources='{"bench": 1, "device:NAME": 1}'` gives one to a node of a cluster. Of
        `resources` (default: those of a worker) it takes what is asked. Raises InvalidInputError
        (`no_node`) where no node has all of them, RunFailedError where it died three times.
        """
        ray = self._connected()
        needs = {**(self._resources if resources is None else resources), "bench": 1.0}
        check_node(ray.nodes(), {_named(name): amount for name, amount in needs.items()})
        options = _options(needs, num_cpus=0)  # workers hold the CPUs
        answer = ray.remote(max_retries=2, **options)(_answer).remote(fn)
        try:
            with told(f"what ran on a node with {', '.join(needs)}"):
                found: Any = ray.get(answer)
        except BaseException:
            ray.cancel(answer, force=True)
            raise
        if isinstance(found, MpqError):
            raise found
        result: Result = found
        return result

    def warm(self, modules: Sequence[str], of: Executor | None = None) -> None:
        """Start the first workers, which import these modules while the caller gets ready.

        They are taken up by the next `map`; where there is no room for them they wait. Those
        that another executor started are taken over, or ended where they are others.
        """
        if isinstance(of, RayExecutor):
            if (of._address, of._resources) == (self._address, self._resources):
                self._warm, of._warm = of._warm, []
            of.close()
        ray, options = self._connected(), _options(self._resources)
        number = min(_WARM, self._num_workers or _WARM)
        self._warm += [_worker(ray, options, modules) for _ in range(number - len(self._warm))]

    def close(self) -> None:
        """End the worker processes; the local Ray stays for the next executor."""
        if self._schedule is not None:
            self._schedule.close()
        while self._warm:
            self._connected().kill(self._warm.pop())
        self._schedule = self._pool = self._setup = None

    def _connected(self) -> Any:
        num_cpus = max(self._num_workers or 1, os.cpu_count() or 1)  # others may want more later
        return connected(num_cpus, self._address, self._insecure)


class _RayPool:
    """Processes of Ray for a scheduler; each is an actor that holds what `setup` made."""

    def __init__(
        self,
        ray: Any,
        setup: Callable[[], Any],
        resources: Mapping[str, float],
        most: int | None,
        follows: bool,
        warm: list[Any],
    ) -> None:
        self._ray = ray
        self._setup_reference = ray.put(setup)
        self._fn_reference: Any = None
        self._options = _options(resources)
        self._needs = {"CPU": 1.0, **{_named(name): amount for name, amount in resources.items()}}
        self._most = most
        self._follows = follows
        self._warm = warm
        self._actors: list[Any] = []
        self._holding: set[int] = set()  # those that have their resources
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def take(self, fn: Callable[[Any, Any], Any]) -> None:
        """Let tasks be `fn` from now on."""
        self._fn_reference = self._ray.put(fn)

    def now(self) -> float:
        return time.monotonic()

    def capacity(self) -> int:
        ray = self._ray
        # On a local Ray all is ours; in a cluster others hold some of it.
        there = ray.available_resources() if self._follows else ray.cluster_resources()
        free = int(min(there.get(name, 0.0) / amount for name, amount in self._needs.items()))
        ours = len(self._holding) + len(self._warm)
        number = free + ours if self._follows else max(1, free)
        return number if self._most is None else min(number, self._most)

    def want(self, processes: int) -> None:
        """Tell the autoscaler of a cluster, which heeds the last that any search has told it."""
        if not self._follows:
            return
        number = min(processes, self._most or _MOST_ASKED)
        ask_for_machines([self._needs] * number)

    def start(self) -> int:
        number = len(self._actors)
        actor = self._warm.pop() if self._warm else _worker(self._ray, self._options)
        self._actors.append(actor)
        self._listen(number, actor.started.remote(), lambda _: Started(number))
        self._listen(
            number,
            actor.set_up.remote(self._setup_reference),
            lambda error: Ready(number) if error is None else SetupFailed(number, error),
        )
        return number

    def submit(self, process: int, work: Sequence[Work]) -> None:
        answer = self._actors[process].run.remote(self._fn_reference, list(work))
        self._listen(process, answer, lambda outcomes: Finished(process, outcomes))

    def wait(self, timeout_s: float) -> Sequence[Event]:
        events: list[Event] = []
        try:
            events.append(self._events.get(timeout=timeout_s))
            while True:
                events.append(self._events.get_nowait())
        except queue.Empty:
            pass
        for event in events:
            if isinstance(event, Started) and self._actors[event.process] is not None:
                self._holding.add(event.process)
        return events

    def kill(self, process: int) -> None:
        self._ray.kill(self._actors[process])
        self._actors[process] = None
        self._holding.discard(process)

    def no_resources(self, patience_s: float) -> MpqError | None:
        there, free = self._ray.cluster_resources(), self._ray.available_resources()
        ours = sum(actor is not None for actor in self._actors)
        enough = all(there.get(name, 0) >= amount for name, amount in self._needs.items())
        if enough and there.get("CPU", 0) - free.get("CPU", 0) <= ours:
            return None  # nobody else holds any: a busy machine is slow to start them
        of_each = " and ".join(
            f"{'one CPU' if name == 'CPU' else f'{amount:g} {name}'}, Ray has "
            f"{there.get(name, 0):g} of which {free.get(name, 0):g} are free"
            for name, amount in self._needs.items()
        )
        return StorageError(
            "no_resources",
            f"no worker started in {patience_s:.0f} s: each takes {of_each}; end what holds them "
            f"or use executor='serial'",
        )

    def _listen(self, process: int, reference: Any, event: Callable[[Any], Event]) -> None:
        reference.future().add_done_callback(partial(self._answered, process, event))

    def _answered(self, process: int, event: Callable[[Any], Event], future: Future[Any]) -> None:
        """Turn an answer into an event; runs in a thread of Ray."""
        error = future.exception()
        if error is None:
            self._events.put(event(future.result()))
            return
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # The last line of Ray tells why, after those that tell who.
        reason = (lines[-1] if lines else type(error).__name__).partition(". ")[0][:300]
        memory = self._ray.exceptions.OutOfMemoryError
        by_memory = isinstance(error, memory) or "NODE_OUT_OF_MEMORY" in str(error)
        self._events.put(Died(process, reason, out_of_memory=by_memory))


class _Worker:
    """What runs in a worker process."""

    def __init__(self, modules: Sequence[str]) -> None:
        for module in modules:
            importlib.import_module(module)
        self._state: Any = None

    def started(self) -> bool:
        return True

    def set_up(self, setup: Callable[[], Any]) -> MpqError | None:
        try:
            with told("setting up"):
                self._state = setup()
        except MpqError as error:
            failure: MpqError = sent(error)
            return failure
        return None

    def run(self, fn: Callable[[Any, Any], Any], work: list[Work]) -> tuple[Outcome, ...]:
        return tuple(self._outcome(fn, position, item) for position, item in work)

    def _outcome(self, fn: Callable[[Any, Any], Any], position: int, item: Any) -> Outcome:
        began = time.perf_counter()
        result, failure, out_of_memory = None, None, False
        try:
            with told(named(position, item)):
                result = fn(self._state, item)
        except MpqError as error:
            failure, out_of_memory = sent(error), ran_out_of_memory(error)
        return Outcome(
            position=position,
            seconds=time.perf_counter() - began,
            result=result,
            error=failure,
            out_of_memory=out_of_memory,
        )


def _worker(ray: Any, options: Mapping[str, Any], modules: Sequence[str] = ()) -> Any:
    return ray.remote(**options)(_Worker).remote(modules)


def _answer(fn: Callable[[], Any]) -> Any:
    try:
        with told("a call"):
            return fn()
    except MpqError as error:
        return sent(error)


def check_node(nodes: Iterable[Mapping[str, Any]], needs: Mapping[str, float]) -> None:
    """Raise InvalidInputError where no node that is alive has everything; it says what they have.

    `nodes` are as `ray.nodes()` tells of them.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    if any(all(there.get(n, 0) >= amount for n, amount in needs.items()) for there in alive):
        return
    marks = ("GPU", "bench", "device:")
    each = [
        " and ".join(name for name in sorted(there) if name.startswith(marks)) or "neither"
        for there in alive
    ]
    asked = json.dumps({name: 1 for name in needs if name != "GPU"})
    raise InvalidInputError(
        "no_node",
        f"no node of the Ray cluster has {' and '.join(needs)}: of {len(alive)} nodes each has "
        f"{'; '.join(each)}; start one with ray start --resources='{asked}'",
    )


def _options(resources: Mapping[str, float], num_cpus: int = 1) -> dict[str, Any]:
    own = {name: amount for name, amount in resources.items() if name != "gpu"}
    return {"num_cpus": num_cpus, "num_gpus": resources.get("gpu", 0), "resources": own}


def _named(resource: str) -> str:
    return "GPU" if resource == "gpu" else resource
