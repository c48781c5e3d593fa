"""Tokens: who may ask the server what, and until when, by the clock of the database."""

from __future__ import annotations

import hmac
import uuid
from datetime import datetime, timedelta

from sqlalchemy import func, insert, or_, select, update
from sqlalchemy.orm import Session

from mpq.core.access import Scope
from mpq.core.errors import InvalidInputError, unknown
from mpq.store.jobs import now
from mpq.store.models import TokenRow
from mpq.store.patience import again, once
from mpq.store.records import TokenRecord

_TOLD = timedelta(hours=1)  # a use is noted so often, not with every request
_COLUMNS = (
    TokenRow.id,
    TokenRow.name,
    TokenRow.scope,
    TokenRow.created_at,
    TokenRow.expires_at,
    TokenRow.used_at,
    TokenRow.revoked_at,
)


def add(session: Session, name: str, digest: str, scope: Scope, lifetime: timedelta) -> TokenRecord:
    """Keep the digest of a secret; raises InvalidInputError (`token_name`) for a name in use."""
    if again() and (kept := session.scalar(select(TokenRow.id).filter_by(digest=digest))):
        return _one(session, kept)
    at = now(session)
    is_valid = (TokenRow.revoked_at.is_(None), TokenRow.expires_at > at)
    if session.scalar(select(TokenRow.id).where(TokenRow.name == name, *is_valid)) is not None:
        raise InvalidInputError(
            "token_name", f"there is a token {name!r} already: revoke it, or name this one anew"
        )
    token_id = once("token", lambda: uuid.uuid4().hex[:12])
    session.execute(
        insert(TokenRow).values(
            id=token_id,
            name=name,
            digest=digest,
            scope=scope.value,
            created_at=at,
            expires_at=at + lifetime,
        )
    )
    return _one(session, token_id)


def every(session: Session) -> list[TokenRecord]:
    """Return all tokens, the oldest first."""
    at = now(session)
    rows = session.execute(select(*_COLUMNS).order_by(TokenRow.created_at, TokenRow.id)).mappings()
    return [_record(dict(row), at) for row in rows]


def revoke(session: Session, text: str) -> list[str]:
    """End the token with this id, or those of this name, and return their ids.

    Raises InvalidInputError (`unknown_token`).
    """
    here = or_(TokenRow.id == text, TokenRow.name == text)
    found = list(session.scalars(select(TokenRow.id).where(here)))
    if not found:
        raise unknown("token", text, set(session.scalars(select(TokenRow.name))))
    kept = (TokenRow.id.in_(found), TokenRow.revoked_at.is_(None))
    session.execute(update(TokenRow).where(*kept).values(revoked_at=now(session)))
    return found


def find(session: Session, digest: str) -> TokenRecord | None:
    """Return the token whose secret has this digest, None where there is none."""
    row = (
        session.execute(select(*_COLUMNS, TokenRow.digest).where(TokenRow.digest == digest))
        .mappings()
        .one_or_none()
    )
    if row is None or not hmac.compare_digest(row["digest"], digest):
        return None
    kept = {name: value for name, value in row.items() if name != "digest"}
    return _record(kept, now(session))


def note_use(session: Session, token_id: str) -> None:
    """Note that a token is used now."""
    session.execute(update(TokenRow).where(TokenRow.id == token_id).values(used_at=now(session)))


def is_stale(token: TokenRecord, at: datetime) -> bool:
    """Tell whether a token was last used over an hour ago, as far as is noted."""
    return token.used_at is None or token.used_at < at - _TOLD


def count(session: Session) -> int:
    """Return how many tokens were ever made."""
    return session.scalar(select(func.count()).select_from(TokenRow)) or 0


def _one(session: Session, token_id: str) -> TokenRecord:
    row = session.execute(select(*_COLUMNS).where(TokenRow.id == token_id)).mappings().one()
    return _record(dict(row), now(session))


def _record(row: dict[str, object], at: datetime) -> TokenRecord:
    expires_at, revoked_at = row["expires_at"], row["revoked_at"]
    assert isinstance(expires_at, datetime)
    is_valid = revoked_at is None and expires_at > at
    scope = Scope(str(row["scope"]))
    return TokenRecord(**{**row, "scope": scope, "is_valid": is_valid})  # type: ignore[arg-type]
