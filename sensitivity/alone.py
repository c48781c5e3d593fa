"""The network with one cell changed at a time: what any functions say of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial

import torch

from mpq.core.formats import Scheme
from mpq.nn.patch import quantized
from mpq.nn.workload import Workload
from sensitivity.sweep import Floats, Function, Variant, sweep


def alone(workload: Workload, number: int, functions: Mapping[str, Function]) -> dict[str, Floats]:
    """Return what each function says of every cell alone, on each sample of batch `number`.

    A function maps (original output, changed output, batch) to a tensor of one number for each
    sample; all functions see the same passes. The result is one array (cells, samples) for each
    name. The changed network is that of `mpq.evaluate`: weights and layer inputs of the cell's
    unit fake-quantized, everything else as it is. Outputs are those of plain forward passes bit
    for bit; a cell that changes nothing gets `function(original, original, batch)`.

    Cost: at most one forward pass for each cell, about half of one in a deep network (see
    sensitivity.sweep).
    """
    variants = []
    for unit, schemes in enumerate(workload.cells.schemes):
        for scheme in schemes:
            name = f"unit {workload.cells.units[unit]!r} in {scheme}"
            variants.append(Variant(name, unit, _context(workload, unit, scheme)))
    return sweep(workload, number, variants, functions)


def _context(
    workload: Workload, unit: int, scheme: Scheme
) -> Callable[[], AbstractContextManager[object]] | None:
    if _changes_nothing(workload, unit, scheme):
        return None
    return partial(
        quantized,
        workload.model,
        workload.graph.merged(dict.fromkeys(workload.graph.units[unit].layers, scheme)),
        quantizer=workload.quantizer,
        limits=workload.graph.input_ranges,
    )


def _changes_nothing(workload: Workload, unit: int, scheme: Scheme) -> bool:
    if not (scheme.weights.is_native and scheme.activations.is_native):
        return False
    layers = workload.graph.by_name
    if any(layers[name].is_cache for name in workload.graph.units[unit].layers):
        return False  # 16 bits may be fewer than the output has
    parameters = dict(workload.model.named_parameters())
    for layer in workload.graph.stored_layers(workload.graph.units[unit]):
        weight = parameters[layer.weight_id].detach()
        stored = workload.quantizer.fake_quantize(layer.weight_id, weight, scheme.weights)
        if not torch.equal(stored, weight):
            return False
    return True
