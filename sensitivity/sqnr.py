"""The noise-to-signal power ratio of the network's output with one cell changed alone.

    score(l, c) = sum_x |z_lc(x) - z(x)|^2 / sum_x |z(x)|^2      (= 10^(-SQNR_dB / 10))

Linear, not in decibels, so that the noise of independent changes adds up. Positions that the
attention mask leaves out count for nothing. Weights and activations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from mpq.core.errors import InvalidInputError
from mpq.core.protocols import Partial, Scores, Task
from mpq.core.tables import Cells, SensitivityTable
from mpq.nn.batches import Batch, position_mask
from mpq.nn.workload import Workload
from sensitivity.alone import alone
from sensitivity.tasks import batch_tasks

_VERSION = 1


class Sqnr:
    """The metric `sqnr`: one task for each calibration batch, at most one pass for each cell."""

    name = "sqnr"

    def tasks(self, workload: Workload) -> Sequence[Task]:
        """Return one task per batch; its key holds model, data, cells and seed."""
        return batch_tasks(workload, self.name, _VERSION)

    def run(self, workload: Workload, task: Task) -> Partial:
        """Return "noise" and "signal" of (cells, samples), powers of the whole output."""
        (number,) = task.part
        return alone(workload, number, {"noise": _noise, "signal": _signal})

    def combine(self, cells: Cells, partials: Sequence[Partial]) -> Scores:
        """Return the ratio R of every cell; its error, over samples, is that of noise - R signal.

        Raises InvalidInputError where the output is zero everywhere.
        """
        noise, signal = (
            np.concatenate([p[name] for p in partials], axis=1).astype(np.float64)
            for name in ("noise", "signal")
        )
        if not signal.any():
            raise InvalidInputError(
                "output_zero", "sqnr: the network's output is zero on all calibration batches"
            )
        power, samples = signal.mean(axis=1), signal.shape[1]
        ratio = noise.mean(axis=1) / power
        off = noise - ratio[:, None] * signal
        spread = off.std(axis=1, ddof=1) if samples > 1 else np.zeros(len(off))
        table = SensitivityTable(
            metric=self.name, cells=cells, values=ratio, stderr=spread / power / math.sqrt(samples)
        )
        return Scores(sensitivity=table)


def _noise(original: torch.Tensor, changed: torch.Tensor, batch: Batch) -> torch.Tensor:
    return _power(changed.double() - original.double(), batch)


def _signal(original: torch.Tensor, _: torch.Tensor, batch: Batch) -> torch.Tensor:
    return _power(original.double(), batch)


def _power(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    mask = position_mask(batch, values)
    squares = values.square() if mask is None else values.square() * mask.unsqueeze(-1)
    return squares.flatten(1).sum(1) if squares.ndim > 1 else squares
