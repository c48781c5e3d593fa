"""Cells as text, and back, in their order."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from mpq.core.errors import InvalidInputError
from mpq.core.formats import Scheme, parse_scheme
from mpq.core.tables import Cells

CellText = tuple[str, str]  # (unit, scheme)


@functools.lru_cache(maxsize=4096)
def scheme_text(scheme: Scheme) -> str:
    """Return the text of a scheme.

    Raises InvalidInputError (`scheme_text`) where the text would read back as another scheme,
    as with scales of 8 bits, for which there is no text.
    """
    text = str(scheme)
    if scheme_of(text) != scheme:
        raise InvalidInputError(
            "scheme_text", f"{scheme!r} cannot be stored: its text {text!r} means another scheme"
        )
    return text


@functools.lru_cache(maxsize=4096)
def scheme_of(text: str) -> Scheme:
    """Return the scheme of a text."""
    return parse_scheme(text)


def cell_texts(cells: Cells) -> list[CellText]:
    """Return (unit, scheme) of every cell, in order."""
    return [(unit, scheme_text(scheme)) for unit, scheme in cells]


def cells_of(texts: Sequence[CellText]) -> Cells:
    """Return the cells of (unit, scheme) pairs that are in order."""
    of_unit: dict[str, list[str]] = {}
    for unit, text in texts:
        of_unit.setdefault(unit, []).append(text)
    shared: dict[tuple[str, ...], tuple[Scheme, ...]] = {}  # many units take the same ones
    schemes = []
    for found in map(tuple, of_unit.values()):
        if found not in shared:
            shared[found] = tuple(map(scheme_of, found))
        schemes.append(shared[found])
    return Cells(units=tuple(of_unit), schemes=tuple(schemes))
