"""The second-order change of the loss under each perturbation itself, not under an average one.

    score_u(c) = 1/2 dW^T H_u dW,   dW = Q_c(W_u) - W_u

H_u is the Hessian of the user's loss, or without one of the output divergence, with respect to all
weights of the unit together, the terms between its layers included (Dong et al. 2020 replace it by
its mean eigenvalue; LeCun et al. 1990 by its diagonal). The gradient term is left out: on a
trained network it is noise. Cost for each unit and batch: one forward pass, one backward pass that
can be differentiated again and then one product, about two backward passes, for each cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from mpq.core.formats import Scheme
from mpq.core.layers import Unit
from mpq.core.protocols import Partial, Scores, Task
from mpq.core.tables import Cells, Floats, SensitivityTable
from mpq.nn.batches import num_samples
from mpq.nn.fingerprint import function_digest
from mpq.nn.workload import Workload
from sensitivity.calls import Part, loss_parts
from sensitivity.hessian_products import HessianProducts, loss_on, twice_differentiable
from sensitivity.negative import warn_of_negative
from sensitivity.tasks import batch_tasks, refuse_activations, refuse_apart
from sensitivity.weight_calls import stored_weights

_VERSION = 1


class HessianQuadratic:
    """The metric `hessian_quadratic`, for weights: one task for each calibration batch."""

    name = "hessian_quadratic"

    def tasks(self, workload: Workload) -> Sequence[Task]:
        """Return one task per batch; its key holds model, data, cells and loss.

        Raises InvalidInputError for schemes that quantize activations, and what is searched apart.
        """
        refuse_apart(self.name, workload)
        refuse_activations(self.name, workload)
        tasks = batch_tasks(workload, self.name, _VERSION, function_digest(workload.loss))
        if workload.loss is None:
            return tasks
        return [replace(task, samples=None) for task in tasks]  # a loss is asked of whole batches

    def run(self, workload: Workload, task: Task) -> Partial:
        """Return "scores" of (cells,) and the number of "samples" they are the mean of."""
        (number,) = task.part
        samples = num_samples(workload.calibration[number])
        scores = np.zeros(len(workload.cells))
        for part in loss_parts(workload, number):
            found = [
                _of_unit(workload, part, unit, schemes)
                for unit, schemes in zip(workload.graph.units, workload.cells.schemes, strict=True)
            ]
            scores += np.concatenate(found) * (part.samples / samples)
        return {"scores": scores, "samples": np.array(samples)}

    def combine(self, cells: Cells, partials: Sequence[Partial]) -> Scores:
        """Return the mean over samples; its error is over batches, however they are cut.

        It is 0, unknown, where there is one.
        """
        scores = np.stack([p["scores"] for p in partials])
        share = np.array([float(p["samples"]) for p in partials])
        share /= share.sum()
        mean = share @ scores
        several = len(partials) > 1
        factor = len(partials) / (len(partials) - 1) if several else 0.0
        error = np.sqrt(factor * (share**2 @ (scores - mean) ** 2))
        table = SensitivityTable(metric=self.name, cells=cells, values=mean, stderr=error)
        warn_of_negative(table)
        return Scores(sensitivity=table)


def _of_unit(workload: Workload, part: Part, unit: Unit, schemes: Sequence[Scheme]) -> Floats:
    """Return 1/2 dW^T H dW of each scheme, 0 where no weight changes."""
    found = np.zeros(len(schemes))
    weights = list(stored_weights(workload, unit, schemes))
    variables = [weight.parameter for weight in weights]
    with twice_differentiable(workload, *variables):
        products = HessianProducts(loss_on(workload, part), variables)
        for i, deltas in enumerate(zip(*(weight.deltas for weight in weights), strict=True)):
            if any(delta is not None for delta in deltas):
                vectors = [
                    torch.zeros_like(variable) if delta is None else delta
                    for variable, delta in zip(variables, deltas, strict=True)
                ]
                for v, hv in zip(vectors, products(vectors), strict=True):
                    found[i] += 0.5 * float((v * hv).double().sum())
    return found
