"""Is relevance conserved, and does LRP rank layers as Gauss-Newton and measurement do?

For each example, every layer its own unit: the relative conservation error of one calibration
batch (relevance at inputs plus what constants absorb, against that of the output), the absorbed
share, and over layers in int4 the rank correlations (Spearman) of `lrp` with `gauss_newton`, of
both with the measured divergence of that layer alone in int4, and of LRP's contributions c_l with
Gauss-Newton; then the layers with most relevance beside Gauss-Newton's most sensitive.
Run: python -m benchmarks.sections.relevance [digits_resnet20 digits_vit minilm smollm2]
"""

from __future__ import annotations

import dataclasses
import sys
import time

import numpy as np
import torch

from benchmarks.sections.sketch import make_workload, one_at_a_time, ranks
from mpq.choices import make_cells, parse_schemes
from mpq.nn.batches import cut
from mpq.nn.patch import evaluating, frozen
from mpq.nn.workload import Workload
from sensitivity import get_metric
from sensitivity.calls import Part
from sensitivity.lrp import composite_of, start
from sensitivity.relevance.mode import relevance

EXAMPLES = ("digits_resnet20", "digits_vit", "minilm", "smollm2")
FIRST = {"smollm2": 1}  # samples of the first batch, where all of two would take an hour


def conservation(workload: Workload) -> tuple[float, float]:
    """Return the relative conservation error of the first batch, and the absorbed share."""
    batch = workload.calibration[0]
    with evaluating(workload.model), frozen(workload.model):
        with relevance(workload.model, composite_of(workload.graph)) as ledger:
            seen = ledger.source(batch) if isinstance(batch, torch.Tensor) else batch
            if isinstance(batch, tuple | list):
                seen = (ledger.source(batch[0]), *batch[1:])
            head = workload.divergence.head(workload.output(0, seen))
        seed = start(workload, Part(0, batch, 0, len(head)), head)
        head.backward(seed)
    out = float((head.detach() * seed).sum(dtype=torch.float64))
    return abs(ledger.total - out) / abs(out), sum(ledger.absorbed.values()) / out


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


def compare(name: str, num_batches: int = 2) -> None:
    """Print the row of one example and its ranking."""
    full = make_workload(name, num_batches)
    schemes = parse_schemes(["int4"])
    workload = dataclasses.replace(full, cells=make_cells(full.graph, lambda layer: schemes))
    if name in FIRST:
        some = cut(full.calibration[0], 0, FIRST[name])
        workload = dataclasses.replace(
            workload, calibration=(some,), batch_keys=full.batch_keys[:1]
        )
    error, absorbed = conservation(workload)
    found, seconds = {}, {}
    for metric in (get_metric("lrp"), get_metric("gauss_newton")):
        started = time.process_time()
        partials = [metric.run(workload, task) for task in metric.tasks(workload)]
        seconds[metric.name] = time.process_time() - started
        found[metric.name] = metric.combine(workload.cells, partials).sensitivity.values
        if metric.name == "lrp":
            contributions = np.mean([p["arrived"].mean(axis=1) for p in partials], axis=0)
    truth = np.mean([one_at_a_time(workload, n) for n in range(len(workload.calibration))], axis=0)
    lrp, newton = found["lrp"], found["gauss_newton"]
    print(
        f"{name:16} {len(lrp):6} {error:12.1e} {absorbed:9.3f} {spearman(lrp, newton):8.3f} "
        f"{spearman(lrp, truth):13.3f} {spearman(newton, truth):12.3f} "
        f"{spearman(contributions, newton):7.3f} {seconds['lrp']:7.2f} "
        f"{seconds['gauss_newton']:7.2f}"
    )
    units = workload.cells.units
    for label, values in (("lrp", lrp), ("c_l", contributions), ("gauss_newton", newton)):
        first = [units[i] for i in np.argsort(-values)[:6]]
        print(f"    {label:13}{', '.join(first)}", flush=True)


def main(names: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    print(
        "example          layers  not conserved  absorbed  lrp~gn  lrp~measured  gn~measured  "
        "c_l~gn   lrp s    gn s"
    )
    for name in names or EXAMPLES:
        compare(name)


if __name__ == "__main__":
    main(sys.argv[1:])
