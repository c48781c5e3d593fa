"""The inputs of layers as units of their own, so that activations are searched apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mpq.core.layers import LayerGraph, LayerName, Unit
from mpq.nn.units import unit_name
from mpq.nn.weights import INPUT


def with_inputs(graph: LayerGraph, sources: Mapping[LayerName, int]) -> LayerGraph:
    """Return the graph with a unit for the input of every searched layer that multiplies.

    Layers that read the same tensor, which `sources[name]` identifies, share one: it is quantized
    once. Embeddings and experts have no input that can be.
    """
    named = graph.by_name
    searched = (named[name] for unit in graph.units for name in unit.layers)
    inputs = [
        replace(
            layer,
            name=f"{layer.name}.{INPUT}",
            weight_shape=layer.input_shape,
            weight_bytes=0,
            source=layer.name,
        )
        for layer in sorted(searched, key=lambda layer: layer.order)
        if not layer.why_weights_only
    ]
    named_by = {layer.name: layer.source for layer in inputs}
    readers: dict[int, list[LayerName]] = {}
    for layer in inputs:
        readers.setdefault(sources[layer.source], []).append(layer.name)
    units = [
        Unit(
            name=f"{unit_name([named_by[name] for name in names])}.{INPUT}",
            layers=tuple(names),
            reason="input of a layer" if len(names) == 1 else "one tensor that several layers read",
        )
        for names in readers.values()
    ]
    return replace(graph, units=(*graph.units, *units), apart=(*graph.apart, *inputs))
