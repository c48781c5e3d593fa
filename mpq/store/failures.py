"""What went wrong in the database, as one line with the way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from mpq.core.errors import InvalidInputError, MpqError, StorageError
from mpq.store.address import shown, sqlite_file
from mpq.store.patience import AWAY, CONFLICT

# What SQLite says -> our code, and what it means for the database named {place}.
_SQLITE = {
    "file is not a database": (
        "storage_not_a_database",
        "{place} is not a SQLite database: name another file, or restore it from a backup",
    ),
    "malformed": (
        "storage_corrupt",
        "{place} is damaged: restore it from a backup, or save what can be read with "
        "'sqlite3 {place} .recover'",
    ),
    "readonly database": (
        "storage_path",
        "{place} is read-only here: allow writing to the file and its directory, or use a copy",
    ),
    "unable to open": (
        "storage_path",
        "cannot open {place}: its directory must exist and allow writing",
    ),
    "is locked": (
        "storage_busy",
        "{place} stayed locked by another process for 30 s: end the process that holds it",
    ),
    "is full": (
        "storage_full",
        "no space left for {place}: free some on its disk, then resume the run",
    ),
}
# The same of PostgreSQL, by SQLSTATE.
_POSTGRESQL = {
    "55P03": (
        "storage_busy",
        "{place} stayed locked by another process for 30 s: end the process that holds it",
    ),
    "57014": (
        "storage_busy",
        "a statement took longer than {place} allows: look for what keeps it busy, or allow more "
        "with ?options=-c%20statement_timeout=600000",
    ),
    "53100": (
        "storage_full",
        "no space left for {place}: free some on its disk, then resume the run",
    ),
    "25006": ("storage_path", "{place} is read-only here: name the server that takes writes"),
    "40001": (CONFLICT, "{place} had to undo a transaction because of another one"),
    "40P01": (CONFLICT, "{place} had to undo a transaction because of another one"),
}
# Connecting again cannot help where the server says one of these, else it can.
_REFUSED = ("authentication failed", "does not exist", "no pg_hba.conf entry", "no password")
_AWAY_STATES = ("08", "57P01", "57P02", "57P03", "53300")  # 53300: too many connections


@contextmanager
def one_line_errors(url: URL) -> Iterator[None]:
    """Turn the errors of SQLAlchemy and of drivers into StorageError; pass our own on."""
    try:
        yield
    except StatementError as error:
        if isinstance(error.orig, MpqError):
            raise error.orig from None
        if "NUL (0x00)" in str(error.orig):
            raise InvalidInputError("text", "text with NUL characters cannot be stored") from None
        raise _storage_error(url, error) from error
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            "text", f"{error.object[:80]!r} cannot be stored: it has half a character (surrogate)"
        ) from None
    except (SQLAlchemyError, ImportError) as error:
        raise _storage_error(url, error) from error


def _storage_error(url: URL, error: Exception) -> StorageError:
    if isinstance(error, ImportError):
        return StorageError(
            "storage_driver",
            f"{shown(url)} needs the Python package {error.name or 'psycopg'}: install it with "
            f"'pip install \"psycopg[binary]\"'",
        )
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    said = _without_password(url, str(cause))
    place = str(sqlite_file(url) or shown(url))
    if url.get_backend_name() == "sqlite":
        for words, (code, message) in _SQLITE.items():
            if words in said:
                return StorageError(code, message.format(place=place))
    if isinstance(error, PoolTimeoutError):
        return StorageError("storage_busy", f"too many connections to {place} are in use")
    if isinstance(error, DBAPIError) and url.get_backend_name() != "sqlite":
        state = str(getattr(cause, "sqlstate", None) or "")
        if state in _POSTGRESQL:
            code, message = _POSTGRESQL[state]
            return StorageError(code, message.format(place=place))
        if _is_lost(error, state):
            return StorageError(
                "storage_refused" if any(words in said for words in _REFUSED) else AWAY,
                f"cannot reach {place}: {said}; is the server running, and are host, port, "
                "database, user and password right?",
            )
    return StorageError("storage", f"{place}: {said}")


def _is_lost(error: DBAPIError, state: str) -> bool:
    if error.connection_invalidated or state.startswith(_AWAY_STATES):
        return True
    return isinstance(error, OperationalError) and not state  # it never got as far as a state


def _without_password(url: URL, text: str) -> str:
    line = " ".join(text.split("\n")[0].split())
    password = str(url.password) if url.password else ""
    return line.replace(password, "***") if password else line
