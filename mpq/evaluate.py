"""What an allocation really does to the network's outputs and metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mpq.core.errors import InvalidInputError
from mpq.core.evaluation import Evaluation
from mpq.core.problem import Allocation
from mpq.core.protocols import Partial
from mpq.nn.batches import Batch, call, cut, num_samples, portions, position_mask
from mpq.nn.fingerprint import digest, function_digest
from mpq.nn.patch import evaluating
from mpq.nn.quality import degradations
from mpq.nn.workload import Workload
from mpq.quality_tables import qualities_digest
from mpq.tasks import Bench, Split, Work, Workers

_VERSION = 2  # part of every content key: raise it when results change
_METRIC, _QUALITY = "metric ", "quality "
_METRICS = -1  # in place of a batch's number: the user's own metrics
Piece = tuple[int, int]  # a batch's number, and how many of its samples; of metrics all


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An allocation to measure on one split; an empty one is the network as it is.

    With a `share` below 1 it is measured on the first part of the samples.
    """

    name: str
    split: Split
    allocation: Allocation
    with_metrics: bool = False
    predicted: float | None = None
    share: float = 1.0


def measure(workers: Workers, candidates: Sequence[Candidate]) -> list[Evaluation]:
    """Return the measurement of each candidate, in order; none is measured twice.

    The divergence is the mean over samples; its standard error is over samples. A task is one
    batch under one candidate, or the user's metrics of one.
    """
    workload = workers.workload
    work = [
        _work(workload, candidate, piece)
        for candidate in candidates
        for piece in _pieces(workload, candidate)
    ]
    label = f"measuring ({candidates[0].split.replace('_', '-')})"
    found = iter(workers.finished(label, run_candidate, work))
    return [
        _evaluation(
            candidate,
            workload.divergence.kind,
            [next(found) for _ in _pieces(workload, candidate)],
        )
        for candidate in candidates
    ]


def _pieces(workload: Workload, candidate: Candidate) -> list[Piece]:
    """Return what a candidate is run on: batches, and -1 for the user's metrics if asked.

    A share of the samples is the first batches and the beginning of the next one.
    """
    batches = {"calibration": workload.calibration, "held_out": workload.held_out}
    sizes = [num_samples(batch) for batch in batches[candidate.split]]
    left, pieces = max(1, round(candidate.share * sum(sizes))), []
    for number, size in enumerate(sizes):
        if left > 0:
            pieces.append((number, min(size, left)))
        left -= size
    with_metrics = candidate.with_metrics and workload.evaluate
    return [*pieces, (_METRICS, 0)] if with_metrics else pieces


def run_candidate(bench: Bench, work: tuple[Candidate, Piece]) -> Partial:
    """Run one batch under a candidate, a forward pass, or the user's metrics."""
    candidate, (number, samples) = work
    started = time.perf_counter()
    workload = bench.workload
    has_batch = number != _METRICS
    reference = bench.reference(candidate.split, number) if has_batch else None
    with (
        workload.evaluating(number, candidate.split) if has_batch else evaluating(workload.model),
        torch.no_grad(),
        workload.quantized_as(candidate.allocation) as model,
    ):
        found: dict[str, npt.NDArray[np.generic]] = {}
        if reference is not None:
            batch = bench.batches(candidate.split)[number]
            if samples < num_samples(batch) == len(reference):
                batch, reference = cut(batch, 0, samples), reference[:samples]
            found = _in_portions(workload, model, batch, reference)
        elif workload.evaluate is not None:
            metrics = _numbers(workload.evaluate(model), workload.qualities)
            found = {f"{_METRIC}{name}": np.array(value) for name, value in metrics.items()}
    return {**found, "seconds": np.array(time.perf_counter() - started)}


def check_evaluate(workers: Workers) -> None:
    """Run the user's metrics on the unquantized network, which is needed anyway.

    Raises InvalidInputError where they are not a mapping of names to numbers, or one is infinite.
    """
    workload = workers.workload
    if workload.evaluate is None:
        return
    whole = Candidate(name="unquantized", split="calibration", allocation=Allocation({}))
    work = [_work(workload, whole, (_METRICS, 0))]
    (found,) = workers.finished("evaluating (unquantized)", run_candidate, work)
    for name, value in _metrics(found).items():
        if math.isinf(value):
            raise InvalidInputError(
                "evaluate",
                f"evaluate returns {value} for {name!r} of the unquantized network: return a "
                f"finite number, or nan where there is none",
            )


def _numbers(metrics: object, qualities: Collection[str]) -> dict[str, float]:
    """Return what `evaluate` returned as numbers; raises InvalidInputError where it is not."""
    asked = "return {name: number}"
    if not isinstance(metrics, Mapping):
        raise InvalidInputError(
            "evaluate", f"evaluate returns a {type(metrics).__name__}, {metrics!r:.40}: {asked}"
        )
    found = {}
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise InvalidInputError("evaluate", f"evaluate returns the name {name!r}: {asked}")
        if name in qualities:
            raise InvalidInputError(
                "evaluate",
                f"evaluate returns {name!r}, which is the name of a quality as well: rename one",
            )
        try:
            found[name] = float("text" if isinstance(value, str | bytes) else value)
        except (TypeError, ValueError, RuntimeError) as error:  # of text, None, many elements
            raise InvalidInputError(
                "evaluate",
                f"evaluate returns a {type(value).__name__}, {value!r:.40}, for {name!r}: {asked}",
            ) from error
    return found


def _in_portions(
    workload: Workload, model: nn.Module, batch: Batch, reference: torch.Tensor
) -> dict[str, npt.NDArray[np.generic]]:
    """Return what `_compared` says of a batch, no more samples at once than memory allows."""
    found, first = [], 0
    for portion in portions(batch, workload.at_once):
        output = call(model, portion)
        found.append(_compared(workload, portion, reference[first : first + len(output)], output))
        first += len(output)
    return {name: torch.cat([one[name] for one in found]).cpu().numpy() for name in found[0]}


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


def _work(workload: Workload, candidate: Candidate, piece: Piece) -> Work[tuple[Candidate, Piece]]:
    number, samples = piece
    key, of = _key(workload, candidate, piece), f"{candidate.name!r}"
    if number == _METRICS:
        return Work(key, (candidate, piece), f"evaluate of {of}")
    where = f"{candidate.split.replace('_', '-')} batch {number}"
    return Work(key, (candidate, piece), f"measuring {of} on {where}", samples)


def _key(workload: Workload, candidate: Candidate, piece: Piece) -> str:
    number, samples = piece
    if number == _METRICS:
        setting = ("metrics", _VERSION, workload.key, function_digest(workload.evaluate))
        return digest(setting, candidate.allocation.text())
    keys = {"calibration": workload.batch_keys, "held_out": workload.held_out_keys}
    batches = {"calibration": workload.calibration, "held_out": workload.held_out}
    qualities = qualities_digest(workload)
    of_batch = ("evaluation", _VERSION, workload.key, keys[candidate.split][number], qualities)
    if samples < num_samples(batches[candidate.split][number]):
        return digest(of_batch, f"first {samples}", candidate.allocation.text())
    return digest(of_batch, candidate.allocation.text())


def _evaluation(candidate: Candidate, divergence: str, pieces: Sequence[Partial]) -> Evaluation:
    found = {
        name: np.concatenate([p[name] for p in pieces if name in p])
        for name in pieces[0]
        if not name.startswith(_METRIC) and name != "seconds"
    }
    per_sample = found["per_sample"].astype(np.float64)
    spread = float(per_sample.std(ddof=1)) if len(per_sample) > 1 else 0.0
    metrics = {
        name: value for piece in pieces for name, value in piece.items() if name.startswith(_METRIC)
    }
    return Evaluation(
        candidate=candidate.name,
        split=candidate.split,
        allocation=candidate.allocation,
        divergence=divergence,
        mean=float(per_sample.mean()),
        stderr=spread / len(per_sample) ** 0.5,
        predicted=candidate.predicted,
        metrics=_metrics({**found, **metrics}),
        seconds=sum(float(p["seconds"].astype(np.float64)) for p in pieces),
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
    return by_prefix[_QUALITY] | by_prefix[_METRIC]
