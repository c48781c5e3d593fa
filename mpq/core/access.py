"""What somebody who asks over HTTP may do."""

from __future__ import annotations

import enum
import hashlib
import secrets

PREFIX = "mpq_"  # by which scanners for leaked secrets can know one
_BYTES = 32


class Scope(enum.StrEnum):
    """Each allows what those before it do: look, submit and stop runs, delete them."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"

    def allows(self, wanted: Scope) -> bool:
        """Tell whether this scope is enough for `wanted`."""
        order = list(Scope)
        return order.index(self) >= order.index(wanted)


def new_secret() -> str:
    """Return a secret of 256 random bits, as its owner keeps it."""
    return PREFIX + secrets.token_urlsafe(_BYTES)


def secret_digest(secret: str) -> str:
    """Return what the database keeps of a secret: SHA-256, in hex.

    A secret is random, so no slow hash is needed to keep anybody from guessing it.
    """
    return hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest()
