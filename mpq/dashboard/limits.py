"""How often somebody may ask, and how much is computed at once."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from mpq.dashboard.problems import ProblemError
from mpq.dashboard.settings import Rate

_MOST_ASKERS = 10_000
_QUEUE_S = 2.0
Answer = TypeVar("Answer")


class Allowance:
    """A bucket of permissions for each asker that refills at a rate."""

    def __init__(self, rate: Rate, what: str) -> None:
        self._rate, self._what = rate, what
        self._left: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def take(self, asker: str) -> None:
        """Use one permission; raises ProblemError (429) where none is left."""
        now = time.monotonic()
        with self._lock:
            left, at = self._left.pop(asker, (float(self._rate.burst), now))
            left = min(left + (now - at) * self._rate.per_second, float(self._rate.burst))
            is_allowed = left >= 1
            self._left[asker] = (left - is_allowed, now)  # the last to ask comes last
            while len(self._left) > _MOST_ASKERS:
                self._left.pop(next(iter(self._left)))
        if not is_allowed:
            wait_s = math.ceil((1 - left) / self._rate.per_second)
            raise ProblemError(
                429,
                "too_many",
                f"too many {self._what}: {self._rate.burst} at once and "
                f"{self._rate.per_second:g} a second are allowed; try again in {wait_s} s",
                {"Retry-After": str(wait_s)},
            )


class Bounded:
    """Computations in threads of their own, few at once; one that takes too long is not awaited.

    It then keeps its place until it ends, so never more than `at_once` compute.
    """

    def __init__(self, at_once: int, seconds: float) -> None:
        self._places = threading.BoundedSemaphore(at_once)
        self._seconds = seconds

    def run(self, compute: Callable[[], Answer]) -> Answer:
        """Return what `compute` does; raises ProblemError (429, 503)."""
        if not self._places.acquire(timeout=_QUEUE_S):
            raise ProblemError(
                429,
                "busy",
                "other questions are being solved: try again in a moment",
                {"Retry-After": "2"},
            )
        answer: Future[Answer] = Future()

        def computing() -> None:
            try:
                answer.set_result(compute())
            except BaseException as error:  # told to whoever waits
                answer.set_exception(error)
            finally:
                self._places.release()

        threading.Thread(target=computing, name="solve", daemon=True).start()
        try:
            return answer.result(self._seconds)
        except TimeoutError:
            raise ProblemError(
                503,
                "too_long",
                f"this takes longer than {self._seconds:g} s: ask 'mpq solve' on the database",
                {"Retry-After": "60"},
            ) from None
