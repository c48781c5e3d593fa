"""Wait for a database that is away, and do again, as a whole, what it was asked."""

from __future__ import annotations

import functools
import inspect
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mpq.core.errors import MpqWarning, StorageError

AWAY, CONFLICT = "storage_unreachable", "storage_conflict"
PATIENCE_S = 600.0
_PAUSES_S = (0.1, 5.0)  # the first, which doubles, and the longest
_CONFLICTS = 10
_LOG = logging.getLogger("mpq.store")

Made = TypeVar("Made")
Class = TypeVar("Class", bound=type)


@dataclass(slots=True)
class _Call:
    """One call of a method, which may take several tries."""

    again: bool = False
    made: dict[str, Any] = field(default_factory=dict)


_CALL: ContextVar[_Call | None] = ContextVar("mpq_store_call", default=None)


def again() -> bool:
    """Tell whether this call was tried before: its answer was lost, its commit may not be."""
    call = _CALL.get()
    return call is not None and call.again


def once(name: str, make: Callable[[], Made]) -> Made:
    """Return what `make` gave at the first try of this call: ids and times that must not change."""
    call = _CALL.get()
    if call is None:
        return make()
    if name not in call.made:
        call.made[name] = make()
    made: Made = call.made[name]
    return made


class Patience:
    """How long one database has been away; shared by all threads that use it."""

    def __init__(self, place: str, limit_s: float = PATIENCE_S) -> None:
        self._place = place
        self._limit_s = limit_s
        self._away_since: float | None = None

    def wait(self, error: StorageError, pause_s: float) -> None:
        """Sleep before the next try; raises StorageError (`storage_away`) after `limit_s`."""
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
            _LOG.warning("%s; waiting up to %.0f s for it to come back", error, self._limit_s)
        if now - self._away_since >= self._limit_s:
            raise StorageError(
                "storage_away",
                f"gave up after {now - self._away_since:.0f} s: {error} What was finished is "
                "kept: start the server, then run the same again",
            ) from error
        time.sleep(pause_s)

    def answered(self) -> None:
        """Say how long the database was away, if it was."""
        since, self._away_since = self._away_since, None
        if since is not None:
            said = (
                f"the database {self._place} was away for {time.monotonic() - since:.1f} s; "
                "the work went on after it"
            )
            _LOG.warning(said)
            warnings.warn(said, MpqWarning, stacklevel=2)  # a search keeps it with the run


def patient(cls: Class) -> Class:
    """Let all public methods of a class wait for its database (`_patience`), then run again.

    A transaction whose connection broke is run again from its start, never from its last
    statement, and so is one that the database gave up because it and another waited for each
    other. A commit whose answer was lost may have happened: methods that must not do their work
    twice ask `again`, and make what they would make anew by `once`.
    """
    for name, method in list(vars(cls).items()):
        if inspect.isfunction(method) and not name.startswith("_") and name != "close":
            setattr(cls, name, _patient(method))
    return cls


def _patient(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def whole(self: Any, *given: Any, **named: Any) -> Any:
        given = tuple(list(one) if isinstance(one, Iterator) else one for one in given)
        patience: Patience = self._patience
        call, (pause_s, longest_s), conflicts = _Call(), _PAUSES_S, 0
        token = _CALL.set(call)
        try:
            while True:
                try:
                    found = method(self, *given, **named)
                except StorageError as error:
                    if error.code == AWAY:
                        patience.wait(error, pause_s)
                        pause_s = min(2 * pause_s, longest_s)
                    elif error.code != CONFLICT or conflicts == _CONFLICTS:
                        raise
                    else:
                        conflicts += 1
                    call.again = True
                else:
                    patience.answered()
                    return found
        finally:
            _CALL.reset(token)

    return whole
