"""Warnings that come up during a run are kept with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mpq.core.errors import MpqWarning
from mpq.store.store import Store


@contextmanager
def warnings_kept() -> Iterator[Callable[[Store, str], None]]:
    """Catch warnings; the function it yields logs our own with a run; all are given on after."""

    def keep(store: Store, run_id: str) -> None:
        for warning in caught:
            if issubclass(warning.category, MpqWarning):
                store.log(run_id, "warning", str(warning.message))

    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as recorded:
            warnings.simplefilter("always", MpqWarning)
            caught = recorded
            yield keep
    finally:
        for w in caught:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
