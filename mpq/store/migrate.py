"""Bring an older database to the tables of this version."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from mpq.store.address import storage_url
from mpq.store.engine import make_engine, writing
from mpq.store.failures import one_line_errors
from mpq.store.schema import REVISIONS, check_revision, lock, revision

if TYPE_CHECKING:
    from alembic.config import Config

_MIGRATIONS = Path(__file__).parent / "migrations"


def upgrade(storage: str | os.PathLike[str] | None = None) -> tuple[str | None, str]:
    """Migrate a database and return its version before (None: it was empty) and after.

    It is one transaction: where a step fails, the database stays as it was. Of several
    processes that migrate at once, one does and the others wait. Raises StorageError for a
    database that is newer or not ours.
    """
    from alembic import command  # late: it is slow to load, and seldom needed

    url = storage_url(storage)
    with one_line_errors(url):
        engine = make_engine(url, migrates=True)
        try:
            with writing(engine).begin() as connection:
                lock(connection)
                found = revision(connection)
                if found is not None:
                    check_revision(url, found, upgradable=True)
                if found != REVISIONS[-1]:
                    config = migrations()
                    config.attributes["connection"] = connection
                    command.upgrade(config, "head")
        finally:
            engine.dispose()
    return found, REVISIONS[-1]


def migrations() -> Config:
    """Return alembic's configuration, which lives here and in no file."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    return config
