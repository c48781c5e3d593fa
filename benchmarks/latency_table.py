"""Do two independent measurements of a latency table agree within their stated confidence?

Measures the linear layers of a small sentence encoder (six layers, width 384, 64 tokens) in all
default schemes, twice, each time in a process of its own, and prints the seconds that each took
(and a second use of the known times), every cell of both, and the share of cells that agree:
their 95 % intervals overlap, or the difference is within the root of the sum of the squared
half-widths.

    python -m benchmarks.latency_table [--rows 64] [--budget 60] [--pause 0]
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from dataclasses import asdict

from hw_cost_models.latency import MeasuredLatency
from hw_cost_models.measured.capability import default_schemes
from mpq.core.latency import KernelLatency
from mpq.core.layers import Layer, LayerGraph, Unit
from mpq.core.tables import Cells

BLOCK = ((384, 384), (384, 384), (384, 384), (384, 384), (384, 1536), (1536, 384))
NUM_BLOCKS = 6


def encoder(rows: int) -> LayerGraph:
    layers = tuple(
        Layer(
            name=f"linear{i}",
            kind="linear",
            weight_shape=(outputs, inputs),
            weight_id=f"linear{i}.weight",
            weight_bytes=4 * inputs * outputs,
            input_shape=(1, rows, inputs),
            output_shape=(1, rows, outputs),
            macs=rows * inputs * outputs,
            calls=1,
            order=i,
        )
        for i, (inputs, outputs) in enumerate(BLOCK * NUM_BLOCKS)
    )
    units = tuple(Unit(name=layer.name, layers=(layer.name,)) for layer in layers)
    return LayerGraph(layers=layers, units=units, unsearched=(), sample=f"1 x {rows} tokens")


def choices(graph: LayerGraph) -> Cells:
    schemes = tuple(default_schemes(layer) for layer in graph.layers)  # a unit is one layer here
    return Cells(units=tuple(unit.name for unit in graph.units), schemes=schemes)


def measure(rows: int, budget_s: float) -> None:
    start = time.monotonic()
    model = MeasuredLatency(budget_s=budget_s)
    graph = encoder(rows)
    model.table(graph, choices(graph))
    seconds = time.monotonic() - start
    start = time.monotonic()
    MeasuredLatency(budget_s=budget_s, known=model.latencies).table(graph, choices(graph))
    again = time.monotonic() - start
    latencies = [asdict(latency) for latency in model.latencies.values()]
    json.dump({"seconds": seconds, "again": again, "latencies": latencies}, sys.stdout)


def measured_elsewhere(rows: int, budget_s: float) -> tuple[float, float, dict[str, KernelLatency]]:
    arguments = ["--rows", str(rows), "--budget", str(budget_s), "--measure"]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=True
    )
    answer = json.loads(done.stdout)
    found = {}
    for record in answer["latencies"]:
        case = record["case"]
        shape = case["shape"].partition(" in a network")[0]
        found[f"{shape}  {case['kernel']}"] = KernelLatency(**record)
    return answer["seconds"], answer["again"], found


def agree(a: KernelLatency, b: KernelLatency) -> bool:
    half_a, half_b = (a.high_s - a.low_s) / 2, (b.high_s - b.low_s) / 2
    overlap = a.low_s <= b.high_s and b.low_s <= a.high_s
    return overlap or abs(a.median_s - b.median_s) <= math.hypot(half_a, half_b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for each table")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between the two")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(given.rows, given.budget)
        return
    first_s, again_s, first = measured_elsewhere(given.rows, given.budget)
    time.sleep(given.pause)
    second_s, _, second = measured_elsewhere(given.rows, given.budget)
    print(f"{'':78} {'first us':>9} {'±%':>5} {'second us':>9} {'±%':>5} {'diff %':>6}")
    agreed = 0
    for name, a in first.items():
        b = second[name]
        ok = agree(a, b)
        agreed += ok
        half = [50 * (x.high_s - x.low_s) / x.median_s for x in (a, b)]
        print(
            f"{name:78} {a.median_s * 1e6:9.1f} {half[0]:5.1f} {b.median_s * 1e6:9.1f} "
            f"{half[1]:5.1f} {100 * (b.median_s / a.median_s - 1):6.1f} "
            f"{'' if ok else 'DISAGREE'}{' noisy' if a.noisy or b.noisy else ''}"
        )
    rounds = next(iter(first.values())).rounds, next(iter(second.values())).rounds
    print(f"seconds: {first_s:.1f} and {second_s:.1f}; rounds: {rounds[0]} and {rounds[1]}")
    print(f"seconds of a second use, from known times: {again_s:.3f}")
    print(f"agree within stated confidence: {agreed} of {len(first)}")
    sys.exit(agreed < 0.9 * len(first))


if __name__ == "__main__":
    main()
