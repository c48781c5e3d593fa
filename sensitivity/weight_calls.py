"""All calls of the layers that share one stored weight, and what its choices change in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mpq.core.formats import Scheme
from mpq.core.layers import Layer, Unit
from mpq.nn.weights import layer_module, weight_of
from mpq.nn.workload import Workload
from sensitivity.calls import Calls, Gradients
from sensitivity.changes import Change
from sensitivity.estimators.ghost import LayerCall


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight of a unit: its layer, the layers it serves, and its change in each scheme."""

    layer: Layer
    names: tuple[str, ...]
    parameter: nn.Parameter
    deltas: Sequence[torch.Tensor | None]  # None: no change

    @property
    def squared(self) -> list[float]:
        """|Q_c(W) - W|^2 of each scheme."""
        return [0.0 if d is None else float(d.double().square().sum()) for d in self.deltas]

    def calls(self, workload: Workload, calls: Calls, gradients: Gradients) -> list[LayerCall]:
        """Return every call that uses the weight and on which the output depends."""
        modules = {name: layer_module(workload.model, name) for name in self.names}
        return [
            (modules[name], inputs, gradient)
            for name in self.names
            for (inputs, _), gradient in zip(calls.of(name), gradients[name], strict=True)
            if gradient is not None
        ]


def stored_weights(
    workload: Workload, unit: Unit, schemes: Sequence[Scheme]
) -> Iterator[StoredWeight]:
    """Yield the weights of a unit, tied ones once."""
    layers = workload.graph.by_name
    for layer in workload.graph.stored_layers(unit):
        names = tuple(n for n in unit.layers if layers[n].weight_id == layer.weight_id)
        module = layer_module(workload.model, layer.name)
        deltas = Change(workload, layer, module, schemes).deltas
        yield StoredWeight(layer, names, weight_of(module), deltas)
