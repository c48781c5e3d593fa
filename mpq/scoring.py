"""Second stage: run a metric's tasks wherever workers are, doing nothing twice."""

from __future__ import annotations

import time
import warnings
from typing import TypeVar

import torch

from mpq.core.protocols import Executor, Partial, Scores, Task
from mpq.evaluate import Bench
from mpq.nn.workload import Workload
from mpq.progress import Progress
from mpq.store.store import Store
from sensitivity import get_metric

Setup = TypeVar("Setup")


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
            for fmt in {scheme.weights for scheme in schemes if not scheme.weights.is_native}:
                workload.quantizer.store(layer.weight_id, weight, fmt, layer.channel_axis)
            advance()


def run_task(bench: Bench, work: tuple[str, Task]) -> tuple[Partial, float]:
    """Do one task of a metric in a worker; returns its result and seconds."""
    metric, task = work
    started = time.perf_counter()
    return get_metric(metric).run(bench.workload, task), time.perf_counter() - started


def score(
    workload: Workload,
    metric_name: str,
    executor: Executor,
    setup: object,
    store: Store,
    progress: Progress,
) -> Scores:
    """Return the scores of every cell; each finished task is in the database before it counts."""
    metric = get_metric(metric_name)
    tasks = list(metric.tasks(workload))
    done = store.partials(task.key for task in tasks)
    missing = [task for task in tasks if task.key not in done]
    with progress.stage(f"scoring ({metric_name})", len(tasks)) as advance:
        for _ in range(len(tasks) - len(missing)):
            advance()
        work = [(metric_name, task) for task in missing]
        for position, (partial, seconds) in executor.map(setup, run_task, work):  # type: ignore[arg-type]
            store.put_partial(missing[position].key, partial, seconds)
            done[missing[position].key] = partial
            advance()
    scores = metric.combine(workload.cells, [done[task.key] for task in tasks])
    _warn_about(scores)
    return scores


def _warn_about(scores: Scores) -> None:
    table = scores.sensitivity
    silent = [
        unit
        for unit, start, stop in zip(
            table.cells.units, table.cells.offsets[:-1], table.cells.offsets[1:], strict=True
        )
        if not table.values[start:stop].any()
    ]
    if len(silent) == len(table.cells.units):
        warnings.warn(
            "every sensitivity is zero: ties are broken towards cheaper schemes; check that the "
            "calibration batches differ and reach the output",
            stacklevel=3,
        )
    elif silent:
        warnings.warn(
            f"no effect on the output was seen for {len(silent)} units, so they count as free: "
            f"{', '.join(silent[:5])}",
            stacklevel=3,
        )
