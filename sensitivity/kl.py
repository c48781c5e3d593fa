"""ZeroQ's score: the divergence of the network's output with one cell changed alone.

    Omega(l, c) = mean_x D( z(x) || z_lc(x) )            (Cai et al. 2020, "ZeroQ", eq. 2)

z_lc is the output with unit l in scheme c and all other units as they are. D is the workload's
own output divergence: KL for class logits as in the paper; where the workload's divergence is
"cosine" or "mse" the score is that one, under the same name. Weights and activations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mpq.core.protocols import Partial, Scores, Task
from mpq.core.tables import Cells
from mpq.nn.batches import Batch, position_mask
from mpq.nn.workload import Workload
from sensitivity.alone import alone
from sensitivity.tasks import batch_tasks, mean_over_samples

_VERSION = 1


class Kl:
    """The metric `kl`: one task for each calibration batch, at most one pass for each cell."""

    name = "kl"

    def tasks(self, workload: Workload) -> Sequence[Task]:
        """Return one task per batch; its key holds model, data, cells and seed."""
        return batch_tasks(workload, self.name, _VERSION)

    def run(self, workload: Workload, task: Task) -> Partial:
        """Return "scores" of (cells, samples): the divergence of each cell alone."""

        def between(original: torch.Tensor, changed: torch.Tensor, batch: Batch) -> torch.Tensor:
            mask = position_mask(batch, original)
            return workload.divergence.between(original, changed, mask)

        (number,) = task.part
        return alone(workload, number, {"scores": between})

    def combine(self, cells: Cells, partials: Sequence[Partial]) -> Scores:
        """Return the mean divergence of every cell; the error bar is over samples."""
        table = mean_over_samples(self.name, cells, partials)
        return Scores(sensitivity=table)
