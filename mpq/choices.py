"""Which schemes each unit may take: what was asked for, pinned, and what can be stored."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from hw_cost_models.kv_cache import cached_bytes
from mpq.core.errors import InvalidInputError, MpqWarning
from mpq.core.formats import (
    FP32,
    Format,
    PerChannel,
    PerGroup,
    Scheme,
    parse_format,
    parse_scheme,
)
from mpq.core.jobs import OnIndivisible
from mpq.core.layers import Layer, LayerGraph, Unit
from mpq.core.patterns import matching
from mpq.core.tables import Cells


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
    on_indivisible: OnIndivisible = "refuse",
) -> Cells:
    """Return the choices of every unit.

    `schemes(layer)` lists what a layer may take; a unit may take what all its layers may, and
    a unit with a pinned layer only that scheme. Keys of `pins` are layer names or patterns.
    Groups that do not divide a layer of a unit become a scale for each channel where
    `on_indivisible` is "channel", which is warned about.
    Raises InvalidInputError where a scheme cannot store a layer (group size), pins disagree in
    a unit, or nothing is left.
    """
    pinned = _pinned(graph, pins or {})
    layers = graph.by_name
    apart = {layer.source for layer in graph.apart if layer.is_input}
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
        if on_indivisible == "channel":
            allowed = _divided(unit, members, allowed)
        for layer in members:
            for scheme in allowed:
                _check_apart(layer, scheme, layer.name in apart)
                if not layer.source:
                    _check_storable(layer, scheme)
        if not allowed:
            raise InvalidInputError("no_choices", f"no scheme fits all layers of {unit.name!r}")
        choices.append(tuple(allowed))
    return Cells(units=tuple(unit.name for unit in graph.units), schemes=tuple(choices))


def _pinned(graph: LayerGraph, pins: Mapping[str, str | Scheme]) -> dict[str, Scheme]:
    searched = [name for unit in graph.units for name in unit.layers]
    exact_last = sorted(pins.items(), key=lambda pin: pin[0] in searched)  # a name beats a pattern
    layers = graph.by_name
    return {
        name: pinned_scheme(layers[name], scheme)
        for pattern, scheme in exact_last
        for name in matching("pin", pattern, searched)
    }


def pinned_scheme(layer: Layer, scheme: str | Scheme) -> Scheme:
    """Return the scheme that a layer is pinned to; "int8" of an input is its activations."""
    if layer.is_input and isinstance(scheme, str) and ":" not in scheme:
        return Scheme(FP32, parse_format(scheme, "activations"))
    return parse_scheme(scheme)  # type: ignore[arg-type]


def _common(lists: Sequence[Sequence[Scheme]]) -> list[Scheme]:
    return [s for s in dict.fromkeys(lists[0]) if all(s in other for other in lists)]


def _check_apart(layer: Layer, scheme: Scheme, reads_apart: bool) -> None:
    if layer.is_cache:
        cached_bytes(layer, scheme.weights)
    wrong = ""
    if layer.is_input and scheme.weights != FP32:
        wrong = f"{layer.name!r} is the input of a layer: write fp32:int8, or int8 in a pin"
    if layer.is_cache and not scheme.activations.is_native:
        wrong = f"{layer.name!r} is a KV cache: write one format, such as int8"
    if reads_apart and not scheme.activations.is_native:
        wrong = (
            f"activations are searched apart from weights: pin {layer.name!r} to "
            f"{Scheme(scheme.weights)} and '{layer.name}.input' to the other"
        )
    if wrong:
        raise InvalidInputError("scheme", f"{scheme} cannot be taken, {wrong}")


def _divided(unit: Unit, layers: Sequence[Layer], schemes: Sequence[Scheme]) -> list[Scheme]:
    """Return schemes with a scale for each channel where groups do not divide a layer."""
    found = []
    for scheme in schemes:
        weights = scheme.weights
        fallback = replace(scheme, weights=replace(weights, granularity=PerChannel()))
        plain = weights.high is None and weights.family not in ("mx", "nvfp4")
        if plain and not all(divides(layer, weights) for layer in layers):
            warnings.warn(
                f"unit {unit.name!r}: the groups of {scheme} do not divide its channels, it is "
                f"offered {fallback}",
                MpqWarning,
                stacklevel=3,
            )
            scheme = fallback
        found.append(scheme)
    return list(dict.fromkeys(found))


def divides(layer: Layer, weights: Format) -> bool:
    """Tell whether the groups of a format divide the channels of a layer."""
    try:
        weights.num_scales(layer.weight_shape, layer.channel_axis)
    except InvalidInputError:
        return False
    return True


def _check_storable(layer: Layer, scheme: Scheme) -> None:
    try:
        scheme.weights.parts(layer.weight_shape, layer.channel_axis)
    except InvalidInputError as error:
        raise InvalidInputError(
            error.code,
            f"{scheme} does not fit layer {layer.name!r}: {error}; leave the layer out with "
            f"skip=[{layer.name!r}], pin it to another scheme, or use a per-channel format "
            f"(on_indivisible='channel' does where groups do not divide)",
        ) from None
    if scheme.weights.rounding != "nearest":
        from mpq.nn.rounding import check_rounding  # late: torch is slow to load

        check_rounding(layer, scheme.weights)
    if layer.why_weights_only and not scheme.activations.is_native:
        raise InvalidInputError(
            "scheme",
            f"{scheme} quantizes activations, but {layer.kind} {layer.name!r} "
            f"{layer.why_weights_only}: pin it to a weights-only scheme",
        )
    _check_blocks(layer, scheme)
    if (
        scheme.weights.is_native
        and scheme.weights.bits * layer.num_weights > layer.weight_bytes * 8
    ):
        raise InvalidInputError(
            "scheme",
            f"{scheme} is wider than the {layer.weight_bytes * 8 // layer.num_weights}-bit weights "
            f"of layer {layer.name!r}",
        )


def _check_blocks(layer: Layer, scheme: Scheme) -> None:
    """Raise InvalidInputError for blocks of activations that do not lie along a layer's inputs."""
    blocks = scheme.activations.granularity
    if not isinstance(blocks, PerGroup):
        return
    if layer.kind.startswith("conv"):
        raise InvalidInputError(
            "scheme",
            f"{scheme}: blocks of activations lie along the inputs of linear layers, "
            f"{layer.name!r} is a {layer.kind}: skip it or give it a format with one scale",
        )
    inputs = layer.weight_shape[-1]
    if inputs % blocks.size:
        raise InvalidInputError(
            "group_size",
            f"{scheme} does not fit layer {layer.name!r}: blocks of {blocks.size} do not divide "
            f"its {inputs} inputs; leave the layer out with skip=[{layer.name!r}] or pin it to "
            f"another scheme",
        )
