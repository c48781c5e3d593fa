"""What a worker needs to score and measure: the borrowed model, its data and the choices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mpq.core.formats import Scheme
from mpq.core.layers import Layer, LayerGraph, LayerName
from mpq.core.problem import Allocation
from mpq.core.tables import Cells
from mpq.nn.batches import Batch, checked_call
from mpq.nn.divergence import OutputDivergence
from mpq.nn.fingerprint import digest
from mpq.nn.patch import evaluating, quantized
from mpq.nn.quality import Quality
from mpq.nn.quantizers import WeightQuantizer

Loss = Callable[[Any, Batch], torch.Tensor]
Evaluate = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A network with its calibration and held-out batches and what may be chosen for it.

    `key` names the network, its data and everything else scores depend on, except the batch,
    which is `batch_keys[i]` or, held out, `held_out_keys[i]`. `at_once` is how many samples of a
    batch memory allows at once (None: all), on which no result depends but for the order of sums.
    `data` tells where the calibration batches came from.
    """

    model: nn.Module
    graph: LayerGraph
    cells: Cells
    calibration: tuple[Batch, ...]
    held_out: tuple[Batch, ...]
    divergence: OutputDivergence
    quantizer: WeightQuantizer = field(default_factory=WeightQuantizer)
    loss: Loss | None = None
    evaluate: Evaluate | None = None
    qualities: Mapping[str, Quality] = field(default_factory=dict)
    seed: int = 0
    num_probes: int = 2
    at_once: int | None = None
    key: str = ""
    batch_keys: tuple[str, ...] = ()
    held_out_keys: tuple[str, ...] = ()
    data: str = ""

    def layer_schemes(self, allocation: Allocation) -> dict[LayerName, Scheme]:
        """Return the scheme that each layer and cache runs in under an allocation of units."""
        found = {layer: allocation[unit.name] for unit in self.graph.units for layer in unit.layers}
        return self.graph.merged(found)

    def tried(
        self, layer: Layer, choices: Sequence[Scheme], base: Mapping[LayerName, Scheme]
    ) -> tuple[Sequence[Scheme], Scheme | None]:
        """Return what a layer runs in in each choice of its unit, and around a base (None: none).

        Of a weight whose input is apart the input stays that of the base, and the other way round.
        """
        own = base.get(layer.source if layer.is_input else layer.name)
        if own is None:
            return choices, None
        if layer.is_input:
            return [Scheme(own.weights, choice.activations) for choice in choices], own
        if any(part.is_input and part.source == layer.name for part in self.graph.apart):
            return [Scheme(choice.weights, own.activations) for choice in choices], own
        return choices, own

    def quantized_as(self, allocation: Allocation) -> AbstractContextManager[nn.Module]:
        """Return a context in which the network runs as `allocation`; an empty one: as it is."""
        return quantized(
            self.model,
            self.layer_schemes(allocation) if allocation else {},
            quantizer=self.quantizer,
            limits=self.graph.input_ranges,
        )

    def evaluating(self, number: int, split: str = "calibration") -> AbstractContextManager[object]:
        """Return a context for passes over a batch: eval mode, random draws are of its content."""
        keys = self.batch_keys if split == "calibration" else self.held_out_keys
        return evaluating(self.model, int(digest(keys[number])[:12], 16) if keys else number)

    def output(self, number: int, batch: Batch) -> torch.Tensor:
        """Run the model on calibration batch `number` or a part of it."""
        return checked_call(self.model, batch, f"calibration batch {number}")
