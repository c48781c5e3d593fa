"""Is the response sketch as good as measuring every cell, and how much faster?

Truth: KL to the original with one unit in one scheme at a time, all other units untouched. Both
are timed batch by batch in turn, in processor seconds of one thread; the ratio is the median over
batches. Run: python -m benchmarks.sections.sketch [digits_resnet20 digits_vit minilm]
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time

import numpy as np
import torch

from mpq.choices import make_cells, parse_schemes
from mpq.nn.batches import call, cut, position_mask
from mpq.nn.divergence import OutputDivergence
from mpq.nn.fingerprint import batches_digest, model_digest
from mpq.nn.graph import build_graph
from mpq.nn.patch import evaluating, quantized
from mpq.nn.workload import Workload
from sensitivity import get_metric

SCHEMES = parse_schemes(["int2", "int3", "int4", "int5", "int6", "int8"])


def make_workload(name: str, num_batches: int) -> Workload:
    """Return an example with every layer its own unit."""
    example = importlib.import_module(f"examples.{name}")
    model = example.make_model()
    batches = tuple(example.calibration_batches()[:num_batches])
    graph = build_graph(model, cut(batches[0], 0, 1), groups="none")
    return Workload(
        model=model,
        graph=graph,
        cells=make_cells(graph, lambda layer: SCHEMES),
        calibration=batches,
        held_out=(),
        divergence=OutputDivergence(example.DIVERGENCE),
        key=model_digest(model),
        batch_keys=batches_digest(batches),
    )


def one_at_a_time(workload: Workload, number: int) -> np.ndarray:
    """Return the measured divergence of every cell on one batch, a forward pass for each."""
    batch = workload.calibration[number]
    found = []
    with torch.no_grad(), evaluating(workload.model) as model:
        original = call(model, batch)
        mask = position_mask(batch, original)
        layers = {unit.name: unit.layers for unit in workload.graph.units}
        for unit, scheme in workload.cells:
            schemes = dict.fromkeys(layers[unit], scheme)
            with quantized(model, schemes, quantizer=workload.quantizer):
                changed = workload.divergence.between(original, call(model, batch), mask)
            found.append(float(changed.mean()))
    return np.array(found)


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value."""
    return np.argsort(np.argsort(values)).astype(float)


def compare(name: str, num_batches: int = 4) -> dict[str, float]:
    """Return Spearman over all cells, and processor seconds of both with their median ratio."""
    workload = make_workload(name, num_batches)
    metric = get_metric("gauss_newton")
    partials, truths, ratios, seconds = [], [], [], [0.0, 0.0]
    tasks = metric.tasks(workload)
    metric.run(workload, tasks[0])  # warm-up
    for task in tasks:
        started = time.process_time()
        partials.append(metric.run(workload, task))
        between = time.process_time()
        truths.append(one_at_a_time(workload, task.part[0]))
        ended = time.process_time()
        ratios.append((ended - between) / (between - started))
        seconds[0] += between - started
        seconds[1] += ended - between
    predicted = metric.combine(workload.cells, partials).sensitivity.values
    truth = np.mean(truths, axis=0)
    return {
        "cells": len(workload.cells),
        "spearman": float(np.corrcoef(ranks(predicted), ranks(truth))[0, 1]),
        "sketch_s": seconds[0],
        "one_at_a_time_s": seconds[1],
        "ratio": statistics.median(ratios),
    }


def main(names: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    print("example           cells  Spearman  sketch s  one at a time s  times faster")
    for name in names or ["digits_resnet20", "digits_vit", "minilm"]:
        row = compare(name, num_batches=1 if name == "minilm" else 4)  # one takes minutes
        print(
            f"{name:16} {row['cells']:6} {row['spearman']:9.4f} {row['sketch_s']:9.2f} "
            f"{row['one_at_a_time_s']:16.2f} {row['ratio']:13.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
