"""Insert statements that know what to do where the row is there already."""

from __future__ import annotations

from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from mpq.store.models import Base


def insert_into(session: Session, row: type[Base]) -> sqlite.Insert | postgresql.Insert:
    """Return the INSERT of the session's database, which has `on_conflict_do_nothing`."""
    if session.get_bind().dialect.name == "postgresql":
        return postgresql.insert(row)
    return sqlite.insert(row)
