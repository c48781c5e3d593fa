"""Which schemes each unit may take: what was asked for, pinned, and what can be stored."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

from mpq.core.errors import InvalidInputError, MpqWarning
from mpq.core.formats import Scheme, parse_scheme
from mpq.core.layers import Layer, LayerGraph
from mpq.core.patterns import matching
from mpq.core.tables import Cells
from mpq.nn.rounding import check_rounding


def parse_schemes(texts: Sequence[str | Scheme]) -> tuple[Scheme, ...]:
    """Read a list of schemes; repeated ones are dropped with a warning, an empty list refused."""
    if isinstance(texts, str):
        raise InvalidInputError("schemes", f"schemes is a list of texts, got {texts!r}")
    schemes = [parse_scheme(text) for text in texts]  # type: ignore[arg-type]
    if not schemes:
        raise InvalidInputError("schemes", "the list of schemes is empty: give at least one")
    unique = tuple(dict.fromkeys(schemes))
    if len(unique) < len(schemes):
        twice = sorted({str(s) for s in schemes if schemes.count(s) > 1})
        warnings.warn(
            f"schemes listed more than once: {', '.join(twice)}", MpqWarning, stacklevel=2
        )
    return unique


def scheme_texts(schemes: Sequence[str | Scheme]) -> tuple[str, ...]:
    """Return the texts of schemes, each read once to be sure of it."""
    if isinstance(schemes, str) or not schemes:
        parse_schemes(schemes)
    return tuple(str(parse_scheme(scheme)) for scheme in schemes)  # type: ignore[arg-type]


def make_cells(
    graph: LayerGraph,
    schemes: Callable[[Layer], Sequence[Scheme]],
    pins: Mapping[str, str | Scheme] | None = None,
) -> Cells:
    """Return the choices of every unit.

    `schemes(layer)` lists what a layer may take; a unit may take what all its layers may, and
    a unit with a pinned layer only that scheme. Keys of `pins` are layer names or patterns.
    Raises InvalidInputError where a scheme cannot store a layer (group size), pins disagree in
    a unit, or nothing is left.
    """
    pinned = _pinned(graph, pins or {})
    layers = graph.by_name
    choices = []
    for unit in graph.units:
        members = [layers[name] for name in unit.layers]
        fixed = {pinned[layer.name] for layer in members if layer.name in pinned}
        if len(fixed) > 1:
            raise InvalidInputError(
                "pin",
                f"unit {unit.name!r} ({unit.reason}) shares one scheme but is pinned to "
                f"{' and '.join(sorted(map(str, fixed)))}",
            )
        allowed = list(fixed) or _common([schemes(layer) for layer in members])
        for layer in members:
            for scheme in allowed:
                _check_storable(layer, scheme)
        if not allowed:
            raise InvalidInputError("no_choices", f"no scheme fits all layers of {unit.name!r}")
        choices.append(tuple(allowed))
    return Cells(units=tuple(unit.name for unit in graph.units), schemes=tuple(choices))


def _pinned(graph: LayerGraph, pins: Mapping[str, str | Scheme]) -> dict[str, Scheme]:
    searched = [name for unit in graph.units for name in unit.layers]
    exact_last = sorted(pins.items(), key=lambda pin: pin[0] in searched)  # a name beats a pattern
    return {
        name: parse_scheme(scheme)  # type: ignore[arg-type]
        for pattern, scheme in exact_last
        for name in matching("pin", pattern, searched)
    }


def _common(lists: Sequence[Sequence[Scheme]]) -> list[Scheme]:
    return [s for s in dict.fromkeys(lists[0]) if all(s in other for other in lists)]


def _check_storable(layer: Layer, scheme: Scheme) -> None:
    try:
        scheme.weights.num_scales(layer.weight_shape, layer.channel_axis)
    except InvalidInputError as error:
        raise InvalidInputError(
            error.code,
            f"{scheme} does not fit layer {layer.name!r}: {error}; leave the layer out with "
            f"skip=[{layer.name!r}], pin it to another scheme, or use a per-channel format",
        ) from None
    check_rounding(layer, scheme.weights)
    if layer.why_weights_only and not scheme.activations.is_native:
        raise InvalidInputError(
            "scheme",
            f"{scheme} quantizes activations, but {layer.kind} {layer.name!r} "
            f"{layer.why_weights_only}: pin it to a weights-only scheme",
        )
    if (
        scheme.weights.is_native
        and scheme.weights.bits * layer.num_weights > layer.weight_bytes * 8
    ):
        raise InvalidInputError(
            "scheme",
            f"{scheme} is wider than the {layer.weight_bytes * 8 // layer.num_weights}-bit weights "
            f"of layer {layer.name!r}",
        )
