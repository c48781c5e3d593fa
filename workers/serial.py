"""Run tasks here, one after the other: for tests, debugging and small models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from mpq.core.errors import InvalidInputError, MpqError
from mpq.core.memory import ran_out_of_memory
from mpq.core.protocols import Executor
from workers.errors import HOPELESS, in_one, of_user, told
from workers.portions import Portions, named, too_large, warn_of_portions

State = TypeVar("State")
Item = TypeVar("Item")
Result = TypeVar("Result")


class SerialExecutor:
    """An executor in the calling process."""

    in_process = True
    gpu = False

    def __init__(self) -> None:
        self._prepared: tuple[Callable[[], Any], Any] | None = None
        self._portions = Portions()

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
        names: dict[int, str] = {}
        finished = False
        for position, item in enumerate(items):
            if self._prepared is None or self._prepared[0] is not setup:
                with told("setting up"):
                    self._prepared = (setup, setup())
            try:
                result = self._done(fn, position, item)
            except MpqError as error:
                failed[position], names[position] = error, named(position, item)
                if of_user(error):
                    raise
                if not finished and len(failed) >= HOPELESS:
                    break
                continue
            finished = True
            yield position, result
        if failed:
            raise in_one(failed, names)

    def _done(self, fn: Callable[[Any, Item], Result], position: int, item: Item) -> Result:
        """Return the result of a task, in portions that fit into memory."""
        assert self._prepared is not None
        portion = self._portions.fitting(item)
        while True:
            try:
                with told(named(position, item)):
                    return fn(self._prepared[1], portion)
            except MpqError as error:
                if not ran_out_of_memory(error):
                    raise
                less = self._portions.halved(portion)
                if less is None:
                    raise too_large(named(position, item), str(error)) from error
                warn_of_portions(named(position, item), less.samples)
                portion = less

    def run_exclusively(
        self, fn: Callable[[], Result], resources: Mapping[str, float] | None = None
    ) -> Result:
        """Return `fn()`; raises InvalidInputError for resources, which only nodes have."""
        if resources:
            raise InvalidInputError(
                "no_node",
                f"{', '.join(resources)} is on a node of a Ray cluster, and executor 'serial' runs "
                f"here: use executor='ray' with ray_address",
            )
        return fn()

    def warm(self, modules: Sequence[str], of: Executor | None = None) -> None:
        """Do nothing: this process imports what it needs."""

    def close(self) -> None:
        """Forget the state."""
        self._prepared = None
