"""What is real calibration data worth beside synthetic data?

Searches digits_resnet20 at 3.0 and 2.5 bits a weight (scales included, ranges from the largest
magnitude) with real images, ZeroQ's, Genie's and Gaussian noise, as many samples of each; the
chosen network is judged on the 719 test images.
Run: python -m benchmarks.data [--samples 64] [--seeds 1] [--bits 3.0 2.5] [--sources real genie]
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import mpq
from mpq.core.evaluation import CHOSEN
from mpq.core.synthetic import Synthetic
from mpq.nn.synthetic import synthesise

SCHEMES = ["int2", "int3", "int4", "int5", "int6", "int7", "int8"]
SOURCES = ("real", "genie", "zeroq", "zeroq, whole batches", "noise")


def batches_of(source: str, samples: int, seed: int) -> list[Any]:
    """Return calibration batches of 32 images."""
    from examples import digits_data, digits_resnet20

    if source == "real":
        images = digits_data.load_split().train_images
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        return list(images[order[:samples]].split(32))
    if source == "noise":
        generator = torch.Generator().manual_seed(seed)
        return list(torch.randn(samples, 1, 16, 16, generator=generator).split(32))
    name, _, whole = source.partition(", ")
    text = f"{name}(samples={samples}, seed={seed}{', per_sample=0' if whole else ''})"
    shape = torch.zeros(1, 1, 16, 16)
    made = synthesise(Synthetic.parse(text), digits_resnet20.make_model(), shape)
    return list(made.batches)


def compare(source: str, samples: int, seed: int, bits: list[float]) -> list[str]:
    """Search with one source of data and return a row for each budget."""
    from examples import digits_resnet20

    started = time.perf_counter()
    batches = batches_of(source, samples, seed)
    seconds = time.perf_counter() - started
    rows = []
    with mpq.open_store(":memory:") as store:
        for budget in bits:
            result = mpq.search(
                digits_resnet20.make_model(),
                batches,
                held_out=digits_resnet20.held_out_batches(),
                evaluate=digits_resnet20.evaluate,
                budgets=[f"memory <= {budget} bpw"],
                schemes=SCHEMES,
                clip="minmax",
                executor="serial",
                seed=seed,
                storage=store,
            )
            found = {(e.candidate, e.split): e for e in result.evaluation}
            chosen, seen = found[CHOSEN, "held_out"], found[CHOSEN, "calibration"]
            rows.append(
                f"{budget:4.1f} {source:21} {seed:4} {seconds:7.1f} s {seen.mean:11.4f}  "
                f"{chosen.mean:8.4f} ± {chosen.stderr:.4f} {chosen.metrics['cross_entropy']:14.4f} "
                f"{chosen.metrics['accuracy']:9.4f}"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--bits", type=float, nargs="+", default=[3.0, 2.5])
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{given.samples} samples of each; KL from the unquantized network")
    print(
        "bits data                  seed  to make   KL on it    KL on test images  "
        "cross-entropy  accuracy"
    )
    for source in given.sources:
        for seed in range(given.seeds):
            print("\n".join(compare(source, given.samples, seed, given.bits)), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
