"""How much of a task is done at once: half of it after one ran out of memory."""

from __future__ import annotations

import warnings
from typing import Any

from mpq.core.errors import MpqWarning, RunFailedError


def named(position: int, item: Any) -> str:
    """Return what errors and logs call a task: its `label`, where the item has one."""
    return str(getattr(item, "label", f"task {position}"))


class Portions:
    """What the tasks of an executor do at once, learned from those that ran out of memory.

    An item can be done in portions where it has `samples`, how many it takes at once, and
    `within(samples)`, the same item with at most so many at once. What one needed holds for all
    that follow.
    """

    def __init__(self) -> None:
        self._most: int | None = None

    def fitting(self, item: Any) -> Any:
        """Return an item with no more at once than fits."""
        if self._most is None or _samples(item) <= self._most:
            return item
        return item.within(self._most)

    def halved(self, item: Any) -> Any | None:
        """Return an item that ran out of memory with half as much at once, None where it has one.

        One sample that does not fit says nothing about others: they are not held to it.
        """
        samples = _samples(item)
        if samples < 2:
            self._most = None
            return None
        self._most = min(samples // 2, self._most or samples)
        return item.within(self._most)


def _samples(item: Any) -> int:
    return getattr(item, "samples", None) or 1


def warn_of_portions(name: str, samples: int) -> None:
    """Warn that tasks are done in portions from here on."""
    each = "one sample" if samples == 1 else f"{samples} samples"
    warnings.warn(
        f"{name} ran out of memory: it and what follows take {each} at a time",
        MpqWarning,
        stacklevel=3,
    )


def too_large(name: str, why: str) -> RunFailedError:
    """Return the error of a task that does not fit, though nothing else runs."""
    return RunFailedError(
        "out_of_memory",
        f"{name} ran out of memory with as little as it can do at once and nothing beside it: "
        f"{why}; give samples that are shorter or smaller, or a machine with more memory",
    )
