"""Where code runs. Knows nothing of quantization."""

from __future__ import annotations

from collections.abc import Callable

from mpq.core.errors import InvalidInputError, unknown
from mpq.core.protocols import Executor


def _serial(num_workers: int | None, address: str | None, insecure: bool) -> Executor:
    from workers.serial import SerialExecutor

    if address is not None:
        raise InvalidInputError(
            "ray_address", f"executor 'serial' runs here, not on the Ray cluster {address!r}"
        )
    return SerialExecutor()


def _ray(num_workers: int | None, address: str | None, insecure: bool) -> Executor:
    from workers.ray_executor import RayExecutor

    return RayExecutor(num_workers, address, insecure=insecure)


EXECUTORS: dict[str, Callable[[int | None, str | None, bool], Executor]] = {
    "serial": _serial,
    "ray": _ray,
}


def get_executor(
    name: str,
    num_workers: int | None = None,
    address: str | None = None,
    *,
    insecure: bool = False,
) -> Executor:
    """Return an executor by name; raises InvalidInputError for an unknown one.

    `address` is that of a Ray cluster, "auto" or "host:port" (None: a local Ray); one beyond this
    machine that asks for no token is refused unless `insecure`.
    """
    if name not in EXECUTORS:
        raise unknown("executor", name, EXECUTORS)
    if num_workers is not None and num_workers < 1:
        raise InvalidInputError("num_workers", f"at least one worker runs, got {num_workers}")
    return EXECUTORS[name](num_workers, address, insecure)
