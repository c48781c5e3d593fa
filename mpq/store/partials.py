"""Results of scoring tasks under the key of their content, shared by all runs."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from mpq.core.protocols import Partial
from mpq.store.arrays import npz_arrays, npz_bytes
from mpq.store.conflict import insert_into
from mpq.store.models import PartialRow

_KEYS_AT_ONCE = 500  # databases limit the parameters of a statement


def get(session: Session, keys: Iterable[str]) -> dict[str, Partial]:
    """Return the results that are there, in the order of the keys."""
    wanted = list(dict.fromkeys(keys))
    found: dict[str, bytes] = {}
    for start in range(0, len(wanted), _KEYS_AT_ONCE):
        some = wanted[start : start + _KEYS_AT_ONCE]
        query = select(PartialRow.key, PartialRow.arrays).where(PartialRow.key.in_(some))
        found.update((key, arrays) for key, arrays in session.execute(query))
    return {key: npz_arrays(key, found[key]) for key in wanted if key in found}


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
    row = insert_into(session, PartialRow).values(
        key=key,
        seconds=float(seconds),
        arrays=npz_bytes(partial),
        created_at=datetime.now(UTC),
    )
    session.execute(row.on_conflict_do_nothing())
