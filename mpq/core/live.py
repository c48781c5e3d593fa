"""What the record of a job says of an object that was passed as it is: kept, or not."""

from __future__ import annotations

import re

LIVE = "<live "
ARTIFACT = "artifact:"
_DIGEST = re.compile(rf"{ARTIFACT}([0-9a-f]{{64}})")


def live_text(source: object) -> str:
    """Return a text as it is, and of any other object its kind: "<live Linear>"."""
    return source if isinstance(source, str) else f"{LIVE}{type(source).__name__}>"


def is_live(kept: object) -> bool:
    """Tell whether a record only says that there was an object."""
    return isinstance(kept, str) and kept.startswith(LIVE)


def artifact_digest(kept: object) -> str | None:
    """Return the digest that "artifact:<digest>" names, None for anything else."""
    found = _DIGEST.fullmatch(kept) if isinstance(kept, str) else None
    return None if found is None else found[1]


def short_source(text: str) -> str:
    """Return a source as a table shows it: of a digest what tells it from others."""
    digest = artifact_digest(text)
    return text if digest is None else f"{ARTIFACT}{digest[:8]}"
