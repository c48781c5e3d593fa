"""Run tasks here, one after the other: for tests, debugging and small models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

State = TypeVar("State")
Item = TypeVar("Item")
Result = TypeVar("Result")


class SerialExecutor:
    """An executor in the calling process."""

    def map(
        self,
        setup: Callable[[], State],
        fn: Callable[[State, Item], Result],
        items: Iterable[Item],
    ) -> Iterator[tuple[int, Result]]:
        """Run `fn(state, item)` for each item in order, yielding (position, result)."""
        state: State | None = None
        for position, item in enumerate(items):
            state = setup() if state is None else state
            yield position, fn(state, item)
