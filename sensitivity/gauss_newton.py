"""The response sketch: every cell's effect on the output, and all pairs of cells, in one sweep.

With the responses u of `sensitivity.responses`, 1/2 mean u_c^2 is the second-order divergence of
cell c alone and 1/2 mean (sum_l u_l,a(l))^2 that of a whole allocation a, cross terms included,
without bias over the probes. Cost: about 1 + K forward and backward passes and at most one local
replay of each layer for each scheme, however many layers there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpq.core.protocols import Partial, Scores, Task
from mpq.core.tables import Cells, Responses, SensitivityTable
from mpq.nn.workload import Workload
from sensitivity.responses import responses_of_batch
from sensitivity.tasks import batch_tasks

_VERSION = 2  # part of every content key: raise it when results change


class GaussNewton:
    """The metric `gauss_newton`: one task for each calibration batch."""

    name = "gauss_newton"

    def tasks(self, workload: Workload) -> Sequence[Task]:
        """Return one task per batch; its key holds model, data, cells, probes and seed."""
        return batch_tasks(workload, self.name, _VERSION)

    def run(self, workload: Workload, task: Task) -> Partial:
        """Return the responses of every cell to one batch: "u" of (cells, samples, probes)."""
        (number,) = task.part
        return {"u": responses_of_batch(workload, number).u}

    def combine(self, cells: Cells, partials: Sequence[Partial]) -> Scores:
        """Return the table of own scores with their standard error, and the responses."""
        vectors = np.concatenate([p["u"] for p in partials], axis=1).astype(np.float32)
        responses = Responses(cells=cells, vectors=vectors)
        values, stderr = responses.own_scores()
        table = SensitivityTable(metric=self.name, cells=cells, values=values, stderr=stderr)
        return Scores(sensitivity=table, responses=responses)
