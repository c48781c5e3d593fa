"""The first-order change of the loss with one cell changed alone.

    score(l, c) = mean_x | < d loss / d Y , Y_c - Y > |

with Y the output of unit l and Y_c that in scheme c on the original network's own input; first-
order Taylor importance (Molchanov et al. 2017) of the rounding error. The gradient is that of the
user's loss, sample by sample; inner products of all calls and layers of a unit add up before the
absolute value. Without a loss it is the mean absolute value over random probes of the output
divergence (sensitivity.local): the root of twice the divergence, up to a constant. It ranks
layers well and does not add up to a loss. Weights and activations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mpq.core.protocols import Partial, Scores, Task
from mpq.core.tables import Cells
from mpq.nn.fingerprint import function_digest
from mpq.nn.workload import Workload
from sensitivity.local import LocalCall, local_scores
from sensitivity.tasks import batch_tasks, mean_over_samples

_VERSION = 1


class Taylor:
    """The metric `taylor`: one task for each calibration batch."""

    name = "taylor"

    def tasks(self, workload: Workload) -> Sequence[Task]:
        """Return one task per batch; its key holds model, data, cells, loss, probes and seed."""
        return batch_tasks(workload, self.name, _VERSION, function_digest(workload.loss))

    def run(self, workload: Workload, task: Task) -> Partial:
        """Return "scores" of (cells, samples)."""
        (number,) = task.part
        return {"scores": local_scores(workload, number, _first_order)}

    def combine(self, cells: Cells, partials: Sequence[Partial]) -> Scores:
        """Return the mean score of every cell; the error bar is over samples, probes included."""
        return Scores(sensitivity=mean_over_samples(self.name, cells, partials))


def _first_order(calls: Sequence[LocalCall], choices: int, samples: int) -> torch.Tensor:
    inner = [call.change.inner(call.inputs, call.gradient, samples) for call in calls]
    if not inner:
        return torch.zeros(choices, samples)
    return torch.stack(inner).sum(0).abs().mean(2)
