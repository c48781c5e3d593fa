"""What a scheduler needs of processes: start, ask, wait, end; and what it hears of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mpq.core.errors import MpqError

Work = tuple[int, Any]  # the position of a task and what it is about


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a task that ran to its end: a result, or an error."""

    position: int
    seconds: float
    result: Any = None
    error: MpqError | None = None
    out_of_memory: bool = False


@dataclass(frozen=True, slots=True)
class Started:
    """A process has its resources and begins to set up."""

    process: int


@dataclass(frozen=True, slots=True)
class Ready:
    """A process is set up and waits for tasks."""

    process: int


@dataclass(frozen=True, slots=True)
class SetupFailed:
    """The setup raised in a process."""

    process: int
    error: MpqError


@dataclass(frozen=True, slots=True)
class Finished:
    """A process has done all tasks that it was sent."""

    process: int
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True, slots=True)
class Died:
    """A process is no more, and with it what it was sent."""

    process: int
    reason: str
    out_of_memory: bool = False


Event = Started | Ready | SetupFailed | Finished | Died


class Pool(Protocol):
    """Processes, each named by a number that is never used again."""

    def now(self) -> float:
        """Return the time in seconds."""

    def capacity(self) -> int:
        """Return how many processes there may be now, those that were started included."""

    def want(self, processes: int) -> None:
        """Tell whatever brings machines how many processes have work now; 0: none are needed."""

    def start(self) -> int:
        """Ask for a process: it is `Started`, then `Ready`, or has `Died` or `SetupFailed`."""

    def submit(self, process: int, work: Sequence[Work]) -> None:
        """Send tasks to a process that is ready: `Finished` or `Died` follows."""

    def wait(self, timeout_s: float) -> Sequence[Event]:
        """Return what happened, at least one event unless the time is over first."""

    def kill(self, process: int) -> None:
        """End a process; nothing that follows of it counts."""

    def no_resources(self, patience_s: float) -> MpqError | None:
        """Return the error for processes of which none has started, None if they are but slow."""
