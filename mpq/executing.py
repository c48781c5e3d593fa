"""Who runs the tasks of a job."""

from __future__ import annotations

import importlib

from mpq.core.jobs import JobSpec
from mpq.core.protocols import Executor
from workers import get_executor

# What workers import for every metric: with torch it takes seconds.
# The last one is what torch itself imports with the first gradient, in half a second.
_IMPORTED = ("mpq.scoring", "mpq.evaluate", "torch.fx.experimental.symbolic_shapes")


def executor_for(spec: JobSpec) -> Executor:
    """Return the executor that a job asks for."""
    return get_executor(
        spec.executor,
        spec.num_workers,
        spec.ray_address,
        resources=spec.worker_resources,
        limits=(spec.task_tries, spec.task_grace_seconds),
    )


def warm_executor_for(spec: JobSpec, ready: Executor | None = None) -> Executor:
    """Return the executor of a job; on a cluster that runs, its first workers start meanwhile.

    They are those of `ready` where they are as the job wants them.
    """
    executor = executor_for(spec)
    if spec.ray_address is not None:
        executor.warm(_IMPORTED, ready)
    elif ready is not None:
        ready.close()
    return executor


def imported(ray_address: str | None) -> Executor | None:
    """Import what every run needs, here and in a worker of a cluster, if there is one."""
    ready = None
    if ray_address is not None:
        ready = get_executor("ray", address=ray_address)
        ready.warm(_IMPORTED)
    for module in ("mpq.searching", *_IMPORTED):
        importlib.import_module(module)
    return ready
