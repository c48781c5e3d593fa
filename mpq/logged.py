"""What a driver does, as JSON lines on standard error, where MPQ_LOG=json asks for it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from mpq.core.errors import InvalidInputError
from mpq.progress import Advance, Progress

_ASKED = "MPQ_LOG"


class Logged:
    """Progress that also writes lines with `at`, `run_id`, `event`, and `stage` where there is one.

    `event` is "stage_started" and "stage_ended" (with `done`, `total`, `seconds`), "task_done"
    (with `task`, the number of the step in its stage from 0 on, in the order of finishing) or
    "note" (with `message`).
    """

    def __init__(self, run_id: str, to: Progress) -> None:
        self._run_id, self._to = run_id, to

    @classmethod
    def of(cls, run_id: str, to: Progress) -> Progress:
        """Return `to`, with lines beside it where the environment's MPQ_LOG is "json".

        Raises InvalidInputError (`log`) for another value.
        """
        asked = os.environ.get(_ASKED, "")
        if asked not in ("", "json"):
            raise InvalidInputError("log", f"{_ASKED} is 'json' or not set, got {asked!r}")
        return cls(run_id, to) if asked else to

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        """Open a stage of `total` steps; its end is written also where it fails."""
        started, done = time.monotonic(), 0
        self._write("stage_started", stage=name, total=total)
        with self._to.stage(name, total) as passed_on:

            def advance() -> None:
                nonlocal done
                passed_on()
                self._write("task_done", stage=name, task=done)
                done += 1

            try:
                yield advance
            finally:
                seconds = round(time.monotonic() - started, 6)
                self._write("stage_ended", stage=name, done=done, total=total, seconds=seconds)

    def note(self, text: str) -> None:
        """Say one line."""
        self._to.note(text)
        self._write("note", message=text)

    def _write(self, event: str, **more: Any) -> None:
        line = {"at": datetime.now(UTC).isoformat(), "run_id": self._run_id, "event": event, **more}
        print(json.dumps(line), file=sys.stderr, flush=True)
