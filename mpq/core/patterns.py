"""Names of layers and units picked by shell patterns, loudly when nothing matches."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable

from mpq.core.errors import InvalidInputError

_LONGEST = 500


def matching(what: str, pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names equal to `pattern` or matching it as a shell pattern ("*.attn.*").

    Raises InvalidInputError where nothing matches: a typo must not silently do nothing.
    """
    if not isinstance(pattern, str) or not 0 < len(pattern) <= _LONGEST:
        raise InvalidInputError(
            "pattern",
            f"{what}: a layer pattern is a text of 1 to {_LONGEST} characters, "
            f"got {str(pattern)[:40]!r}",
        )
    known = list(names)
    if pattern in known:
        return [pattern]
    found = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        near = difflib.get_close_matches(pattern, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"layers are named like {known[:3]}"
        raise InvalidInputError("pattern", f"{what} pattern {pattern!r} matches no layer: {hint}")
    return found
