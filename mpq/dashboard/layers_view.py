"""Layers across runs: how many bits searches of one model gave each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from mpq.dashboard import colours
from mpq.dashboard.plotted import Figure, verbatim
from mpq.layer_use import LayerUse, LayerUses, layer_uses
from mpq.store.store import Store

ROWS = 200  # of layers on one page
Order = Literal["network", "most", "least"]
_TOLD = 12  # layers named in a sentence
_SHORT = 24  # characters of a name on an axis


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShare:
    """A layer: `counts` are its runs by the bits of `LayersView.bits`."""

    layer: str
    runs: int
    least_bits: int
    mean_bits: float
    counts: tuple[int, ...]
    schemes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersView:
    """The layers of a model over its runs; `always` got `at_least` bits or more in each of them."""

    model: str
    runs: int
    layers: int
    bits: tuple[int, ...]
    at_least: int
    always: tuple[str, ...]
    said: str
    rows: tuple[LayerShare, ...]
    page: int
    pages: int
    figure: Figure


def layers_view(
    store: Store,
    wanted: Mapping[str, Any],
    at_least: int | None = None,
    order: Order = "network",
    page: int = 1,
) -> LayersView:
    """Count layers over the runs that filters find; raises InvalidInputError as `layer_uses`."""
    found = layer_uses(store, **wanted)
    bits = tuple(sorted({b for layer in found.layers for b in layer.bits}))
    at_least = at_least if at_least is not None else 8
    ordered = _ordered(found.layers, order)
    pages = max(math.ceil(len(ordered) / ROWS), 1)
    page = min(max(page, 1), pages)
    always = found.always(at_least)
    return LayersView(
        model=found.model,
        runs=found.runs,
        layers=len(found.layers),
        bits=bits,
        at_least=at_least,
        always=always,
        said=_said(found, always, at_least),
        rows=tuple(_row(layer, bits) for layer in ordered[(page - 1) * ROWS : page * ROWS]),
        page=page,
        pages=pages,
        figure=_figure(found, bits),
    )


def _ordered(layers: Sequence[LayerUse], order: Order) -> list[LayerUse]:
    if order == "network":
        return list(layers)
    return sorted(layers, key=lambda layer: layer.mean_bits, reverse=order == "most")


def _row(layer: LayerUse, bits: Sequence[int]) -> LayerShare:
    often = sorted(layer.schemes.items(), key=lambda item: -item[1])
    return LayerShare(
        layer=layer.layer,
        runs=layer.runs,
        least_bits=layer.least_bits,
        mean_bits=layer.mean_bits,
        counts=tuple(layer.bits.get(b, 0) for b in bits),
        schemes=tuple(f"{scheme}\u00a0×\u00a0{runs}" for scheme, runs in often),
    )


def _said(found: LayerUses, always: Sequence[str], bits: int) -> str:
    of = "In the one run" if found.runs == 1 else f"In all of {found.runs} runs"
    if not always:
        return f"{of} no layer always got {bits} bits or more."
    shown = ", ".join(always[:_TOLD]) + (
        f" and {len(always) - _TOLD} more" if len(always) > _TOLD else ""
    )
    return f"{of} {len(always)} of {len(found.layers)} layers got {bits} bits or more: {shown}."


def _figure(found: LayerUses, bits: Sequence[int]) -> Figure:
    names = [verbatim(layer.layer) for layer in found.layers]
    short = _short([layer.layer for layer in found.layers])
    places = (
        list(map(verbatim, short)) if len(set(short)) == len(short) else list(range(len(short)))
    )
    data = [
        {
            "type": "bar",
            "name": f"{b} bit",
            "x": places,
            "y": [100 * layer.bits.get(b, 0) / layer.runs for layer in found.layers],
            "customdata": [
                [name, layer.bits.get(b, 0), layer.runs]
                for name, layer in zip(names, found.layers, strict=True)
            ],
            "marker": {
                "color": colours.of_number(b),
                "line": {"color": colours.OUTLINE, "width": 0.5},
            },
            "hovertemplate": f"%{{customdata[0]}}<br>{b} bit in %{{customdata[1]}} of "
            "%{customdata[2]} runs<extra></extra>",
        }
        for b in bits
    ]
    axis = {"title": {"text": "layer, in network order"}, "type": "category", "tickangle": -60}
    layout = {
        "barmode": "stack",
        "bargap": 0.08 if len(names) <= 200 else 0,
        "xaxis": axis,
        "yaxis": {"title": {"text": "share of runs, %"}, "range": [0, 100]},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
    }
    means = sorted(found.layers, key=lambda layer: layer.mean_bits)
    text = (
        f"Share of {found.runs} runs that gave each of {len(names)} layers so many weight bits. "
        f"Most on average: {means[-1].layer} with {means[-1].mean_bits:.3g}; least: "
        f"{means[0].layer} with {means[0].mean_bits:.3g}."
        if means
        else "No layer was searched."
    )
    return Figure(data=data, layout=layout, text=text)


def _short(names: Sequence[str]) -> list[str]:
    """Return names without the modules that all of them are in, long ones cut."""
    modules = [name.split(".")[:-1] for name in names] if len(names) > 1 else []
    alike = takewhile(lambda level: len(set(level)) == 1, zip(*modules, strict=False))
    shared = sum(len(level[0]) + 1 for level in alike)
    rests = [name[shared:] for name in names]
    return [rest if len(rest) <= _SHORT else f"…{rest[1 - _SHORT :]}" for rest in rests]
