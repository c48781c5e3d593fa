"""What a store does for those who ask over HTTP: their tokens."""

from __future__ import annotations

from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from mpq.core.access import Scope, new_secret, secret_digest
from mpq.core.errors import InvalidInputError
from mpq.store import tokens
from mpq.store.patience import Patience, patient
from mpq.store.records import TokenRecord

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

_LONGEST_DAYS = 3650.0


@patient
class Access:
    """The methods of a store for tokens; each is one transaction."""

    _patience: Patience

    def _read(self, run_id: str | None = None) -> AbstractContextManager[Session]:
        raise NotImplementedError

    def _write(self, run_id: str | None = None) -> AbstractContextManager[Session]:
        raise NotImplementedError

    def create_token(
        self, name: str, scope: Scope = Scope.READ, days: float = 30.0
    ) -> tuple[TokenRecord, str]:
        """Make a token and return it with its secret, of which only a digest is kept.

        Raises InvalidInputError (`token_name`, `token_days`).
        """
        if not (name.strip() and len(name) <= 100 and name.isprintable()):
            raise InvalidInputError(
                "token_name", f"a token's name has 1 to 100 printable characters, got {name!r}"
            )
        if not 0 < days <= _LONGEST_DAYS:
            raise InvalidInputError(
                "token_days", f"a token lives more than 0, at most {_LONGEST_DAYS:g} days: {days!r}"
            )
        secret = new_secret()
        return self._add_token(name, secret, scope, timedelta(days=days)), secret

    def _add_token(self, name: str, secret: str, scope: Scope, lifetime: timedelta) -> TokenRecord:
        with self._write() as session:
            return tokens.add(session, name, secret_digest(secret), scope, lifetime)

    def tokens(self) -> list[TokenRecord]:
        """Return all tokens that were ever made, the oldest first."""
        with self._read() as session:
            return tokens.every(session)

    def revoke_token(self, text: str) -> list[str]:
        """End the token with this id, or those of this name; returns their ids."""
        with self._write() as session:
            return tokens.revoke(session, text)

    def token(self, secret: str) -> TokenRecord | None:
        """Return the token of a secret, valid or not, None where there is none; notes its use."""
        with self._read() as session:
            found = tokens.find(session, secret_digest(secret))
        if found is not None and found.is_valid and tokens.is_stale(found, datetime.now(UTC)):
            with self._write() as session:
                tokens.note_use(session, found.id)
        return found

    def has_tokens(self) -> bool:
        """Tell whether a token was ever made, revoked and expired ones included."""
        with self._read() as session:
            return tokens.count(session) > 0
