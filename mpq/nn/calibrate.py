"""Ranges of layer inputs over the calibration batches, for kernels with static scales."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mpq.core.layers import Layer, LayerGraph, LayerName
from mpq.nn.batches import Batch, checked_call
from mpq.nn.patch import evaluating


def with_input_ranges(
    model: nn.Module,
    graph: LayerGraph,
    batches: Sequence[Batch],
    static: Container[LayerName] = (),
) -> LayerGraph:
    """Return the graph with the smallest and largest input of layers that need a static range.

    Those are the searched convolutions, whose integer kernels have no other, and the layers in
    `static`. Costs one forward pass over the batches.
    """
    kinds = graph.by_name
    searched = [name for unit in graph.units for name in unit.layers]
    wanted = [kinds[n] for n in searched if kinds[n].kind.startswith("conv") or n in static]
    names = dict.fromkeys(_reader(layer) for layer in wanted)
    ranges = _min_max(model, names, batches)

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
    model: nn.Module, batches: Sequence[Batch], handles: Sequence[RemovableHandle]
) -> None:
    """Run a model over calibration batches for its hooks, which are removed, also on error."""
    try:
        with evaluating(model), torch.no_grad():
            for number, batch in enumerate(batches if handles else ()):
                checked_call(model, batch, f"calibration batch {number}")
    finally:
        for handle in handles:
            handle.remove()
