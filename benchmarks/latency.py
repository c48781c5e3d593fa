"""Does the latency table tell how long the deployed network takes?

Random mixes of the formats that this machine's kernels run, of MiniLM at 16 and 128 tokens and of
two ResNets: the seconds that the table predicts beside those of the really quantized network in
ONNX Runtime or torch (one thread, processor time, taking turns with the fp32 network). The mixes
are others than those that corrected the table.

    python -m benchmarks.latency [--backend torch_cpu] [--mixes 15] [--seconds 60] [--only resnet20]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import nn

from examples import digits_resnet20, minilm
from hw_cost_models import LOCAL, get_kernels
from hw_cost_models.latency import MeasuredLatency
from mpq.core.latency import KernelLatency
from mpq.core.layers import LayerGraph
from mpq.core.problem import Allocation
from mpq.core.tables import Cells, CostTable
from mpq.deploy.target import TARGETS, Exported, Loaded, Target, get_target
from mpq.deploy.timing import network_case, time_networks
from mpq.deploy.whole import WholeNetwork, random_mixes, with_whole
from mpq.nn.calibrate import with_input_ranges
from mpq.nn.graph import build_graph
from mpq.nn.quantizers import WeightQuantizer
from mpq.referee.ranks import spearman
from mpq.store.store import Store, open_store


class Block(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.one_norm = nn.BatchNorm2d(outputs)
        self.two = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.two_norm = nn.BatchNorm2d(outputs)
        short = (nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if inputs == outputs else nn.Sequential(*short)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum, (samples, outputs, height, width)."""
        y = torch.relu(self.one_norm(self.one(x)))
        return torch.relu(self.two_norm(self.two(y)) + self.shortcut(x))


def resnet18(classes: int = 1000) -> nn.Module:
    """Return a network of the shape of ResNet-18, with random weights."""
    torch.manual_seed(0)
    blocks = [
        Block(before if first else width, width, 2 if first and width > 64 else 1)
        for before, width in ((64, 64), (64, 128), (128, 256), (256, 512))
        for first in (True, False)
    ]
    stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))
    return nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *blocks, *head).eval()


TOGETHER = 5  # networks that take turns, which bounds their memory


@dataclass(frozen=True)
class Bench:
    """A network whose latency is known cell by cell."""

    target: Target
    network: Exported
    graph: LayerGraph
    sample: Any
    calibration: Sequence[Any]
    cells: Cells
    table: CostTable

    def predicted(self, allocation: Allocation) -> float:
        """Return the seconds that the table says."""
        return self.table.total(allocation.choice(self.cells))

    def measured(
        self, allocations: Sequence[Allocation], seconds: float
    ) -> list[tuple[KernelLatency, KernelLatency]]:
        """Return the time of each network and that of the fp32 one beside it."""
        found = []
        units = self.graph.units
        for start in range(0, len(allocations), TOGETHER):
            networks: list[Loaded] = [self.network.fp32]
            for allocation in allocations[start : start + TOGETHER]:
                schemes = {layer: allocation[unit.name] for unit in units for layer in unit.layers}
                mixed = self.network.mixed(schemes, WeightQuantizer(), self.calibration)
                networks.append(mixed)
            fp32, *mixes = time_networks(
                self.target,
                {network_case(self.target, str(i), ""): one for i, one in enumerate(networks)},
                self.sample,
                [0] * len(networks),
                seconds=seconds * len(networks) / (len(allocations) + 1),
            )
            found += [(one, fp32) for one in mixes]
        return found


def bench(
    backend: str,
    model: nn.Module,
    sample: Any,
    calibration: Sequence[Any],
    seconds: float,
    store: Store,
) -> Bench:
    graph = with_input_ranges(model, build_graph(model, sample), calibration)
    layers, hardware = graph.by_name, f"{LOCAL}:{backend}"
    kernels, target = get_kernels(hardware), get_target(backend)
    cells = Cells(
        units=tuple(unit.name for unit in graph.units),
        schemes=tuple(tuple(kernels.schemes(layers[unit.layers[0]])) for unit in graph.units),
    )
    latency = MeasuredLatency(hardware=hardware, budget_s=seconds)
    table = latency.table(graph, cells)
    network = WholeNetwork(
        target=target,
        model=model,
        graph=graph,
        sample=sample,
        calibration=calibration,
        store=store,
        seconds=seconds / 4,
    )
    table = with_whole(table, latency.parts(graph, cells), network)
    print(f"  {table.provenance.rpartition('fp32, ')[2]}; {len(table.joint or ())} joint terms")
    return Bench(target, network.exported, graph, sample, calibration, cells, table)


def print_mixes(of: Bench, count: int, seconds: float) -> None:
    mixes = random_mixes(of.cells, count, np.random.default_rng(1))
    rows = [
        (of.predicted(mix), one, fp32)
        for mix, (one, fp32) in zip(mixes, of.measured(mixes, seconds), strict=True)
    ]
    print(f"  {'predicted us':>12} {'measured us':>12} {'±%':>5} {'error %':>8} {'speed-up':>8}")
    for predicted, one, fp32 in sorted(rows, key=lambda row: row[1].median_s):
        half = 50 * (one.high_s - one.low_s) / one.median_s
        print(
            f"  {predicted * 1e6:12.0f} {one.median_s * 1e6:12.0f} {half:5.1f} "
            f"{100 * (predicted / one.median_s - 1):8.1f} {fp32.median_s / one.median_s:8.2f}"
        )
    said, took = (np.array(v) for v in ([r[0] for r in rows], [r[1].median_s for r in rows]))
    errors = 100 * np.abs(said / took - 1)
    rank = spearman([(said, took)])
    fp32_s = np.median([row[2].median_s for row in rows])
    print(
        f"  fp32: table {of.table.baseline * 1e6:.0f} us, measured {fp32_s * 1e6:.0f} us; error "
        f"median {np.median(errors):.1f} %, max {errors.max():.1f} %; "
        f"Spearman {'-' if rank is None else f'{rank.value:.3f} ± {rank.stderr:.3f}'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=sorted(TARGETS), default="onnxruntime")
    parser.add_argument("--mixes", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60.0, help="of a table or the mixes")
    parser.add_argument("--only", help="a part of a network's name")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    words, images = minilm.calibration_batches(), digits_resnet20.calibration_batches()
    long = {name: values.repeat(1, 3)[:1, :128] for name, values in words[0].items()}
    short = {name: values[:1, :16] for name, values in words[0].items()}
    photos = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    cases = {
        "minilm, 16 tokens": (minilm.make_model, short, words),
        "minilm, 128 tokens": (minilm.make_model, long, words),
        "digits_resnet20": (digits_resnet20.make_model, images[0][0][:1], images),
        "resnet18, 112 x 112": (resnet18, photos[:1], [photos]),
    }
    with tempfile.TemporaryDirectory() as folder, open_store(Path(folder) / "times.db") as store:
        for name, (make_model, sample, calibration) in cases.items():
            if given.only and given.only not in name:
                continue
            print(f"{name}, {given.backend}: {given.mixes} random mixes")
            of = bench(given.backend, make_model(), sample, calibration[:2], given.seconds, store)
            print_mixes(of, given.mixes, given.seconds)


if __name__ == "__main__":
    main()
