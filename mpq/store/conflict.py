"""Insert statements that know what to do where the row is there already."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy.dialects import sqlite
from sqlalchemy.orm import Session

from mpq.store.models import Base

if TYPE_CHECKING:
    from sqlalchemy.dialects import postgresql


def insert_into(session: Session, row: type[Base]) -> sqlite.Insert | postgresql.Insert:
    """Return the INSERT of the session's database, which has `on_conflict_do_nothing`."""
    if session.get_bind().dialect.name == "postgresql":
        from sqlalchemy.dialects import postgresql  # late: slow to load

        return postgresql.insert(row)
    return sqlite.insert(row)
