"""AdaQuant's score: the increase of the user's loss with one cell changed alone.

    DL(l, c) = mean_x [ loss(z_lc(x), x) - loss(z(x), x) ]    (Hubara et al. 2021, sec. 4)

z_lc is the output with unit l in scheme c and all other units as they are. The loss is taken one
sample at a time (sensitivity.sample_losses). The paper's code raises every score to at least
1e-6; here the sign is kept: a negative score says that the change helped on these samples, which
on a trained network is mostly noise, as the error bar tells. Weights and activations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mpq.core.protocols import Partial, Scores, Task
from mpq.core.tables import Cells
from mpq.nn.batches import Batch
from mpq.nn.fingerprint import function_digest
from mpq.nn.workload import Workload
from sensitivity.alone import alone
from sensitivity.sample_losses import require_loss, sample_losses
from sensitivity.tasks import batch_tasks, mean_over_samples

_VERSION = 1


class Loss:
    """The metric `loss`: one task for each calibration batch, at most one pass for each cell."""

    name = "loss"

    def tasks(self, workload: Workload) -> Sequence[Task]:
        """Return one task per batch; its key holds model, data, cells, loss and seed.

        Raises InvalidInputError where the workload has no loss.
        """
        require_loss(self.name, workload)
        return batch_tasks(workload, self.name, _VERSION, function_digest(workload.loss))

    def run(self, workload: Workload, task: Task) -> Partial:
        """Return "scores" of (cells, samples): the increase of each sample's loss."""
        (number,) = task.part
        known: list[tuple[torch.Tensor, torch.Tensor]] = []  # the original's, computed once

        def increase(original: torch.Tensor, changed: torch.Tensor, batch: Batch) -> torch.Tensor:
            if not known or known[-1][0] is not original:
                known[:] = [(original, sample_losses(workload, number, batch, original).double())]
            return sample_losses(workload, number, batch, changed).double() - known[-1][1]

        return alone(workload, number, {"scores": increase})

    def combine(self, cells: Cells, partials: Sequence[Partial]) -> Scores:
        """Return the mean increase of every cell; the error bar is over samples."""
        return Scores(sensitivity=mean_over_samples(self.name, cells, partials))
