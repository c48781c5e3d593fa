"""HAWQ-V2's score: the mean Hessian trace of a layer times its squared weight perturbation.

    omega_l(c) = Tr(H_l) / n_l * ||Q_c(W_l) - W_l||_2^2      (Dong et al. 2020, eq. 6 and sec. 3.2)

Tr(H_l) is estimated by Hutchinson's E[v^T H_l v] with sign vectors v, one layer at a time: one
sweep for all layers would need L times fewer products but its cross-layer blocks raise the
variance by more than that. Hessian-vector products are PyHessian's; its stopping rule is not
used (it can stop after two draws), the number of probes is fixed and the error is reported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mpq.core.errors import InvalidInputError
from mpq.core.protocols import Partial, Scores, Task
from mpq.core.tables import Cells, SensitivityTable
from mpq.nn.batches import position_mask
from mpq.nn.fingerprint import function_digest
from mpq.nn.patch import evaluating, frozen
from mpq.nn.workload import Workload
from sensitivity.calls import Part, loss_of
from sensitivity.tasks import refuse_activations, unit_tasks

_VERSION = 1
_PROBES_FACTOR = 8  # probes per batch: this many times the job's `num_probes`


class HessianTrace:
    """The metric `hessian_trace`, for weights: one task for each unit."""

    name = "hessian_trace"

    def tasks(self, workload: Workload) -> Sequence[Task]:
        """Return one task per unit; its key holds model, data, cells, probes, loss and seed.

        Raises InvalidInputError for schemes that quantize activations.
        """
        refuse_activations(self.name, workload)
        return unit_tasks(workload, self.name, _VERSION, function_digest(workload.loss))

    def run(self, workload: Workload, task: Task) -> Partial:
        """Return "traces" of (layers, batches, probes) and "squared" of (layers, schemes)."""
        (number,) = task.part
        unit, schemes = workload.graph.units[number], workload.cells.schemes[number]
        layers = workload.graph.stored_layers(unit)
        parameters = dict(workload.model.named_parameters())
        traces, squared = [], []
        for layer in layers:
            weight = parameters[layer.weight_id]
            traces.append(_traces(workload, weight, number))
            original = weight.detach()
            squared.append(
                [
                    float(
                        (
                            workload.quantizer.fake_quantize(
                                layer.weight_id, original, s.weights, layer.channel_axis
                            )
                            - original
                        )
                        .double()
                        .square()
                        .sum()
                    )
                    for s in schemes
                ]
            )
        sizes = np.array([layer.num_weights for layer in layers])
        return {"traces": np.array(traces), "squared": np.array(squared), "sizes": sizes}

    def combine(self, cells: Cells, partials: Sequence[Partial]) -> Scores:
        """Return omega of every cell; the error bar is that of the trace, over probes."""
        values, errors = [], []
        for partial in partials:
            draws = partial["traces"].mean(axis=1)  # over batches: (layers, probes)
            mean = draws.mean(axis=1) / partial["sizes"]
            error = draws.std(axis=1, ddof=1) / math.sqrt(draws.shape[1]) / partial["sizes"]
            values.append(mean @ partial["squared"])
            errors.append(np.sqrt(np.square(error) @ np.square(partial["squared"])))
        table = SensitivityTable(
            metric=self.name,
            cells=cells,
            values=np.concatenate(values),
            stderr=np.concatenate(errors),
        )
        return Scores(sensitivity=table)


def _traces(workload: Workload, weight: nn.Parameter, number: int) -> list[list[float]]:
    """Return v^T H v of one weight for each batch and probe; H is that of the batch's mean loss."""
    generator = torch.Generator().manual_seed(workload.seed * 1_000_003 + number)
    with (
        evaluating(workload.model),
        frozen(workload.model),
        sdpa_kernel(SDPBackend.MATH),  # the fused attention kernels have no second derivative
        torch.enable_grad(),
    ):
        weight.requires_grad_(True)
        try:
            return [
                _draws(
                    _loss(workload, position, batch),
                    weight,
                    _PROBES_FACTOR * workload.num_probes,
                    generator,
                )
                for position, batch in enumerate(workload.calibration)
            ]
        finally:
            weight.requires_grad_(False)


def _draws(
    loss: torch.Tensor, weight: nn.Parameter, probes: int, generator: torch.Generator
) -> list[float]:
    from pyhessian.utils import hessian_vector_product

    if not loss.requires_grad:  # the weight does not reach the loss
        return [0.0] * probes
    draws = []
    try:
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True, allow_unused=True)
        if gradient is None or not gradient.requires_grad:  # at most linear in the weight
            return [0.0] * probes
        for _ in range(probes):
            signs = torch.randint(0, 2, weight.shape, generator=generator)
            v = signs.to(weight.detach()) * 2 - 1
            (product,) = hessian_vector_product([gradient], [weight], [v])
            draws.append(float((product * v).sum()))
    except RuntimeError as error:
        raise InvalidInputError(
            "hessian_unsupported",
            f"the model cannot be differentiated twice: {str(error).splitlines()[0]}; use "
            f"metric='gauss_newton', which needs first derivatives only",
        ) from error
    return draws


def _loss(workload: Workload, position: int, batch: object) -> torch.Tensor:
    """Return the user's loss, or the divergence from the network's own outputs.

    The Hessian of that divergence is the Gauss-Newton matrix, since its gradient is zero.
    """
    output = workload.output(position, batch)
    if workload.loss is None:
        mask = position_mask(batch, output)
        return workload.divergence.between(output.detach(), output, mask).mean()
    return loss_of(workload, Part(position, batch, 0, 0), output)
