"""How long does it take to fake-quantize a network in every common format, on one thread?

All weights of the 36 linear layers of MiniLM (10.6 M) in 20 schemes, and with --all those of its
embeddings too (22.6 M); the median over rounds, each round every format once in a new random order.
Beside it the mean squared error of each format relative to that of its weights, and the exact mean
bits of what is stored.
Run: python -m benchmarks.formats [--rounds 5] [--all]
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections import defaultdict

import torch
from torch import nn

from mpq.core.formats import parse_format
from mpq.nn.quantizers import WeightQuantizer

COMMON = (
    "int8",
    "int8t",
    "int8g64",
    "int6",
    "int5g64",
    "int4",
    "int4g128",
    "int4g64a",
    "int3g64",
    "int2g32a",
    "fp8_e4m3",
    "fp8_e5m2",
    "fp6_e3m2",
    "fp4_e2m1g64",
    "mxfp8_e4m3",
    "mxfp6_e2m3",
    "mxfp4",
    "nvfp4",
    "nf4g64",
    "ternary",
)
LIMIT_S = 2.0


def weights(of_all: bool) -> dict[str, torch.Tensor]:
    """Return the weights of MiniLM's linear layers, and of its embeddings if asked."""
    from examples import minilm

    kinds = (nn.Linear, nn.Embedding) if of_all else (nn.Linear,)
    named = minilm.make_model().named_modules()
    return {n: m.weight.detach() for n, m in named if isinstance(m, kinds)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--all", action="store_true", help="embeddings, too")
    parser.add_argument("--formats", nargs="*", default=COMMON)
    options = parser.parse_args()
    torch.set_num_threads(1)
    network, quantizer = weights(options.all), WeightQuantizer()
    elements = sum(weight.numel() for weight in network.values())
    spent: dict[str, list[float]] = defaultdict(list)
    errors: dict[str, float] = {}
    order = list(options.formats)
    for number in range(options.rounds + 1):  # the first one warms up
        random.Random(number).shuffle(order)
        for text in order:
            fmt, seconds, off = parse_format(text), 0.0, 0.0
            for name, weight in network.items():
                start = time.perf_counter()
                back = quantizer.fake_quantize(name, weight, fmt)
                seconds += time.perf_counter() - start
                if not number:
                    off += float((back - weight).square().sum())
            if number:
                spent[text].append(seconds)
            else:
                errors[text] = off
    total = sum(float(weight.square().sum()) for weight in network.values())
    print(f"{len(network)} weights, {elements / 1e6:.1f} M numbers, one thread")
    print(f"{'format':14}{'bits':>8}{'error':>11}{'ms':>9}{'ns each':>9}")
    for text in options.formats:
        fmt = parse_format(text)
        stored = sum(fmt.storage_bits(tuple(weight.shape)) for weight in network.values())
        median = statistics.median(spent[text])
        print(
            f"{text:14}{stored / elements:8.3f}{errors[text] / total:11.2e}"
            f"{1e3 * median:9.1f}{1e9 * median / elements:9.2f}"
        )
    rounds = [sum(spent[text][n] for text in options.formats) for n in range(options.rounds)]
    whole = statistics.median(rounds)
    print(
        f"all {len(options.formats)}: {whole:.2f} s, median of {options.rounds} rounds "
        f"({min(rounds):.2f} to {max(rounds):.2f}); limit {LIMIT_S:g} s"
    )
    return 0 if whole < LIMIT_S else 1


if __name__ == "__main__":
    sys.exit(main())
