"""What a target cannot run, told before anything is written, with the nearest scheme it can."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mpq.core.chosen import Chosen
from mpq.core.errors import InvalidInputError
from mpq.core.formats import NATIVE_BITS, Format, PerGroup, Role, Scheme, parse_scheme
from mpq.core.layers import Layer
from mpq.core.protocols import Exporter
from mpq.nn.units import fused_siblings

_NO_CACHES = "says nothing of KV caches in its file: search without kv_cache, or pin caches"
GROUPS = (16, 32, 64, 128, 256)


def check_runs(exporter: Exporter, chosen: Chosen) -> None:
    """Raise InvalidInputError for the first layer that the target cannot run as allocated.

    The message names the layer, the rule and the nearest scheme that the target runs it in.
    """
    for layer, scheme in chosen.searched:
        if rule := _refusal(exporter, layer, scheme):
            near = nearest(exporter, layer, scheme)
            hint = f"nearest: {near}" if near else "leave the layer out of the search"
            raise InvalidInputError(
                "export", f"layer {layer.name!r} is {scheme}: {exporter.name} {rule}; {hint}"
            )
    if exporter.fuses:
        _check_fused(exporter, chosen)


def as_told(exporter: Exporter, chosen: Chosen) -> Chosen:
    """Return what a target is told: of a rounding nothing, unless its file names every format."""
    if exporter.every_format:
        return chosen
    return replace(chosen, schemes={name: s.as_stored for name, s in chosen.schemes.items()})


def runnable(exporter: Exporter, layer: Layer) -> tuple[Scheme, ...]:
    """Return the schemes that the target runs a layer in, fewest bits first.

    Groups are powers of two from 16 to 256; a target may run others too.
    """
    found = [s for s in _every_scheme() if not _refusal(exporter, layer, s)]
    return tuple(sorted(found, key=lambda scheme: _bits(layer, scheme)))


def nearest(exporter: Exporter, layer: Layer, scheme: Scheme) -> Scheme | None:
    """Return the scheme that the target runs a layer in that is nearest, None without one.

    The same activations are preferred, integers for integers, the nearest number of bits (of two
    the larger), zero points and scales of the same kind, then as many of them.
    """
    own = scheme.weights

    def distance(other: Scheme) -> tuple[float, ...]:
        weights = other.weights
        return (
            other.activations != scheme.activations,
            weights.is_native != own.is_native,
            abs(weights.bits - own.bits),
            -weights.bits,
            weights.symmetric != own.symmetric,
            type(weights.granularity) is not type(own.granularity),
            abs(_overhead(layer, other) - _overhead(layer, scheme)),
        )

    return min(runnable(exporter, layer), key=distance, default=None)


def as_it_is(layer: Layer) -> Scheme:
    """Return the scheme of a layer that nothing is done to."""
    return parse_scheme(layer.native_family)


def refuse_native(layer: Layer, scheme: Scheme) -> str:
    """Return the rule that native weights break where a target only leaves layers as they are."""
    own = as_it_is(layer)
    if not scheme.weights.is_native or scheme == own:
        return ""
    return f"quantizes the weights of a layer or leaves it as it is ({own})"


def _refusal(exporter: Exporter, layer: Layer, scheme: Scheme) -> str:
    if layer.is_cache:
        own = scheme.weights.is_native or exporter.name == "mpq"
        return "" if own else _NO_CACHES
    try:
        scheme.weights.num_scales(layer.weight_shape, layer.channel_axis)
    except InvalidInputError as error:
        return str(error)
    if not scheme.activations.is_native and layer.why_weights_only:
        return f"cannot quantize activations of a layer that {layer.why_weights_only}"
    if scheme.activations.static and not exporter.keeps_static:
        return "has no static range of activations in its file"
    if not exporter.every_format:
        roles: tuple[tuple[Format, Role], ...] = (
            (scheme.weights, "weights"),
            (scheme.activations, "activations"),
        )
        for fmt, role in roles:
            if not fmt.is_native and not fmt.is_plain_integer:
                return f"has no {role} in {fmt.text(role)}"
    return exporter.refusal(layer, scheme)


def _bits(layer: Layer, scheme: Scheme) -> float:
    return scheme.weights.bits_per_element(layer.weight_shape, layer.channel_axis)


def _overhead(layer: Layer, scheme: Scheme) -> float:
    """Return the scales of a weight, of groups that do not divide it too."""
    if isinstance(scheme.weights.granularity, PerGroup):
        return layer.num_weights / scheme.weights.granularity.size
    return scheme.weights.num_scales(layer.weight_shape, layer.channel_axis)


def _every_scheme() -> Iterator[Scheme]:
    yield from map(parse_scheme, NATIVE_BITS)
    for bits in range(1, 9):
        for granularity in ("", "t", *(f"g{size}" for size in GROUPS)):
            for zero_point in ("", "a"):
                for activations in ("", ":int8", ":int8s", ":int4"):
                    yield parse_scheme(f"int{bits}{granularity}{zero_point}{activations}")


def _check_fused(exporter: Exporter, chosen: Chosen) -> None:
    """Siblings of equal input shapes are taken to read the same tensor: the graph does not say."""
    layers = chosen.graph.layers
    shapes = {shape: i for i, shape in enumerate({layer.input_shape for layer in layers})}
    sources = {layer.name: shapes[layer.input_shape] for layer in layers}
    schemes = {layer.name: chosen.schemes.get(layer.name, as_it_is(layer)) for layer in layers}
    for names, reason in fused_siblings(layers, sources):
        if len({schemes[name] for name in names}) > 1:
            widest = max((schemes[name] for name in names), key=lambda s: s.weights.bits)
            told = ", ".join(f"{name!r} is {schemes[name]}" for name in names)
            raise InvalidInputError(
                "export",
                f"layer {told}: {exporter.name} runs {reason} as one kernel with one scheme; "
                f"nearest: {widest} for all of them",
            )
