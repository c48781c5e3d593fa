"""Run tasks on local Ray: one actor per worker, one thread each, results as they finish."""

from __future__ import annotations

import logging
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from mpq.core.errors import RunFailedError
from workers.errors import told

State = TypeVar("State")
Item = TypeVar("Item")
Result = TypeVar("Result")

_TRIES = 3  # of a task whose worker process died


class RayExecutor:
    """An executor over worker processes of Ray; starts a local Ray where none is connected.

    `setup` is put into the object store once: numpy arrays in it are mapped, not copied, by every
    worker. Ray gives each worker one OpenMP thread: two that share a core slow each other.
    """

    def __init__(self, num_workers: int | None = None) -> None:
        self._num_workers = num_workers or os.cpu_count() or 1
        self._setup: Callable[[], Any] | None = None
        self._setup_reference: Any = None
        self._idle: list[Any] = []

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
        ray = _connected(self._num_workers)
        if self._setup is not setup:
            self.close()
            self._setup, self._setup_reference = setup, ray.put(setup)
        fn_reference = ray.put(fn)
        # A worker takes one CPU: more of them than Ray has would wait for ever.
        limit = max(1, min(self._num_workers, int(ray.cluster_resources().get("CPU", 1))))
        running: dict[Any, tuple[int, Item, Any]] = {}
        tries: Counter[int] = Counter()
        try:
            while waiting or running:
                while waiting and len(running) < limit:
                    position, item = waiting.popleft()
                    worker = self._idle.pop() if self._idle else self._new_worker(ray)
                    running[worker.run.remote(fn_reference, position, item)] = (
                        position,
                        item,
                        worker,
                    )
                (done,), _ = ray.wait(list(running), num_returns=1)
                position, item, worker = running.pop(done)
                try:
                    result = ray.get(done)
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
                    self._idle.append(worker)
                    raise error.cause from error
                self._idle.append(worker)
                yield position, result
        finally:
            for _, _, worker in running.values():  # stopped midway: their results are not wanted
                ray.kill(worker)

    def close(self) -> None:
        """End the worker processes; the local Ray stays for the next executor."""
        if self._idle:
            import ray

            for worker in self._idle:
                ray.kill(worker)
        self._idle, self._setup, self._setup_reference = [], None, None

    def _new_worker(self, ray: Any) -> Any:
        return ray.remote(num_cpus=1)(_Worker).remote(self._setup_reference)


class _Worker:
    """What runs in a worker process."""

    def __init__(self, setup: Callable[[], Any]) -> None:
        self._setup = setup
        self._state: tuple[Any] | None = None

    def run(self, fn: Callable[[Any, Any], Any], position: int, item: Any) -> Any:
        if self._state is None:  # here and not in __init__, so that its errors come back as such
            with told("setting up"):
                self._state = (self._setup(),)
        with told(f"task {position}"):
            return fn(self._state[0], item)


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
