"""Schemes that people fix or rule out, by names of layers, units or patterns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mpq.choices import pinned_scheme
from mpq.core.errors import InvalidInputError, unknown
from mpq.core.formats import Scheme, parse_scheme
from mpq.core.layers import LayerGraph, LayerName, UnitName
from mpq.core.patterns import matching
from mpq.core.tables import Cell

Named = tuple[str, str | Scheme]


def resolve_pins(
    graph: LayerGraph, pin: Mapping[str, str | Scheme] | None
) -> dict[UnitName, Scheme]:
    """Return the scheme of each pinned unit; keys are names of units or layers, or patterns.

    A name beats a pattern. Raises InvalidInputError where a key matches nothing or the pins of
    one unit's layers differ.
    """
    if pin is not None and not isinstance(pin, Mapping):
        raise InvalidInputError("pin", f"pin is a mapping {{layer: scheme}}, got {pin!r}")
    members: dict[str, tuple[LayerName, ...]]
    members = {layer: (layer,) for unit in graph.units for layer in unit.layers}
    members |= {unit.name: unit.layers for unit in graph.units}
    layers = graph.by_name
    pinned: dict[LayerName, Scheme] = {}
    for pattern, scheme in sorted((pin or {}).items(), key=lambda pair: pair[0] in members):
        for name in matching("pin", pattern, members):
            pinned |= {n: pinned_scheme(layers[n], scheme) for n in members[name]}
    found: dict[UnitName, Scheme] = {}
    for unit in graph.units:
        schemes = {pinned[layer] for layer in unit.layers if layer in pinned}
        if len(schemes) > 1:
            raise InvalidInputError(
                "pin",
                f"unit {unit.name!r} ({unit.reason}) shares one scheme but is pinned to "
                f"{' and '.join(sorted(map(str, schemes)))}",
            )
        if schemes:
            found[unit.name] = schemes.pop()
    return found


def parse_pins(texts: Sequence[str]) -> dict[str, str]:
    """Read "name=scheme" pairs as the command line gives them."""
    pairs = [text.rpartition("=") for text in texts]
    for text, (unit, equals, scheme) in zip(texts, pairs, strict=True):
        if not equals or not unit or not scheme:
            raise InvalidInputError("pin", f"a pin is written NAME=SCHEME, got {text!r}")
    return {unit: scheme for unit, _, scheme in pairs}


def resolve_forbidden(
    graph: LayerGraph, pairs: Sequence[tuple[Named, Named]]
) -> list[tuple[Cell, Cell]]:
    """Return the cells of each forbidden pair of (layer or unit, scheme).

    Raises InvalidInputError for what is no such pair, and for a name that is not searched.
    """
    units = {layer: unit.name for unit in graph.units for layer in unit.layers}
    units |= {unit.name: unit.name for unit in graph.units}
    found = []
    for pair in pairs:
        try:
            (one, first), (other, second) = pair
        except (TypeError, ValueError):
            raise InvalidInputError(
                "forbid",
                "a forbidden pair is ((layer, scheme), (layer, scheme)), got " + repr(pair),
            ) from None
        for name in (one, other):
            if name not in units:
                raise unknown("layer", name, units)
        found.append(
            ((units[one], parse_scheme(first)), (units[other], parse_scheme(second)))  # type: ignore[arg-type]
        )
    return found


def parse_forbidden(texts: Sequence[str]) -> list[tuple[Named, Named]]:
    """Read "name=scheme,name=scheme" as the command line gives it."""
    found: list[tuple[Named, Named]] = []
    for text in texts:
        parts = re.split(r",(?![^()]*\))", text)  # not at the comma of "fixed(8,2)"
        named = [tuple(part.strip().rpartition("=")[::2]) for part in parts]
        if len(named) != 2 or not all(name and scheme for name, scheme in named):
            raise InvalidInputError(
                "forbid", f"a forbidden pair is written NAME=SCHEME,NAME=SCHEME, got {text!r}"
            )
        (one, first), (other, second) = named
        found.append(((one, first), (other, second)))
    return found
