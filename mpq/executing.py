"""Who runs the tasks of a job."""

from __future__ import annotations

from mpq.core.jobs import JobSpec
from mpq.core.protocols import Executor
from workers import get_executor

# What workers import for every metric: with torch it takes seconds.
_IMPORTED = ("mpq.scoring", "mpq.evaluate")


def executor_for(spec: JobSpec) -> Executor:
    """Return the executor that a job asks for."""
    return get_executor(
        spec.executor,
        spec.num_workers,
        spec.ray_address,
        resources=spec.worker_resources,
        limits=(spec.task_tries, spec.task_grace_seconds),
    )


def warm_executor_for(spec: JobSpec) -> Executor:
    """Return the executor of a job; on a cluster that runs, its first workers start meanwhile."""
    executor = executor_for(spec)
    if spec.ray_address is not None:
        executor.warm(_IMPORTED)
    return executor
