"""Ranges of layer inputs over the calibration batches, for kernels with static scales."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mpq.core.layers import Layer, LayerGraph, LayerName
from mpq.nn.batches import Batch, checked_call
from mpq.nn.observers import NUM_BINS, Histogram, get_observer
from mpq.nn.patch import evaluating


def with_input_ranges(
    model: nn.Module,
    graph: LayerGraph,
    batches: Sequence[Batch],
    static: Container[LayerName] = (),
    *,
    observer: str = "minmax",
    bits: Mapping[LayerName, int] | None = None,
) -> LayerGraph:
    """Return the graph with the input range of layers that need a static one.

    Those are the searched convolutions, whose integer kernels have no other, and the layers in
    `static`. `observer` makes the range of what a layer sees (mpq.nn.observers), for codes of
    `bits` (8 where not given): a layer that may take several formats has one range, and the
    fewest bits need it most. Costs one forward pass over the batches, two for other observers
    than "minmax".
    """
    observe = get_observer(observer)
    kinds = graph.by_name
    searched = [name for unit in graph.units for name in unit.layers]
    wanted = [kinds[n] for n in searched if kinds[n].kind.startswith("conv") or n in static]
    names = dict.fromkeys(_reader(layer) for layer in wanted)
    ranges = _min_max(model, names, batches)
    if observer != "minmax":
        seen = histograms(model, ranges, batches)
        ranges = {name: observe(found, (bits or {}).get(name, 8)) for name, found in seen.items()}

    def ranged(layers: Sequence[Layer]) -> tuple[Layer, ...]:
        return tuple(replace(la, input_range=ranges.get(_reader(la))) for la in layers)

    return replace(graph, layers=ranged(graph.layers), apart=ranged(graph.apart))


def _reader(layer: Layer) -> LayerName:
    return layer.source if layer.is_input else layer.name


def output_ranges(
    model: nn.Module, names: Iterable[LayerName], batches: Sequence[Batch]
) -> dict[LayerName, tuple[float, float]]:
    """Return the smallest and largest output of layers; zero is always inside.

    Costs one forward pass over the batches.
    """
    return _min_max(model, names, batches, of_outputs=True)


def histograms(
    model: nn.Module,
    ranges: Mapping[LayerName, tuple[float, float]],
    batches: Sequence[Batch],
) -> dict[LayerName, Histogram]:
    """Return how the inputs of layers are distributed in their ranges; one forward pass."""
    modules = dict(model.named_modules())
    counts = {name: torch.zeros(NUM_BINS, dtype=torch.float64) for name in ranges}

    def hook(name: LayerName) -> RemovableHandle:
        low, high = ranges[name]

        def observe(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            values = args[0].detach().float().reshape(-1)
            if high > low:
                counts[name] += torch.histc(values, NUM_BINS, low, high).double().cpu()

        handle: RemovableHandle = modules[name].register_forward_pre_hook(observe)
        return handle

    run_observed(model, batches, [hook(name) for name in ranges])
    return {name: Histogram(counts[name], *ranges[name]) for name in ranges}


def _min_max(
    model: nn.Module,
    names: Iterable[LayerName],
    batches: Sequence[Batch],
    *,
    of_outputs: bool = False,
) -> dict[LayerName, tuple[float, float]]:
    limits: dict[LayerName, tuple[float, float]] = {}
    modules = dict(model.named_modules())

    def observe(name: LayerName, value: torch.Tensor) -> None:
        low, high = limits.get(name, (0.0, 0.0))
        limits[name] = (min(low, float(value.min())), max(high, float(value.max())))

    def hook(name: LayerName) -> RemovableHandle:
        def observe_input(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            observe(name, args[0])

        def observe_output(_: nn.Module, __: object, output: torch.Tensor) -> None:
            observe(name, output)

        module = modules[name]
        handle: RemovableHandle = (
            module.register_forward_hook(observe_output)
            if of_outputs
            else module.register_forward_pre_hook(observe_input)
        )
        return handle

    handles = [hook(name) for name in names]
    run_observed(model, batches, handles)
    return limits


def run_observed(
    model: nn.Module,
    batches: Sequence[Batch],
    handles: Sequence[RemovableHandle],
    begins: Callable[[Batch], None] = lambda _: None,
) -> None:
    """Run a model over calibration batches for its hooks, which are removed, also on error.

    `begins` hears of each batch before it runs.
    """
    try:
        with evaluating(model), torch.no_grad():
            for number, batch in enumerate(batches if handles else ()):
                begins(batch)
                checked_call(model, batch, f"calibration batch {number}")
    finally:
        for handle in handles:
            handle.remove()
