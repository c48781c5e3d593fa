"""The bits of every layer of an allocation as a small picture: height and colour tell bits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from mpq.core.formats import Scheme
from mpq.dashboard import colours

HIGH = 100.0
_MOST_BARS = 400  # beyond which neighbours alike are one bar
_MOST_BITS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A layer, or several alike, from place `x` on."""

    x: int
    width: int
    y: float
    height: float
    colour: str
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """Bars over `width` places, and a text that says the same."""

    bars: tuple[Bar, ...]
    width: int
    text: str


def strip(order: Sequence[str], schemes: Mapping[str, Scheme]) -> Strip:
    """Draw the layers in an order; one without a scheme leaves its place empty."""
    places = [(place, name) for place, name in enumerate(order) if name in schemes]
    if len(places) <= _MOST_BARS:
        groups = [[place] for place in places]
    else:
        numbered = groupby(enumerate(places), lambda p: (schemes[p[1][1]], p[1][0] - p[0]))
        groups = [[place for _, place in group] for _, group in numbered]
    counts = Counter(str(schemes[name]) for _, name in places)
    told = ", ".join(f"{count} at {scheme}" for scheme, count in counts.most_common())
    return Strip(
        bars=tuple(_bar(group, schemes[group[0][1]]) for group in groups),
        width=max(len(order), 1),
        text=f"{len(places)} layers: {told}." if places else "No layer was searched.",
    )


def _bar(group: Sequence[tuple[int, str]], scheme: Scheme) -> Bar:
    (first, name), (last, other) = group[0], group[-1]
    share = math.log2(1 + min(scheme.weights.bits, _MOST_BITS)) / math.log2(1 + _MOST_BITS)
    height = round(HIGH * share, 1)
    named = name if name == other else f"{name} … {other}"
    return Bar(
        x=first,
        width=last - first + 1,
        y=HIGH - height,
        height=height,
        colour=colours.of_bits(scheme),
        title=f"{named}: {scheme}",
    )
