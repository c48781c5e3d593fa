"""The names that a target knows layers by: without the wrapper that the search saw them in."""

from __future__ import annotations

from dataclasses import replace

from mpq.core.chosen import Chosen
from mpq.core.errors import InvalidInputError
from mpq.core.layers import Layer, LayerGraph


def graph_without(prefix: str, graph: LayerGraph) -> LayerGraph:
    """Return the graph with `prefix` taken off every name that starts with it.

    Raises InvalidInputError where no searched layer does.
    """
    if not prefix:
        return graph
    searched = [name for unit in graph.units for name in unit.layers]
    if not any(name.startswith(prefix) for name in searched):
        raise InvalidInputError(
            "strip", f"no layer's name starts with {prefix!r}: they are like {searched[0]!r}"
        )

    def named(layer: Layer) -> Layer:
        parts = ("name", "weight_id", "source")
        return replace(layer, **{p: getattr(layer, p).removeprefix(prefix) for p in parts})

    return replace(
        graph,
        layers=tuple(map(named, graph.layers)),
        apart=tuple(map(named, graph.apart)),
        units=tuple(
            replace(
                unit,
                name=unit.name.removeprefix(prefix),
                layers=tuple(name.removeprefix(prefix) for name in unit.layers),
            )
            for unit in graph.units
        ),
        unsearched=tuple(
            replace(part, name=part.name.removeprefix(prefix)) for part in graph.unsearched
        ),
    )


def chosen_without(prefix: str, chosen: Chosen) -> Chosen:
    """Return the allocation with `prefix` taken off every name that starts with it."""
    return replace(
        chosen,
        graph=graph_without(prefix, chosen.graph),
        schemes={name.removeprefix(prefix): s for name, s in chosen.schemes.items()},
        pinned=frozenset(name.removeprefix(prefix) for name in chosen.pinned),
    )
