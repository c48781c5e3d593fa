"""HAWQ's first score: the top eigenvalue of a layer's Hessian times its squared perturbation.

    omega_l(c) = lambda_1(H_l) * |Q_c(W_l) - W_l|^2          (Dong et al. 2019, sec. 3.1 and 3.3)

It bounds twice the second-order change of the loss from above where H_l is positive. lambda_1 is
found by power iteration, so it is the eigenvalue of the largest magnitude, with its sign; H_l is
the Hessian of the mean loss over all calibration batches, or of the output divergence without a
loss. Cost for each stored weight, iteration and batch: one forward pass, one backward pass that can
be differentiated again and one product. The error bar is how much the eigenvalue changed in the
last iteration; it says that the iteration has settled and nothing about other calibration data.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mpq.core.protocols import Partial, Scores, Task
from mpq.core.tables import Cells, SensitivityTable
from mpq.nn.fingerprint import function_digest
from mpq.nn.workload import Workload
from sensitivity.calls import loss_parts
from sensitivity.estimators.hutchinson import sign_vector
from sensitivity.hessian_products import HessianProducts, loss_on, twice_differentiable
from sensitivity.negative import warn_of_negative
from sensitivity.tasks import refuse_activations, refuse_apart, unit_tasks
from sensitivity.weight_calls import stored_weights

_VERSION = 1
_MOST_ITERATIONS = 50
_SETTLED = 1e-3  # relative change of the eigenvalue at which the iteration ends


class HessianTop:
    """The metric `hessian_top`, for weights: one task for each unit."""

    name = "hessian_top"

    def tasks(self, workload: Workload) -> Sequence[Task]:
        """Return one task per unit; its key holds model, data, cells, loss and seed.

        Raises InvalidInputError for schemes that quantize activations, and what is searched apart.
        """
        refuse_apart(self.name, workload)
        refuse_activations(self.name, workload)
        return unit_tasks(workload, self.name, _VERSION, function_digest(workload.loss))

    def run(self, workload: Workload, task: Task) -> Partial:
        """Return "top" and "change" of (layers,) and "squared" of (layers, schemes)."""
        (number,) = task.part
        unit, schemes = workload.graph.units[number], workload.cells.schemes[number]
        generator = torch.Generator().manual_seed(workload.seed * 1_000_003 + number)
        tops, squared = [], []
        for weight in stored_weights(workload, unit, schemes):
            start = sign_vector(weight.layer.num_weights, generator, weight.parameter.dtype)
            changed = any(delta is not None for delta in weight.deltas)
            tops.append(_top(workload, weight.parameter, start) if changed else (0.0, 0.0))
            squared.append(weight.squared)
        top, change = np.array(tops).T
        return {"top": top, "change": change, "squared": np.array(squared)}

    def combine(self, cells: Cells, partials: Sequence[Partial]) -> Scores:
        """Return omega of every cell, with the last change of the eigenvalue as its error."""
        squared = [np.asarray(p["squared"], np.float64) for p in partials]
        values, errors = (
            np.concatenate(
                [
                    np.asarray(p[part], np.float64) @ s
                    for p, s in zip(partials, squared, strict=True)
                ]
            )
            for part in ("top", "change")
        )
        table = SensitivityTable(metric=self.name, cells=cells, values=values, stderr=errors)
        warn_of_negative(table)
        return Scores(sensitivity=table)


def _top(workload: Workload, weight: torch.Tensor, start: torch.Tensor) -> tuple[float, float]:
    """Return the eigenvalue of the largest magnitude and its last change."""
    v = (start.reshape(weight.shape) / start.norm()).to(weight)
    value, change = 0.0, 0.0
    with twice_differentiable(workload, weight):
        for iteration in range(_MOST_ITERATIONS):
            product = _product(workload, weight, v)
            found = float((v * product).double().sum())
            value, change = found, abs(found - value)
            length = product.norm()
            if length == 0 or (iteration and change <= _SETTLED * abs(value)):
                break
            v = product / length
    return value, change


def _product(workload: Workload, weight: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return H v of the mean loss over the samples of all batches."""
    total, samples = torch.zeros_like(v), 0
    for number in range(len(workload.calibration)):
        for part in loss_parts(workload, number):
            (product,) = HessianProducts(loss_on(workload, part), [weight])([v])
            total += part.samples * product
            samples += part.samples
    return total / samples
