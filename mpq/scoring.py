"""Second stage: what a metric says of every cell, and what the network says around a choice."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from mpq.adaptive import Enough
from mpq.core.errors import MpqWarning
from mpq.core.problem import Allocation
from mpq.core.protocols import Partial, Scores, Task
from mpq.core.tables import Responses
from mpq.nn.batches import num_samples
from mpq.nn.fingerprint import digest
from mpq.nn.workload import Workload
from mpq.progress import Progress
from mpq.tasks import Bench, Work, Workers
from sensitivity import get_metric
from sensitivity.responses import responses_of_batch

_VERSION = 3  # of the relinearisation: part of its content keys


def search_ranges(workload: Workload, progress: Progress) -> None:
    """Search every clipping range once, here, so that workers find them ready."""
    if workload.quantizer.clip == "minmax":
        return
    parameters = dict(workload.model.named_parameters())
    layers = [
        (layer, schemes)
        for unit, schemes in zip(workload.graph.units, workload.cells.schemes, strict=True)
        for layer in workload.graph.stored_layers(unit)
    ]
    with progress.stage("clipping ranges", len(layers)) as advance, torch.no_grad():
        for layer, schemes in layers:
            weight = parameters[layer.weight_id].detach()
            formats = {scheme.weights for scheme in schemes if not scheme.weights.is_native}
            for fmt in (fmt for fmt in formats if not fmt.made_ahead):
                workload.quantizer.store(layer.weight_id, weight, fmt, layer.channel_axis)
            advance()


def score(
    workers: Workers,
    metric_name: str,
    enough: Enough | None = None,
    tell: Callable[[str], None] | None = None,
    tasks: Sequence[Task] | None = None,
) -> Scores:
    """Return the scores of every cell by a metric.

    With `enough` scoring ends after the first round of tasks (`Task.round`) that satisfies it:
    the scores are those of the calibration data seen so far, `tell` hears how much that was, and
    a later scoring in full goes on from there. `tasks` are the metric's own: whoever looks their
    keys up later gives them, as a loss without a fixed key has other keys at each call.
    """
    metric = get_metric(metric_name)
    tasks = tasks if tasks is not None else metric.tasks(workers.workload)
    samples = sum(num_samples(batch) for batch in workers.workload.calibration)
    last = max((task.round for task in tasks), default=0)
    for number in sorted({task.round for task in tasks}) if enough else [last]:
        some = [task for task in tasks if task.round <= number]
        label = f"scoring ({metric_name})" + (f" to round {number}" if number < last else "")
        partials = workers.finished(label, run_task, [work_of(metric_name, task) for task in some])
        scores = metric.combine(workers.workload.cells, partials)
        # the first task has no error bar yet where that is over batches: 0 is not precise then
        known = len(some) > 1 or bool(scores.sensitivity.stderr.any())
        if number < last and enough and known and enough(scores, samples * len(some) / len(tasks)):
            (tell or workers.progress.note)(
                f"{metric_name}: {len(some)} of {len(tasks)} tasks were precise enough"
            )
            break
    _warn_about(scores)
    return replace(scores, sensitivity=replace(scores.sensitivity, data=workers.workload.data))


def work_of(metric: str, task: Task) -> Work[tuple[str, Task]]:
    """Return a task of a metric as workers take it."""
    return Work(task.key, (metric, task), f"{metric} of {task.label or task.part}", task.samples)


def run_task(bench: Bench, work: tuple[str, Task]) -> Partial:
    """Do one task of a metric."""
    metric, task = work
    return get_metric(metric).run(bench.workload, task)


def relinearise(workers: Workers, base: Allocation) -> Responses:
    """Return the responses of every cell around the network quantized as `base`."""
    workload = workers.workload
    cells = [(unit, str(scheme)) for unit, scheme in workload.cells]
    setting = ("relinearise", _VERSION, workload.key, cells, workload.num_probes, workload.seed)
    counts = [num_samples(batch) for batch in workload.calibration]
    firsts = [sum(counts[:number]) for number in range(len(counts))]  # choose the random signs
    work = [
        Work(
            digest(setting, base.text(), batch_key, first),
            (number, base),
            f"linearising on calibration batch {number}",
            counts[number],
        )
        for number, (batch_key, first) in enumerate(zip(workload.batch_keys, firsts, strict=True))
    ]
    partials = workers.finished("linearising again", run_relinearisation, work)
    return Responses(
        cells=workload.cells,
        vectors=np.concatenate([p["u"] for p in partials], axis=1).astype(np.float32),
        slopes=np.concatenate([p["g"] for p in partials], axis=1).astype(np.float32),
    )


def run_relinearisation(bench: Bench, work: tuple[int, Allocation]) -> Partial:
    """Do one batch of a relinearisation."""
    number, base = work
    found = responses_of_batch(bench.workload, number, base)
    return {"u": found.u, "g": found.g}


def _warn_about(scores: Scores) -> None:
    table = scores.sensitivity
    cells = table.cells
    lossy = [u for u, s in enumerate(cells.schemes) if not all(scheme.is_native for scheme in s)]
    silent = [
        cells.units[u]
        for u in lossy
        if not table.values[cells.offsets[u] : cells.offsets[u + 1]].any()
    ]
    if lossy and len(silent) == len(lossy):
        warnings.warn(
            "every sensitivity is zero: ties are broken towards cheaper schemes; check that the "
            "calibration batches differ and reach the output",
            MpqWarning,
            stacklevel=3,
        )
    elif silent:
        warnings.warn(
            f"no effect on the output was seen for {len(silent)} units, so they count as free: "
            f"{', '.join(silent[:5])}",
            MpqWarning,
            stacklevel=3,
        )
