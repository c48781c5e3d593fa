"""Is a search over many kinds of number formats at least as good as the best one over one kind?

MiniLM at a budget of mean bits: the search over integers, minifloats, MX blocks, NF4 and ternary
weights, each rounded to nearest and by GPTQ, against the search within each of them alone (those
whose narrowest format fits), same data, same solver, same refinement. Judged by the mean cosine to
the unquantized embeddings on held-out sentences.
Run: python -m benchmarks.families [--bits 3.0] [--clip mse] [--seeds 0]
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

import mpq
from examples import minilm
from mpq.format_shares import format_shares

FAMILIES = {
    "int": ("int2g32a", "int3", "int3g64", "int4", "int4g64", "int5", "int6", "int8"),
    "fp": ("fp3_e1m1", "fp3_e1m1g64", "fp4_e2m1", "fp4_e2m1g64", "fp5_e2m2", "fp6_e2m3"),
    "mx": ("mxfp4", "mxfp6_e2m3", "mxfp8_e4m3"),
    "nf": ("nf4", "nf4g64"),
    "ternary": ("ternary", "ternaryg64"),
}


def searched(
    schemes: list[str], options: argparse.Namespace, seed: int
) -> tuple[mpq.SearchResult, float]:
    """Return the result of a search over some schemes, and its seconds."""
    started = time.perf_counter()
    result = mpq.search(
        minilm.make_model(),
        minilm.calibration_batches(),
        held_out=minilm.held_out_batches(),
        budgets=[f"memory <= {options.bits:g} bpw"],
        schemes=schemes,
        clip=options.clip,
        executor="serial",
        seed=seed,
        storage=options.storage,
        name=f"families {len(schemes)} schemes",
    )
    return result, time.perf_counter() - started


def held_out(result: mpq.SearchResult) -> tuple[float, float]:
    """Return the held-out mean cosine of the chosen network and its standard error."""
    of_chosen = [e for e in result.evaluation if e.split == "held_out" and e.candidate == "chosen"]
    return 1 - of_chosen[0].mean, of_chosen[0].stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--clip", default="mse", choices=("minmax", "mse"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--storage", default="sqlite://")
    options = parser.parse_args()
    torch.set_num_threads(2)
    every = [f"{text}{at}" for texts in FAMILIES.values() for at in ("", "@gptq") for text in texts]
    worse = 0
    for seed in options.seeds:
        cosines = {}
        for family, texts in FAMILIES.items():
            for at in ("", "@gptq"):
                name = f"{family}{at}"
                try:
                    result, seconds = searched([f"{text}{at}" for text in texts], options, seed)
                except mpq.InfeasibleError:
                    print(f"seed {seed}  {name:14} does not fit {options.bits:g} bits", flush=True)
                    continue
                cosines[name], error = held_out(result)
                print(
                    f"seed {seed}  {name:14} held-out cosine {cosines[name]:.4f} ± {error:.4f} "
                    f"({seconds:.0f} s)",
                    flush=True,
                )
        result, seconds = searched(every, options, seed)
        mixed, error = held_out(result)
        best = max(cosines, key=lambda name: cosines[name])
        print(
            f"seed {seed}  {'all of them':14} held-out cosine {mixed:.4f} ± {error:.4f} "
            f"({seconds:.0f} s); best single: {best} {cosines[best]:.4f}"
        )
        for one in format_shares(result.graph, result.unit_allocation):
            print(f"    {one.told()}")
        worse += mixed < cosines[best]
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
