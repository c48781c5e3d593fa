"""Second stage: run a metric's tasks wherever workers are, doing nothing twice."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch

from mpq.core.errors import MpqWarning
from mpq.core.problem import Allocation
from mpq.core.protocols import Executor, Partial, Scores, Task
from mpq.core.tables import Responses
from mpq.evaluate import Bench
from mpq.nn.fingerprint import digest
from mpq.nn.workload import Workload
from mpq.progress import Progress
from mpq.store.store import Store
from sensitivity import get_metric
from sensitivity.responses import responses_of_batch

Item = TypeVar("Item")
Setup = Callable[[], Bench]
_VERSION = 1  # of the relinearisation: part of its content keys


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
    setup: Setup,
    store: Store,
    progress: Progress,
) -> Scores:
    """Return the scores of every cell; each finished task is in the database before it counts."""
    metric = get_metric(metric_name)
    work = [(task.key, (metric_name, task)) for task in metric.tasks(workload)]
    label = f"scoring ({metric_name})"
    scores = metric.combine(
        workload.cells, _finished(run_task, work, executor, setup, store, progress, label)
    )
    _warn_about(scores)
    return scores


def relinearise(
    workload: Workload,
    executor: Executor,
    setup: Setup,
    store: Store,
    progress: Progress,
    base: Allocation,
) -> Responses:
    """Return the responses of every cell around the network quantized as `base`."""
    cells = [(unit, str(scheme)) for unit, scheme in workload.cells]
    setting = ("relinearise", _VERSION, workload.key, cells, workload.num_probes, workload.seed)
    work = [
        (digest(setting, base.text(), batch_key, number), (number, base))
        for number, batch_key in enumerate(workload.batch_keys)
    ]
    partials = _finished(
        run_relinearisation, work, executor, setup, store, progress, "linearising again"
    )
    slopes = np.concatenate([p["g"] for p in partials], axis=1).astype(np.float64)
    return Responses(
        cells=workload.cells,
        vectors=np.concatenate([p["u"] for p in partials], axis=1).astype(np.float32),
        linear=slopes.mean(axis=1),
    )


def run_relinearisation(bench: Bench, work: tuple[int, Allocation]) -> tuple[Partial, float]:
    """Do one batch of a relinearisation in a worker; returns its result and seconds."""
    number, base = work
    started = time.perf_counter()
    found = responses_of_batch(bench.workload, number, base)
    return {"u": found.u, "g": found.g}, time.perf_counter() - started


def _finished(
    fn: Callable[[Bench, Item], tuple[Partial, float]],
    work: Sequence[tuple[str, Item]],
    executor: Executor,
    setup: Setup,
    store: Store,
    progress: Progress,
    label: str,
) -> list[Partial]:
    """Return the result of each (key, item), read from the database where it is there already."""
    done = store.partials(key for key, _ in work)
    missing = [(key, item) for key, item in work if key not in done]
    with progress.stage(label, len(work)) as advance:
        for _ in range(len(work) - len(missing)):
            advance()
        items = [item for _, item in missing]
        for position, (partial, seconds) in executor.map(setup, fn, items):
            key = missing[position][0]
            store.put_partial(key, partial, seconds)
            done[key] = partial
            advance()
    return [done[key] for key, _ in work]


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
