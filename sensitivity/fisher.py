"""SqueezeLLM's score: squared weight perturbations, each weighed by its own Fisher information.

    score_l(c) = sum_i F_ii (Q_c(W_l) - W_l)_i^2,   F_ii = mean_x (d loss(x) / d W_i)^2

(Kim et al. 2024, sec. 4.1). The gradient is squared sample by sample: that of a batch's mean loss
would cancel between samples. Without a loss it is that of <S r, h(z)> for `num_probes` random sign
vectors r, with S a square root of the output divergence's curvature (mpq.nn.divergence): then F is
the diagonal of the Gauss-Newton matrix, the curvature itself and not, as on a trained network with
a loss, a stand-in that depends on how large the loss still is.

Cost for each batch: one forward and backward pass (`num_probes` backward passes without a loss) and
the weight gradient of each sample, some of them held at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mpq.core.protocols import Partial, Scores, Task
from mpq.core.tables import Cells, Floats
from mpq.nn.fingerprint import function_digest
from mpq.nn.workload import Workload
from sensitivity.estimators.ghost import weighted_squares
from sensitivity.local import LocalPart, local
from sensitivity.tasks import batch_tasks, mean_over_samples, refuse_activations, refuse_apart
from sensitivity.weight_calls import stored_weights

_VERSION = 1


class Fisher:
    """The metric `fisher`, for weights: one task for each calibration batch."""

    name = "fisher"

    def tasks(self, workload: Workload) -> Sequence[Task]:
        """Return one task per batch; its key holds model, data, cells, loss, probes and seed.

        Raises InvalidInputError for schemes that quantize activations, and what is searched apart.
        """
        refuse_apart(self.name, workload)
        refuse_activations(self.name, workload)
        return batch_tasks(workload, self.name, _VERSION, function_digest(workload.loss))

    def run(self, workload: Workload, task: Task) -> Partial:
        """Return "scores" of (cells, samples)."""
        (number,) = task.part
        return {"scores": np.concatenate(local(workload, number, _scores), axis=1)}

    def combine(self, cells: Cells, partials: Sequence[Partial]) -> Scores:
        """Return the score of every cell; its error, over samples, holds that of probes as well."""
        return Scores(sensitivity=mean_over_samples(self.name, cells, partials))


def _scores(part: LocalPart) -> Floats:
    workload = part.workload
    found = np.zeros((len(workload.cells), part.samples))
    for unit, schemes, offset in zip(
        workload.graph.units, workload.cells.schemes, workload.cells.offsets[:-1], strict=True
    ):
        for weight in stored_weights(workload, unit, schemes):
            used = weight.calls(workload, part.calls, part.gradients)
            changed = [i for i, delta in enumerate(weight.deltas) if delta is not None]
            if used and changed:
                squared = torch.stack([d.square() for d in weight.deltas if d is not None])
                scores = weighted_squares(used, squared, part.samples).double().mean(0).cpu()
                found[offset + np.array(changed)] += scores.T.numpy()
    return found
