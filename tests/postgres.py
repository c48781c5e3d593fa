"""A PostgreSQL server of the tests' own: a new directory, a socket in it, no port."""

from __future__ import annotations

import glob
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

OWNERS = ("postgres", "nobody")  # as whom the server runs where the tests run as root
SETTINGS = (
    "fsync = off",  # processes are killed here, never the machine
    "max_connections = 200",
    "listen_addresses = ''",
)


@dataclass(frozen=True)
class Server:
    """A running server; `stop` and `start` at will."""

    programs: Path
    folder: Path

    def start(self) -> None:
        self.run("pg_ctl", "start", "-w", "-D", self.data, "-l", self.folder / "log")

    def stop(self, mode: str = "immediate") -> None:
        """Stop it; `immediate` is what a crash is to its clients."""
        self.run("pg_ctl", "stop", "-w", "-D", self.data, "-m", mode)

    @property
    def running(self) -> bool:
        return (self.data / "postmaster.pid").exists()

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://mpq@/{database}?host={self.folder}"

    def sql(self, statement: str, database: str = "postgres") -> list[Any]:
        import psycopg

        with psycopg.connect(
            host=str(self.folder), user="mpq", dbname=database, autocommit=True
        ) as connection:
            found = connection.execute(statement)
            return found.fetchall() if found.description else []

    def new_database(self) -> str:
        """Return the URL of a new, empty database."""
        name = f"mpq_{uuid.uuid4().hex[:12]}"
        self.sql(f"CREATE DATABASE {name} TEMPLATE template0")
        return self.url(name)

    def drop(self, url: str) -> None:
        self.sql(f"DROP DATABASE {make_url(url).database} WITH (FORCE)")

    def run(self, program: str, *arguments: object) -> None:
        """Run a program of the server; it never runs as root."""
        found = subprocess.run(
            [str(self.programs / program), *map(str, arguments)],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the server keeps what it inherits open
            stderr=subprocess.PIPE if program == "initdb" else subprocess.DEVNULL,
            cwd=self.folder,
            timeout=120,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
            **as_owner(),
        )
        assert found.returncode == 0, (program, arguments, found.stderr, self.log())

    def log(self) -> str:
        log = self.folder / "log"
        return log.read_text(errors="replace")[-2000:] if log.exists() else ""


def as_owner() -> dict[str, Any]:
    owner = owner_of_server()
    return {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []} if owner else {}


def owner_of_server() -> pwd.struct_passwd | None:
    """Return the user to become, None where this one will do."""
    if os.geteuid() != 0:
        return None
    known = {user.pw_name: user for user in pwd.getpwall()}
    return next(known[name] for name in OWNERS if name in known)


def programs() -> Path | None:
    """Return the directory of initdb, pg_ctl and postgres, the newest there is."""
    debian = glob.glob("/usr/lib/postgresql/*/bin")
    newest = sorted(debian, key=lambda name: int(name.split("/")[4]), reverse=True)
    found = shutil.which("initdb")
    for folder in [*newest, *([os.path.dirname(os.path.realpath(found))] if found else [])]:
        if all(os.access(f"{folder}/{name}", os.X_OK) for name in ("initdb", "pg_ctl", "postgres")):
            return Path(folder)
    return None


def no_server(reason: str) -> None:
    """Skip the test; where continuous integration runs, fail."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def serve() -> Iterator[Server]:
    """Yield a server, which ends with the block."""
    if importlib.util.find_spec("psycopg") is None:
        no_server("no driver of PostgreSQL here: pip install 'mpq-search[postgres]'")
    found = programs()
    if found is None:
        no_server("no PostgreSQL server here: install Debian's package postgresql")
        return
    with tempfile.TemporaryDirectory(prefix="mpq-pg-", ignore_cleanup_errors=True) as name:
        server = Server(found, Path(name))
        owner = owner_of_server()
        if owner:
            os.chown(name, owner.pw_uid, owner.pw_gid)
        # A language whose order of text is not that of bytes, as many servers have.
        language = ("--locale-provider=icu", "--icu-locale=en", "--locale=C.UTF-8")
        fixed = ("-A", "trust", "-U", "mpq", "-E", "UTF8", "--no-sync")
        server.run("initdb", "-D", server.data, *fixed, *language)
        settings = (*SETTINGS, f"unix_socket_directories = '{name}'")
        with (server.data / "postgresql.conf").open("a") as file:
            file.write("\n".join(settings) + "\n")
        server.start()
        try:
            yield server
        finally:
            if server.running:
                server.stop()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """The server of this process, for all of its tests."""
    yield from serve()


@pytest.fixture
def stoppable(postgres: Server) -> Iterator[Server]:
    """The same server for a test that stops it; the next one finds it running."""
    yield postgres
    if not postgres.running:
        postgres.start()
