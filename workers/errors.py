"""Whatever breaks in a task ends as an MpqError, wherever the task ran."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mpq.core.errors import MpqError, RunFailedError


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
