"""Results of scoring tasks under the key of their content, shared by all runs."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from mpq.core.protocols import Partial
from mpq.store.arrays import npz_arrays, npz_bytes
from mpq.store.conflict import insert_into
from mpq.store.models import PartialRow

_KEYS_AT_ONCE = 500  # databases limit the parameters of a statement
_TOLD = timedelta(hours=1)  # a use is noted so often, not with every look


def get(session: Session, keys: Iterable[str]) -> dict[str, Partial]:
    """Return the results that are there, in the order of the keys."""
    wanted = list(dict.fromkeys(keys))
    found: dict[str, bytes] = {}
    for start in range(0, len(wanted), _KEYS_AT_ONCE):
        some = wanted[start : start + _KEYS_AT_ONCE]
        query = select(PartialRow.key, PartialRow.arrays).where(PartialRow.key.in_(some))
        found.update((key, arrays) for key, arrays in session.execute(query))
    return {key: npz_arrays(key, found[key]) for key in wanted if key in found}


def stale(session: Session, keys: Iterable[str]) -> list[str]:
    """Return which of the results were last used over an hour ago, as far as is noted."""
    wanted = list(keys)
    found: list[str] = []
    is_old = or_(PartialRow.used_at.is_(None), PartialRow.used_at < datetime.now(UTC) - _TOLD)
    for start in range(0, len(wanted), _KEYS_AT_ONCE):
        some = PartialRow.key.in_(wanted[start : start + _KEYS_AT_ONCE])
        found += session.scalars(select(PartialRow.key).where(some, is_old)).all()
    return found


def note_use(session: Session, keys: list[str]) -> None:
    """Note that results are used now."""
    for start in range(0, len(keys), _KEYS_AT_ONCE):
        some = PartialRow.key.in_(keys[start : start + _KEYS_AT_ONCE])
        session.execute(update(PartialRow).where(some).values(used_at=datetime.now(UTC)))


def seconds(session: Session, keys: Iterable[str]) -> dict[str, float]:
    """Return how long each result that is there took, in the order of the keys."""
    wanted = list(dict.fromkeys(keys))
    found: dict[str, float] = {}
    for start in range(0, len(wanted), _KEYS_AT_ONCE):
        some = wanted[start : start + _KEYS_AT_ONCE]
        query = select(PartialRow.key, PartialRow.seconds).where(PartialRow.key.in_(some))
        found.update((key, taken) for key, taken in session.execute(query))
    return {key: found[key] for key in wanted if key in found}


def put(session: Session, key: str, partial: Partial, seconds: float) -> None:
    """Keep a result; where its key is there already, the first one stays."""
    now = datetime.now(UTC)
    row = insert_into(session, PartialRow).values(
        key=key,
        seconds=float(seconds),
        arrays=npz_bytes(partial),
        created_at=now,
        used_at=now,
    )
    session.execute(row.on_conflict_do_nothing())
