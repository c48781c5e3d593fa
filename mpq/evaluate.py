"""What an allocation really does to the network's outputs and metrics."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mpq.core.errors import InvalidInputError
from mpq.core.evaluation import Evaluation
from mpq.core.problem import Allocation
from mpq.core.protocols import Partial
from mpq.nn.batches import Batch, call, position_mask
from mpq.nn.fingerprint import digest, function_digest
from mpq.nn.patch import evaluating
from mpq.nn.quality import degradations
from mpq.nn.workload import Workload
from mpq.quality_tables import qualities_digest
from mpq.tasks import Bench, Split, Workers

_VERSION = 1  # part of every content key: raise it when results change
_METRIC, _QUALITY = "metric ", "quality "


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An allocation to measure on one split; an empty one is the network as it is."""

    name: str
    split: Split
    allocation: Allocation
    with_metrics: bool = False
    predicted: float | None = None


def measure(workers: Workers, candidates: Sequence[Candidate]) -> list[Evaluation]:
    """Return the measurement of each candidate, in order; none is measured twice.

    The divergence is the mean over samples; its standard error is over samples.
    """
    work = [(_key(workers.workload, candidate), candidate) for candidate in candidates]
    label = f"measuring ({candidates[0].split.replace('_', '-')})"
    return [
        _evaluation(candidate, workers.workload.divergence.kind, found)
        for candidate, found in zip(
            candidates, workers.finished(label, run_candidate, work), strict=True
        )
    ]


def run_candidate(bench: Bench, candidate: Candidate) -> Partial:
    """Run a candidate over its split: one forward pass, plus the user's metrics if asked."""
    started = time.perf_counter()
    workload = bench.workload
    references = bench.references(candidate.split)
    with (
        evaluating(workload.model),
        torch.no_grad(),
        workload.quantized_as(candidate.allocation) as model,
    ):
        per_batch = [
            _compared(workload, batch, reference, call(model, batch))
            for batch, reference in zip(bench.batches(candidate.split), references, strict=True)
        ]
        metrics = (
            workload.evaluate(model)
            if candidate.with_metrics and workload.evaluate is not None
            else {}
        )
    return {
        **{name: torch.cat([of[name] for of in per_batch]).numpy() for name in per_batch[0]},
        "seconds": np.array(time.perf_counter() - started),
        **{f"{_METRIC}{name}": np.array(float(value)) for name, value in metrics.items()},
    }


def _compared(
    workload: Workload, batch: Batch, reference: torch.Tensor, output: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the divergence and the qualities of each sample of a batch."""
    mask = position_mask(batch, output)
    found = degradations(workload.qualities, reference, output, batch)
    return {
        "per_sample": workload.divergence.between(reference, output, mask).double(),
        **{f"{_QUALITY}{name}": values for name, values in found.items()},
    }


def _key(workload: Workload, candidate: Candidate) -> str:
    batches = {"calibration": workload.batch_keys, "held_out": workload.held_out_keys}
    evaluate = function_digest(workload.evaluate) if candidate.with_metrics else ""
    of_split = batches[candidate.split]
    qualities = qualities_digest(workload)
    setting = ("evaluation", _VERSION, workload.key, of_split, evaluate, qualities)
    return digest(setting, candidate.allocation.text())


def _evaluation(candidate: Candidate, divergence: str, found: Partial) -> Evaluation:
    per_sample = found["per_sample"].astype(np.float64)
    spread = float(per_sample.std(ddof=1)) if len(per_sample) > 1 else 0.0
    return Evaluation(
        candidate=candidate.name,
        split=candidate.split,
        allocation=candidate.allocation,
        divergence=divergence,
        mean=float(per_sample.mean()),
        stderr=spread / len(per_sample) ** 0.5,
        predicted=candidate.predicted,
        metrics=_metrics(found),
        seconds=float(found["seconds"].astype(np.float64)),
        per_sample=per_sample,
    )


def _metrics(found: Partial) -> dict[str, float]:
    """Return the mean of each quality, and the user's own metrics."""
    by_prefix = {
        prefix: {
            name.removeprefix(prefix): float(value.astype(np.float64).mean())
            for name, value in found.items()
            if name.startswith(prefix)
        }
        for prefix in (_QUALITY, _METRIC)
    }
    twice = by_prefix[_QUALITY].keys() & by_prefix[_METRIC].keys()
    if twice:
        raise InvalidInputError(
            "evaluate",
            f"evaluate returns {sorted(twice)[0]!r}, which is the name of a quality as well: "
            f"rename one",
        )
    return by_prefix[_QUALITY] | by_prefix[_METRIC]
