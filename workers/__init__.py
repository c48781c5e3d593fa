"""Where code runs. Knows nothing of quantization."""

from __future__ import annotations

from collections.abc import Callable

from mpq.core.errors import InvalidInputError, unknown
from mpq.core.protocols import Executor


def _serial(num_workers: int | None) -> Executor:
    from workers.serial import SerialExecutor

    return SerialExecutor()


def _ray(num_workers: int | None) -> Executor:
    from workers.ray_executor import RayExecutor

    return RayExecutor(num_workers)


EXECUTORS: dict[str, Callable[[int | None], Executor]] = {"serial": _serial, "ray": _ray}


def get_executor(name: str, num_workers: int | None = None) -> Executor:
    """Return an executor by name; raises InvalidInputError for an unknown one."""
    if name not in EXECUTORS:
        raise unknown("executor", name, EXECUTORS)
    if num_workers is not None and num_workers < 1:
        raise InvalidInputError("num_workers", f"at least one worker runs, got {num_workers}")
    return EXECUTORS[name](num_workers)
