"""Does the stopwatch keep latency budgets, and does a mix beat every uniform scheme that does?

MiniLM on one sentence of 16 tokens: a whole search for each of some budgets between the fastest
mix and fp32, as a user would run it. Then the chosen networks, and the uniform ones, in ONNX
Runtime (one thread, processor time, in turns with the fp32 network) and on held-out sentences.

    python -m benchmarks.latency_budgets [--budgets 10] [--seconds 60]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import mpq
from benchmarks.latency import Bench
from examples import minilm
from mpq.core.problem import Allocation
from mpq.core.risk import quantile, upper_values
from mpq.deploy.target import get_target
from mpq.nn.batches import call
from mpq.nn.patch import evaluating, quantized
from mpq.result import SearchResult
from mpq.store.store import open_store

RISK = 0.95


def fastest_s(result: SearchResult) -> float:
    """Return the least seconds that hold with the probability that budgets are kept with."""
    table = result.problem.costs["latency"]
    assert table.joint is None
    least = np.minimum.reduceat(upper_values(table, RISK), table.cells.offsets[:-1])
    return float(table.fixed + least.sum())


def held_out_loss(result: SearchResult, allocation: Allocation) -> float:
    """Return the mean 1 - cosine to the original network on held-out sentences."""
    model = minilm.make_model()
    schemes = {name: allocation[u.name] for u in result.graph.units for name in u.layers}
    lost = []
    with evaluating(model), torch.no_grad():
        for batch in minilm.held_out_batches():
            expected = call(model, batch)
            with quantized(model, schemes, limits=result.graph.input_ranges):
                lost.append(1 - (call(model, batch) * expected).sum(-1))
    return float(torch.cat(lost).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budgets", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the table, of the check")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    sample = {name: values[:1, :16] for name, values in minilm.calibration_batches()[0].items()}
    with tempfile.TemporaryDirectory() as folder, open_store(Path(folder) / "runs.db") as store:

        def search(budget: str) -> SearchResult:
            return mpq.search(
                "examples.minilm:make_model",
                "examples.minilm:calibration_batches",
                sample=sample,
                budgets=[budget],
                latency_seconds=given.seconds,
                executor="serial",  # nothing runs beside what is measured
                storage=store,
            )

        first = search("latency <= 100%")
        table = first.problem.costs["latency"]
        print(f"table: {table.provenance}")
        limits = np.linspace(fastest_s(first), table.baseline, given.budgets + 2)[1:-1]
        chosen = [
            search(f"latency <= {1e3 * float(limit)!r} ms").unit_allocation for limit in limits
        ]
        uniform = {str(scheme): a for scheme, a in first.problem.uniform().items()}
        target = get_target("onnxruntime")
        model, batches = minilm.make_model(), minilm.calibration_batches()[:1]
        network = target.export(model, first.graph, sample)
        of = Bench(target, network, first.graph, sample, batches, table.cells, table)
        measured = of.measured([*chosen, *uniform.values()], given.seconds)
        lost = [held_out_loss(first, a) for a in (*chosen, *uniform.values())]
    times, fp32 = (np.array([pair[i].median_s for pair in measured]) for i in (0, 1))
    low = np.array([pair[0].low_s for pair in measured])
    print(
        f"{'budget':>8} {'predicted':>9} {'95 %':>6} {'measured':>8} {'±':>4}  us   speed-up   "
        "1 - cosine   best uniform that keeps it"
    )
    kept = within = better = 0
    for i, (limit, allocation) in enumerate(zip(limits, chosen, strict=True)):
        choice = allocation.choice(table.cells)
        keeping = [k for k in range(len(chosen), len(times)) if times[k] <= limit]
        best = min(keeping, key=lambda k: lost[k], default=None)
        other = "none" if best is None else f"{[*uniform][best - len(chosen)]} {lost[best]:.5f}"
        kept += times[i] <= limit
        within += low[i] <= limit
        better += best is None or lost[i] <= lost[best]
        print(
            f"{1e6 * limit:8.0f} {1e6 * table.total(choice):9.0f} "
            f"{1e6 * quantile(table, choice, RISK):6.0f} {1e6 * times[i]:8.0f} "
            f"{1e6 * (times[i] - low[i]):4.0f}      {fp32[i] / times[i]:8.2f} {lost[i]:12.5f}   "
            f"{other}"
        )
    count = len(limits)
    print(
        f"kept: {kept} of {count}, within the error of the measurement {within}; at least as "
        f"accurate as the best uniform scheme that keeps it: {better} of {count}"
    )


if __name__ == "__main__":
    main()
