"""Where code runs. Knows nothing of quantization."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mpq.core.errors import InvalidInputError, unknown
from mpq.core.protocols import Executor


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is asked of an executor."""

    num_workers: int | None = None
    address: str | None = None
    insecure: bool = False
    resources: Mapping[str, float] = field(default_factory=dict)
    limits: tuple[int, float] = (3, 600.0)  # tries of a task, seconds after which it hangs


def _serial(asked: Asked) -> Executor:
    from workers.serial import SerialExecutor

    if asked.address is not None:
        raise InvalidInputError(
            "ray_address", f"executor 'serial' runs here, not on the Ray cluster {asked.address!r}"
        )
    if asked.resources:
        raise InvalidInputError(
            "worker_resources", f"executor 'serial' takes none, got {dict(asked.resources)!r}"
        )
    return SerialExecutor()


def _ray(asked: Asked) -> Executor:
    from workers.ray_executor import RayExecutor, patience_s
    from workers.schedule import Limits

    tries, grace_s = asked.limits
    return RayExecutor(
        asked.num_workers,
        asked.address,
        insecure=asked.insecure,
        resources=asked.resources,
        limits=Limits(tries=tries, grace_s=grace_s, patience_s=patience_s()),
    )


EXECUTORS: dict[str, Callable[[Asked], Executor]] = {"serial": _serial, "ray": _ray}


def get_executor(
    name: str, num_workers: int | None = None, address: str | None = None, **more: Any
) -> Executor:
    """Return an executor by name; raises InvalidInputError for an unknown one.

    `address` is that of a Ray cluster, "auto" or "host:port" (None: a local Ray); one beyond this
    machine that asks for no token is refused unless `insecure`. `resources` are what each worker
    takes beside one CPU, `limits` how often a task is tried and after how many seconds it hangs.
    """
    if name not in EXECUTORS:
        raise unknown("executor", name, EXECUTORS)
    if num_workers is not None and num_workers < 1:
        raise InvalidInputError("num_workers", f"at least one worker runs, got {num_workers}")
    return EXECUTORS[name](Asked(num_workers=num_workers, address=address, **more))
