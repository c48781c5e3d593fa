"""What each cell alone does to every quality: at most one pass a cell, all qualities at once."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from mpq.core.protocols import Partial
from mpq.core.tables import SensitivityTable
from mpq.nn.batches import Batch, num_samples
from mpq.nn.fingerprint import digest, function_digest
from mpq.nn.quality import Quality, degradations
from mpq.nn.workload import Workload
from mpq.tasks import Bench, Work, Workers
from sensitivity.alone import alone
from sensitivity.tasks import mean_over_samples

_VERSION = 1  # part of every content key: raise it when results change
_BROKEN = 1e300  # stands for infinity, which a score cannot be


def qualities_digest(workload: Workload) -> str:
    """Return the key of the workload's quality functions."""
    return digest({name: function_digest(f) for name, f in workload.qualities.items()})


def quality_tables(workers: Workers) -> dict[str, SensitivityTable]:
    """Return the table of each quality: its mean degradation with one unit quantized alone.

    The standard error is over calibration samples. A cell that makes an output infinite or NaN
    scores worse than all units at their worst together, so that it is taken only where forced.
    """
    workload = workers.workload
    cells = [(unit, str(scheme)) for unit, scheme in workload.cells]
    setting = ("quality", _VERSION, workload.key, cells, qualities_digest(workload))
    work = [
        Work(
            digest(setting, key),
            number,
            f"qualities of calibration batch {number}",
            num_samples(workload.calibration[number]),
        )
        for number, key in enumerate(workload.batch_keys)
    ]
    partials = workers.finished("scoring (qualities)", run_qualities, work)
    tables = {}
    for name in workload.qualities:
        scores = np.concatenate([p[name] for p in partials], axis=1).astype(np.float64)
        whole = scores < _BROKEN
        worst = np.abs(scores[whole]).max(initial=0.0)
        scores[~whole] = (1.0 + worst) * len(workload.cells.units) * scores.shape[1]
        tables[name] = mean_over_samples(f"quality {name}", workload.cells, [{"scores": scores}])
    return tables


def run_qualities(bench: Bench, number: int) -> Partial:
    """Return every quality of every cell on calibration batch `number`: (cells, samples) each."""
    workload = bench.workload
    functions = {
        name: partial(_degradation, name, function) for name, function in workload.qualities.items()
    }
    return alone(workload, number, functions)


def _degradation(
    name: str, function: Quality, reference: torch.Tensor, changed: torch.Tensor, batch: Batch
) -> torch.Tensor:
    found = degradations({name: function}, reference, changed, batch)[name]
    return found.clamp(max=_BROKEN)
