"""The text form of something with a few settings: "percentile(99.9)", "smooth(0.5)", "minmax"."""

from __future__ import annotations

import re
from collections.abc import Collection

from mpq.core.errors import InvalidInputError, unknown

_FORM = re.compile(r"\s*([A-Za-z_]\w*)\s*(?:\(([^()]*)\))?\s*")


def parse_called(kind: str, text: object, known: Collection[str]) -> tuple[str, tuple[float, ...]]:
    """Return the name and the numbers in "name(1, 0.5)".

    `kind` says what is named, in errors. Raises InvalidInputError (`kind`) for another form and
    (`unknown_kind`) for a name that is not among `known`.
    """
    found = _FORM.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise InvalidInputError(
            kind, f"a {kind} is a name, or a name and numbers such as 'name(0.5)', got {text!r}"
        )
    name, settings = found.groups()
    if name not in known:
        raise unknown(kind, name, known)
    try:
        return name, tuple(float(part) for part in (settings or "").split(",") if part.strip())
    except ValueError:
        raise InvalidInputError(kind, f"{kind} {text!r}: settings are numbers") from None
