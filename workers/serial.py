"""Run tasks here, one after the other: for tests, debugging and small models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from mpq.core.errors import MpqError
from workers.errors import HOPELESS, in_one, of_user, told

State = TypeVar("State")
Item = TypeVar("Item")
Result = TypeVar("Result")


class SerialExecutor:
    """An executor in the calling process."""

    in_process = True

    def __init__(self) -> None:
        self._prepared: tuple[Callable[[], Any], Any] | None = None

    def map(
        self,
        setup: Callable[[], State],
        fn: Callable[[State, Item], Result],
        items: Iterable[Item],
    ) -> Iterator[tuple[int, Result]]:
        """Run `fn(state, item)` for each item in order, yielding (position, result).

        A task that fails ends the run after the others, what the user gave wrongly at once.
        """
        failed: dict[int, MpqError] = {}
        finished = False
        for position, item in enumerate(items):
            if self._prepared is None or self._prepared[0] is not setup:
                with told("setting up"):
                    self._prepared = (setup, setup())
            try:
                with told(f"task {position}"):
                    result = fn(self._prepared[1], item)
            except MpqError as error:
                failed[position] = error
                if of_user(error):
                    raise
                if not finished and len(failed) >= HOPELESS:
                    break
                continue
            finished = True
            yield position, result
        if failed:
            raise in_one(failed)

    def close(self) -> None:
        """Forget the state."""
        self._prepared = None
