"""Run tasks on local Ray: one actor per worker, one thread each, results as they finish."""

from __future__ import annotations

import logging
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from mpq.core.errors import RunFailedError, StorageError
from workers.errors import told

State = TypeVar("State")
Item = TypeVar("Item")
Result = TypeVar("Result")

_TRIES = 3  # of a task whose worker process died
_PATIENCE_S = 60.0  # with processes that do not start because others hold the CPUs


class _Process(NamedTuple):
    actor: Any
    started: Any  # a reference that is ready once the process runs


class RayExecutor:
    """An executor over worker processes of Ray; starts a local Ray where none is connected.

    `setup` is put into the object store once: numpy arrays in it are mapped, not copied, by every
    worker. Ray gives each worker one OpenMP thread: two that share a core slow each other.
    """

    in_process = False

    def __init__(self, num_workers: int | None = None) -> None:
        self._num_workers = num_workers or os.cpu_count() or 1
        self._setup: Callable[[], Any] | None = None
        self._setup_reference: Any = None
        self._idle: list[_Process] = []

    def map(
        self,
        setup: Callable[[], State],
        fn: Callable[[State, Item], Result],
        items: Iterable[Item],
    ) -> Iterator[tuple[int, Result]]:
        """Run `fn(state, item)` for each item, yielding (position, result) as each finishes.

        A task whose worker process dies runs again on a new one, three times in all; an
        exception in `setup` or `fn` is raised here as itself where it is an MpqError, else as
        RunFailedError with its text.
        """
        waiting = deque(enumerate(items))
        if not waiting:
            return
        ray = _connected(max(self._num_workers, os.cpu_count() or 1))  # others may want more later
        if self._setup is not setup:
            self.close()
            self._setup, self._setup_reference = setup, ray.put(setup)
        fn_reference = ray.put(fn)
        # A worker takes one CPU: more of them than Ray has would wait for ever.
        limit = max(1, min(self._num_workers, int(ray.cluster_resources().get("CPU", 1))))
        running: dict[Any, tuple[int, Item, _Process]] = {}
        tries: Counter[int] = Counter()
        try:
            while waiting or running:
                while waiting and len(running) < limit:
                    position, item = waiting.popleft()
                    process = self._idle.pop() if self._idle else self._new_process(ray)
                    task = process.actor.run.remote(fn_reference, position, item)
                    running[task] = (position, item, process)
                done, _ = ray.wait(list(running), num_returns=1, timeout=_PATIENCE_S)
                if not done:
                    stuck = _not_started(ray, running)
                    if len(stuck) == len(running) and not self._idle:
                        raise _no_resources(ray)
                    limit -= len(stuck)
                    for task in stuck:
                        position, item, process = running.pop(task)
                        ray.kill(process.actor)
                        waiting.appendleft((position, item))
                    continue
                position, item, process = running.pop(done[0])
                try:
                    result = ray.get(done[0])
                except ray.exceptions.RayActorError as error:
                    tries[position] += 1
                    if tries[position] == _TRIES:
                        raise RunFailedError(
                            "worker_died",
                            f"the worker process died {_TRIES} times on task {position}: "
                            f"{str(error).splitlines()[0]}",
                        ) from error
                    waiting.appendleft((position, item))
                    continue
                except ray.exceptions.RayTaskError as error:
                    self._idle.append(process)
                    raise error.cause from error
                self._idle.append(process)
                yield position, result
        finally:
            for _, _, process in running.values():  # stopped midway: their results are not wanted
                ray.kill(process.actor)

    def close(self) -> None:
        """End the worker processes; the local Ray stays for the next executor."""
        if self._idle:
            import ray

            for process in self._idle:
                ray.kill(process.actor)
        self._idle, self._setup, self._setup_reference = [], None, None

    def _new_process(self, ray: Any) -> _Process:
        actor = ray.remote(num_cpus=1)(_Worker).remote(self._setup_reference)
        return _Process(actor, actor.started.remote())


class _Worker:
    """What runs in a worker process."""

    def __init__(self, setup: Callable[[], Any]) -> None:
        self._setup = setup
        self._state: tuple[Any] | None = None

    def started(self) -> bool:
        return True

    def run(self, fn: Callable[[Any, Any], Any], position: int, item: Any) -> Any:
        if self._state is None:  # here and not in __init__, so that its errors come back as such
            with told("setting up"):
                self._state = (self._setup(),)
        with told(f"task {position}"):
            return fn(self._state[0], item)


def _not_started(ray: Any, running: dict[Any, tuple[int, Item, _Process]]) -> list[Any]:
    """Return the tasks whose processes still wait for a CPU."""
    return [
        task
        for task, (_, _, process) in running.items()
        if not ray.wait([process.started], timeout=0)[0]
    ]


def _no_resources(ray: Any) -> StorageError:
    return StorageError(
        "no_resources",
        f"no worker started in {_PATIENCE_S:.0f} s: each takes one CPU, Ray has "
        f"{ray.cluster_resources().get('CPU', 0):g} of which "
        f"{ray.available_resources().get('CPU', 0):g} are free; end what holds them or use "
        f"executor='serial'",
    )


def _connected(num_cpus: int) -> Any:
    # Ray prints a hint about a future default that a user of this product cannot act on.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray

        if not ray.is_initialized():
            ray.init(
                num_cpus=num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    return ray
