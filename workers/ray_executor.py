"""Run tasks on local Ray: one actor per worker, one thread each, results as they finish."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from mpq.core.errors import MpqError, RunFailedError

State = TypeVar("State")
Item = TypeVar("Item")
Result = TypeVar("Result")

_RETRIES = 2  # of a task whose worker process died


class RayExecutor:
    """An executor over worker processes of Ray; starts a local Ray where none is connected.

    `setup` is put into the object store once: numpy arrays in it are mapped, not copied, by every
    worker. Ray gives each worker one OpenMP thread: two that share a core slow each other.
    """

    def __init__(self, num_workers: int | None = None) -> None:
        self._num_workers = num_workers or os.cpu_count() or 1
        self._setup: Callable[[], Any] | None = None
        self._workers: list[Any] = []

    def map(
        self,
        setup: Callable[[], State],
        fn: Callable[[State, Item], Result],
        items: Iterable[Item],
    ) -> Iterator[tuple[int, Result]]:
        """Run `fn(state, item)` for each item, yielding (position, result) as each finishes.

        A task whose worker dies is tried again on a new one, twice; an exception in `fn` is
        raised here as itself where it is an MpqError, else as RunFailedError with its text.
        """
        work = list(enumerate(items))
        if work:
            ray = self._connected()
            yield from _drive(ray, self._pool(ray, setup, len(work)), fn, work)

    def close(self) -> None:
        """End the worker processes; the local Ray stays for the next executor."""
        if self._workers:
            import ray

            for worker in self._workers:
                ray.kill(worker)
        self._workers, self._setup = [], None

    def _pool(self, ray: Any, setup: Callable[[], Any], size: int) -> list[Any]:
        if self._setup is not setup:
            self.close()
            self._setup, self._reference = setup, ray.put(setup)
        for _ in range(len(self._workers), min(self._num_workers, size)):
            self._workers.append(_worker(ray).remote(self._reference))
        return self._workers

    def _connected(self) -> Any:
        # Ray prints hints about its own defaults that a user of this product cannot act on.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_DISABLE_IMPORT_WARNING", "1")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray

            if not ray.is_initialized():
                ray.init(
                    num_cpus=self._num_workers,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
        return ray


def _worker(ray: Any) -> Any:
    class Worker:
        def __init__(self, setup: Callable[[], Any]) -> None:
            self._state = setup()

        def run(self, fn: Callable[[Any, Any], Any], item: Any) -> Any:
            return fn(self._state, item)

    return ray.remote(num_cpus=1, max_restarts=_RETRIES, max_task_retries=_RETRIES)(Worker)


def _drive(
    ray: Any,
    workers: list[Any],
    fn: Callable[[State, Item], Result],
    work: list[tuple[int, Item]],
) -> Iterator[tuple[int, Result]]:
    fn_ref = ray.put(fn)
    waiting = iter(work)
    running: dict[Any, tuple[int, Any]] = {}

    def start(worker: Any) -> None:
        following = next(waiting, None)
        if following is not None:
            position, item = following
            running[worker.run.remote(fn_ref, item)] = (position, worker)

    for worker in workers:
        start(worker)
    while running:
        done, _ = ray.wait(list(running), num_returns=1)
        position, worker = running.pop(done[0])
        start(worker)
        yield position, _result(ray, done[0])


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MpqError):
            raise error.cause from None
        raise RunFailedError(
            "task_failed", f"a task failed: {type(error.cause).__name__}: {error.cause}"
        ) from error
    except ray.exceptions.RayActorError as error:
        raise RunFailedError(
            "worker_died", f"a worker process died {_RETRIES + 1} times on one task: {error}"
        ) from error
