"""What the record of a job says of an object that was passed as it is, and is not kept."""

from __future__ import annotations

LIVE = "<live "


def live_text(source: object) -> str:
    """Return a text as it is, and of any other object its kind: "<live Linear>"."""
    return source if isinstance(source, str) else f"{LIVE}{type(source).__name__}>"


def is_live(kept: object) -> bool:
    """Tell whether a record only says that there was an object."""
    return isinstance(kept, str) and kept.startswith(LIVE)
