"""ModelOpt's gradient score: squared gradients times squared changes at a layer's output.

    score(l, c) = mean_x sum_i (d loss / d Y_i)^2 (Y_c - Y)_i^2

over all elements i of the output Y of unit l, with Y_c the output in scheme c on the original
network's own input (our reading of NVIDIA ModelOpt's `auto_quantize`). The squared gradient is
that of the user's loss, sample by sample. Without a loss it is the mean square over random probes
of the output divergence (sensitivity.local), whose mean is the diagonal of the Gauss-Newton
matrix: the score is then twice the divergence to second order, without what errors of different
elements do together. Weights and activations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mpq.core.protocols import Partial, Scores, Task
from mpq.core.tables import Cells
from mpq.nn.fingerprint import function_digest
from mpq.nn.workload import Workload
from sensitivity.local import LocalCall, local_scores
from sensitivity.tasks import batch_tasks, mean_over_samples, refuse_experts

_VERSION = 1


class AutoQuantize:
    """The metric `autoquantize`: one task for each calibration batch."""

    name = "autoquantize"

    def tasks(self, workload: Workload) -> Sequence[Task]:
        """Return one task per batch; its key holds model, data, cells, loss, probes and seed.

        Raises InvalidInputError where experts are searched.
        """
        refuse_experts(self.name, workload)
        return batch_tasks(workload, self.name, _VERSION, function_digest(workload.loss))

    def run(self, workload: Workload, task: Task) -> Partial:
        """Return "scores" of (cells, samples)."""
        (number,) = task.part
        return {"scores": local_scores(workload, number, _weighed_squares)}

    def combine(self, cells: Cells, partials: Sequence[Partial]) -> Scores:
        """Return the mean score of every cell; the error bar is over samples, probes included."""
        return Scores(sensitivity=mean_over_samples(self.name, cells, partials))


def _weighed_squares(calls: Sequence[LocalCall], choices: int, samples: int) -> torch.Tensor:
    found = torch.zeros(choices, samples, dtype=torch.float64)
    for call in calls:
        for choice, gradient, change in call.terms():
            products = gradient.square().mean(0) * change.square()
            found[choice] += products.reshape(samples, -1).sum(1).cpu()
    return found
