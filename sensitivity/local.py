"""What one forward and backward pass says of every cell: gradients at layers' outputs, changes.

The gradient g of each sample is that of the user's loss where there is one, taken one sample at a
time. Without a loss there are `num_probes` gradients, of <S r, h(z)> for random sign vectors r,
with S a square root of the output divergence's curvature (mpq.nn.divergence), because the
divergence itself has no gradient at the original network. What is made of them is averaged.

Cost for each batch: one forward pass, one backward pass (`num_probes` without a loss), and a
replay of each layer for each of its schemes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from mpq.core.errors import InvalidInputError
from mpq.core.layers import Layer
from mpq.core.tables import Floats
from mpq.nn.patch import frozen
from mpq.nn.weights import layer_modules
from mpq.nn.workload import Workload
from sensitivity.calls import Calls, Gradients, Part, parts, probe_seeds
from sensitivity.changes import Change
from sensitivity.sample_losses import sample_losses


@dataclass(frozen=True, slots=True)
class LocalCall:
    """One call of a layer: its input (samples first) and the gradients (rows, samples, ...)."""

    layer: Layer
    inputs: torch.Tensor
    gradient: torch.Tensor
    change: Change

    def terms(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield (choice, gradients, change of the output) in float32 or wider.

        Choices that change nothing are left out.
        """
        wide = torch.promote_types(self.gradient.dtype, torch.float32)
        gradient = self.gradient.to(wide)
        for choice, change in self.change.outputs(self.inputs):
            yield choice, gradient, change.to(wide)


@dataclass(frozen=True, slots=True)
class LocalPart:
    """Some samples of a batch after one forward and backward pass."""

    workload: Workload
    samples: int
    calls: Calls
    gradients: Gradients

    def units(self) -> Iterator[list[LocalCall]]:
        """Yield for each unit the calls of its layers that reach the output."""
        layers = self.workload.graph.by_name
        modules = layer_modules(self.workload.model, self.workload.graph)
        for unit, schemes in zip(
            self.workload.graph.units, self.workload.cells.schemes, strict=True
        ):
            found = []
            for name in unit.layers:
                change = Change(self.workload, layers[name], modules[name], schemes)
                found += [
                    LocalCall(layers[name], inputs, gradient, change)
                    for (inputs, _), gradient in zip(
                        self.calls.of(name), self.gradients[name], strict=True
                    )
                    if gradient is not None
                ]
            yield found


Result = TypeVar("Result")
Reduction = Callable[[Sequence[LocalCall], int, int], torch.Tensor]


def local(workload: Workload, number: int, use: Callable[[LocalPart], Result]) -> list[Result]:
    """Return what `use` makes of each part of calibration batch `number`; the model is borrowed."""
    rows = 1 if workload.loss is not None else workload.num_probes
    found = []
    with workload.evaluating(number), frozen(workload.model):
        for part in parts(workload, number, rows):
            seen = _backward(workload, part)
            with torch.no_grad():
                found.append(use(seen))
    return found


def local_scores(workload: Workload, number: int, reduction: Reduction) -> Floats:
    """Return (cells, samples) of batch `number`.

    `reduction(calls, choices, samples)` makes (choices, samples) of the calls of one unit.
    """

    def scores(part: LocalPart) -> Floats:
        of_units = [
            reduction(calls, len(schemes), part.samples).double()
            for calls, schemes in zip(part.units(), workload.cells.schemes, strict=True)
        ]
        found: Floats = torch.cat(of_units).numpy()
        return found

    return np.concatenate(local(workload, number, scores), axis=1)


def _backward(workload: Workload, part: Part) -> LocalPart:
    with Calls(workload) as calls, torch.enable_grad():
        output = workload.output(part.number, part.batch)
        if workload.loss is None:
            head = workload.divergence.head(output)
            gradients = calls.gradients(head, probe_seeds(workload, part, head))
        else:
            losses = sample_losses(workload, part.number, part.batch, output)
            if not losses.requires_grad:
                raise InvalidInputError(
                    "loss",
                    "the loss has no gradient: write it in differentiable operations on the "
                    "output, or use metric='loss', which needs its values only",
                )
            gradients = calls.gradients(losses, iter([torch.ones_like(losses)]))
    return LocalPart(workload, part.samples, calls, gradients)
