"""Where a database is: from what a user writes to a URL, or one line that says what is wrong."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from mpq.core.errors import StorageError

DEFAULT_URL = "sqlite:///mpq.db"
_DRIVERS = {
    "sqlite": "sqlite",
    "sqlite+pysqlite": "sqlite",
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
}
_WRITTEN = ("sqlite", "postgresql", "postgresql+psycopg")
_EXAMPLES = "'sqlite:///runs.db' or 'postgresql+psycopg://user:password@host/database'"


def storage_url(storage: str | os.PathLike[str] | None) -> URL:
    """Read a database URL or the path of a SQLite file.

    None means the environment's MPQ_STORAGE, else mpq.db in the working directory. Paths become
    absolute, `postgres://` and `postgresql://` get their driver. Raises StorageError
    (`storage_url`) for what cannot be an address, never showing its password.
    """
    text = os.fspath(storage) if storage is not None else os.environ.get("MPQ_STORAGE", "")
    text = text.strip() or (DEFAULT_URL if storage is None else "")
    if not text:
        raise StorageError("storage_url", f"the storage is empty: write {_EXAMPLES}")
    scheme, separator, rest = text.partition("://")
    scheme = scheme.lower()
    if not separator:
        return _file_url(text)
    if scheme not in _DRIVERS:
        near = difflib.get_close_matches(scheme, _WRITTEN, n=1)
        meant = f"did you mean {masked(f'{near[0]}://{rest}')!r}?" if near else ""
        raise StorageError(
            "storage_url",
            f"unknown database {scheme!r} in {masked(text)!r}: {meant or f'write {_EXAMPLES}'}",
        )
    try:
        url = make_url(text).set(drivername=_DRIVERS[scheme])
    except (ArgumentError, ValueError):
        raise StorageError(
            "storage_url", f"cannot read the storage URL {masked(text)!r}: write {_EXAMPLES}"
        ) from None
    if url.drivername != "sqlite":
        return url
    if url.host:
        raise StorageError(
            "storage_url",
            f"{text!r} has two slashes, which name a host: did you mean 'sqlite:///{rest}'?",
        )
    return url if sqlite_file(url) is None else url.set(database=_absolute(url.database or ""))


def _file_url(text: str) -> URL:
    scheme, colon, rest = text.partition(":")
    if colon and scheme in _DRIVERS:
        slashes = "///" if scheme.startswith("sqlite") else "//"
        raise StorageError(
            "storage_url",
            f"{masked(text)!r} is neither a path nor a URL: did you mean "
            f"{masked(f'{scheme}:{slashes}{rest}')!r}?",
        )
    return URL.create("sqlite", database=text if text == ":memory:" else _absolute(text))


def _absolute(path: str) -> str:
    # The working directory may change between one connection and the next.
    return os.path.abspath(os.path.expanduser(path))


def masked(text: str) -> str:
    """Return a URL with its password hidden, however malformed it is."""
    hidden = re.sub(r"^([\w+]+:(?://)?[^:/@]*):.*@", r"\1:***@", text)
    return re.sub(r"([?&]password=)[^&]*", r"\1***", hidden)


def shown(url: URL) -> str:
    """Return a URL as messages show it: without its password."""
    return masked(url.render_as_string())


def sqlite_file(url: URL) -> Path | None:
    """Return the file of a SQLite URL; None for memory, `file:` names and other databases."""
    name = url.database or ""
    if url.get_backend_name() != "sqlite" or name in ("", ":memory:") or name.startswith("file:"):
        return None
    return Path(name)


def check_file(path: Path) -> None:
    """Raise StorageError (`storage_path`) where SQLite could not open or write the file."""
    folder = path.absolute().parent
    if path.is_dir():
        raise _path_error(f"{path} is a directory: name a file in it, such as {path / 'mpq.db'}")
    if not folder.is_dir():
        raise _path_error(
            f"the directory of {path} does not exist: create it with 'mkdir -p {folder}'"
        )
    if path.exists() and not os.access(path, os.R_OK | os.W_OK):
        raise _path_error(
            f"{path} is read-only here: allow writing with 'chmod u+rw {path}' or use a copy of it"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _path_error(
            f"cannot write in {folder}, where SQLite keeps its files beside {path.name}: "
            f"allow writing with 'chmod u+w {folder}' or name a file elsewhere"
        )


def _path_error(message: str) -> StorageError:
    return StorageError("storage_path", message)
