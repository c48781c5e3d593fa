"""Moments and spans of time as people write them."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from mpq.core.errors import InvalidInputError

_SPAN = re.compile(r"\s*(\d{1,6})\s*([mhdw])\s*")
_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def span(text: str) -> timedelta:
    """Read "90m", "12h", "30d" or "4w"; raises InvalidInputError (`span`)."""
    found = _SPAN.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise InvalidInputError(
            "span", f"a span of time is written 90m, 12h, 30d or 4w, got {text!r}"
        )
    return timedelta(seconds=int(found[1]) * _SECONDS[found[2]])


def moment(given: str | datetime, now: datetime) -> datetime:
    """Read "2026-03-01", "2026-03-01T12:00", or a span such as "7d" before `now`.

    What has no zone is UTC. Raises InvalidInputError (`moment`).
    """
    if isinstance(given, datetime):
        return given if given.tzinfo else given.replace(tzinfo=UTC)
    try:
        if isinstance(given, str) and _SPAN.fullmatch(given):
            return now - span(given)
        found = datetime.fromisoformat(given)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        raise InvalidInputError(
            "moment",
            f"a moment is a date such as 2026-03-01 or 2026-03-01T12:00, or 7d for seven days ago, "
            f"got {given!r}",
        ) from None
