"""Whatever breaks in a task ends as an MpqError, wherever the task ran."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mpq.core.errors import InfeasibleError, InvalidInputError, MpqError, RunFailedError

HOPELESS = 5  # tasks that were given up while none has finished: the rest is not tried


@contextmanager
def told(what: str) -> Iterator[None]:
    """Let an MpqError pass; raise any other exception as RunFailedError that names it."""
    try:
        yield
    except MpqError:
        raise
    except Exception as error:
        text = str(error).strip().splitlines() or ["no message"]
        raise RunFailedError(
            "task_failed", f"{what} failed: {type(error).__name__}: {text[0]}"
        ) from error


def of_user(error: MpqError) -> bool:
    """Tell whether an error is about what was given, which no other try would change."""
    return isinstance(error, InvalidInputError | InfeasibleError)


def in_one(failed: dict[int, MpqError], names: Mapping[int, str]) -> MpqError:
    """Return one error for all tasks that failed, by position, with the names of all."""
    first, *others = sorted(failed)
    if not others:
        return failed[first]
    some = ", ".join(names[i] for i in others[:5]) + (", ..." if len(others) > 5 else "")
    error = RunFailedError(
        failed[first].code, f"{failed[first]}; {len(others)} more tasks failed: {some}"
    )
    error.__cause__ = failed[first]
    return error


def sent(error: MpqError) -> Any:
    """Return what another process reads as this error, caused by the lines of its traceback."""
    return _Sent(error, "".join(traceback.format_exception(error)))


class _RemoteTraceback(Exception):  # noqa: N818 - shown, never raised
    """The lines of a traceback in another process."""


class _Sent:
    def __init__(self, error: MpqError, lines: str) -> None:
        self._given = (error, lines)

    def __reduce__(self) -> Any:
        return _arrived, self._given


def _arrived(error: MpqError, lines: str) -> MpqError:
    error.__cause__ = _RemoteTraceback(lines)
    return error
