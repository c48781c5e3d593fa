"""Colours that colour-blind readers tell apart: of bits, and of what reinforces or cancels."""

from __future__ import annotations

import functools
import math

from mpq.core.formats import Scheme

# Anchors of cividis (Nuñez, Anderton and Renslow 2018): even in lightness, blue to yellow.
CIVIDIS = ("#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369",
           "#e1cc55", "#fee838")  # fmt: skip
# Of runs side by side: 3:1 or more on the pages of both themes, told by dash and symbol as well.
RUNS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a67c00", "#8c8c8c")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
OUTLINE = "#8a8a8a"  # around what is filled with a colour of CIVIDIS: its ends fade into a theme
EFFECTS = ((0.0, "#2166ac"), (0.5, "#f7f7f7"), (1.0, "#b35806"))  # cancels, none, reinforces
_FEW, _MANY = 1.0, 16.0  # bits at the ends of the scale


def of_bits(scheme: Scheme) -> str:
    """Return the colour of a scheme by the bits of its weights."""
    return of_number(scheme.weights.bits)


@functools.cache
def of_number(bits: float) -> str:
    """Return the colour of a number of bits, on a logarithmic scale."""
    return at(math.log2(min(max(bits, _FEW), _MANY) / _FEW) / math.log2(_MANY / _FEW))


def at(share: float) -> str:
    """Return the colour at a share of the way from blue to yellow."""
    place = share * (len(CIVIDIS) - 1)
    low = min(int(place), len(CIVIDIS) - 2)
    return _between(CIVIDIS[low], CIVIDIS[low + 1], place - low)


def _between(first: str, second: str, share: float) -> str:
    parts = [
        round((1 - share) * int(first[i : i + 2], 16) + share * int(second[i : i + 2], 16))
        for i in (1, 3, 5)
    ]
    return "#" + "".join(f"{part:02x}" for part in parts)
