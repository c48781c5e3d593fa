"""The errors a user can meet: one clear line that names the value and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MpqError(Exception):
    """Base of everything `mpq` raises on purpose.

    `code` is a stable slug for programs, `exit_code` what the command line ends with.
    """

    exit_code = 1

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type[MpqError], tuple[str, str]]:
        return type(self), (self.code, str(self))  # errors travel between processes


class InvalidInputError(MpqError):
    """What was asked cannot be done as asked; nothing was lost."""

    exit_code = 2


class InfeasibleError(MpqError):
    """No allocation meets every budget; the message names the smallest reachable values."""

    exit_code = 3


class RunFailedError(MpqError):
    """Work that was accepted broke while it ran."""

    exit_code = 1


class StorageError(MpqError):
    """The database or the cluster cannot be reached or read."""

    exit_code = 4


class MpqWarning(UserWarning):
    """Something a user should know that does not stop the work; kept with the run."""


def unknown(kind: str, given: object, known: Iterable[str]) -> InvalidInputError:
    """Return the error for a name that is not among `known`, with the nearest match."""
    names = sorted(known)
    folded = {name.lower(): name for name in names}
    near = difflib.get_close_matches(str(given).lower(), folded, n=1)
    hint = f": did you mean {folded[near[0]]!r}?" if near else "."
    return InvalidInputError(
        f"unknown_{kind.replace(' ', '_')}",
        f"unknown {kind} {given!r}{hint} Known: {', '.join(names) or 'none'}",
    )
