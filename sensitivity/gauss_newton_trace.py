"""HAWQ-V2's form of score with the Gauss-Newton matrix of the output divergence.

    omega_l(c) = Tr(G_W) / n_W * |Q_c(W_l) - W_l|^2 + mean_x Tr(G_a(x)) / n_a * |Q_c(a) - a|^2

W is the layer's weight, a(x) its input, n their numbers of elements, and G = J^T S S^T J with J the
Jacobian of the network's output and S a square root of the divergence's curvature
(mpq.nn.divergence), averaged over samples (Dong et al. 2020, eq. 6 and sec. 3.2, there with the
Hessian). For a network that is piecewise linear in the weights of each layer (ReLU, frozen batch
norm) this is the Hessian of the cross-entropy, whatever the labels; for others it is the Hessian
of the divergence from the network's own output, and never negative.

The trace is the squared norm of the gradients of S^T h(z), summed over the columns of S, sample by
sample, which ghost norms give for all layers at once. With at most 32 outputs a sample all columns
are taken and the trace is exact; with more, `num_probes` random sign combinations of them are.
Cost for each batch: one forward pass, one backward pass to layer outputs for each column or probe,
and ghost norms, which cost less than another backward pass each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from mpq.core.formats import Scheme
from mpq.core.layers import Layer
from mpq.core.protocols import Partial, Scores, Task
from mpq.core.tables import Cells, Floats
from mpq.nn.batches import cut, position_mask
from mpq.nn.patch import frozen
from mpq.nn.replay import replay
from mpq.nn.weights import layer_modules, weight_of
from mpq.nn.workload import Workload
from sensitivity.calls import Calls, Part, parts, probe_seeds
from sensitivity.estimators.ghost import squared_norms
from sensitivity.input_changes import squared_input_changes
from sensitivity.tasks import batch_tasks, mean_over_samples, refuse_apart
from sensitivity.weight_calls import stored_weights

_VERSION = 1
_MOST_COLUMNS = 32  # elements of a sample's output up to which all are back-propagated


class GaussNewtonTrace:
    """The metric `gauss_newton_trace`: one task for each calibration batch."""

    name = "gauss_newton_trace"

    def tasks(self, workload: Workload) -> Sequence[Task]:
        """Return one task per batch; its key holds model, data, cells, probes and seed.

        Raises InvalidInputError where KV caches are searched.
        """
        refuse_apart(self.name, workload, inputs=False)
        return batch_tasks(workload, self.name, _VERSION)

    def run(self, workload: Workload, task: Task) -> Partial:
        """Return "scores" of (cells, samples): omega of every cell and sample."""
        (number,) = task.part
        with workload.evaluating(number), frozen(workload.model):
            columns = _columns(workload, number)
            rows = columns or workload.num_probes
            found = [
                _scores(workload, part, exact=columns > 0) for part in parts(workload, number, rows)
            ]
        return {"scores": np.concatenate(found, axis=1)}

    def combine(self, cells: Cells, partials: Sequence[Partial]) -> Scores:
        """Return omega of every cell; its error, over samples, holds that of probes as well."""
        return Scores(sensitivity=mean_over_samples(self.name, cells, partials))


def _columns(workload: Workload, number: int) -> int:
    """Return how many columns S has for a sample, 0 where they are too many to take them all."""
    with torch.no_grad():
        one = cut(workload.calibration[number], 0, 1)
        elements = workload.divergence.head(workload.output(number, one))[0].numel()
    return elements if elements <= _MOST_COLUMNS else 0


def _scores(workload: Workload, part: Part, exact: bool) -> Floats:
    with Calls(workload) as calls, torch.enable_grad():
        head = workload.divergence.head(workload.output(part.number, part.batch))
        seeds = (
            workload.divergence.columns(head.detach(), position_mask(part.batch, head))
            if exact
            else probe_seeds(workload, part, head)
        )
        gradients = calls.gradients(head, seeds)
    found = np.zeros((len(workload.cells), part.samples))
    modules = layer_modules(workload.model, workload.graph)
    layers = workload.graph.by_name
    for unit, schemes, offset in zip(
        workload.graph.units, workload.cells.schemes, workload.cells.offsets[:-1], strict=True
    ):
        rows = found[offset : offset + len(schemes)]
        for weight in stored_weights(workload, unit, schemes):
            used = weight.calls(workload, calls, gradients)
            if used:
                traces = squared_norms(used, part.samples).double().sum(0).cpu().numpy()
                rows += np.outer(weight.squared, traces) / weight.layer.num_weights
        for name in unit.layers:
            for (inputs, _), gradient in zip(calls.of(name), gradients[name], strict=True):
                if gradient is not None:
                    rows += _of_inputs(
                        modules[name], layers[name], schemes, inputs, gradient, part.samples
                    )
    return found if exact else found / workload.num_probes


def _of_inputs(
    module: nn.Module,
    layer: Layer,
    schemes: Sequence[Scheme],
    inputs: torch.Tensor,
    gradient: torch.Tensor,
    samples: int,
) -> Floats:
    """Return Tr(G_a) / n_a * |Q(a) - a|^2 of each scheme and sample; 0 where a stays as it is."""
    found = np.zeros((len(schemes), samples))
    changing = [i for i, scheme in enumerate(schemes) if not scheme.activations.is_native]
    if changing:
        trace = _input_norms(module, inputs, gradient, samples) / (inputs.numel() / samples)
        squares = squared_input_changes(inputs, layer, schemes, samples)
        found[changing] = (trace * squares[changing]).numpy()
    return found


def _input_norms(
    module: nn.Module, inputs: torch.Tensor, gradient: torch.Tensor, samples: int
) -> torch.Tensor:
    """Return the squared norm of the gradients at the layer's input, over rows: (samples,)."""
    weight = weight_of(module)
    x = inputs.clone().requires_grad_()
    total = torch.zeros(samples, dtype=torch.float64)
    with torch.enable_grad():
        output = replay(module, x, weight.detach(), None)
        for row in gradient:
            (at_input,) = torch.autograd.grad(output, x, row, retain_graph=True)
            total += at_input.reshape(samples, -1).double().square().sum(1).cpu()
    return total
