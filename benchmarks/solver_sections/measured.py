"""What searching by measurements gains over choosing by the tables, and what it takes.

digits ViT, int2 to int8 weights per output channel, the bytes of int3: each solver's answer on the
calibration data, which it searched by, and on held-out data. Scores are shared.
Run: python -m benchmarks.solver_sections.measured [trials]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import mpq
from mpq.core.evaluation import CHOSEN

SCHEMES = ["int2", "int3", "int4", "int5", "int6", "int7", "int8"]
SEEDS = 3


def search(solver: str, trials: int, seed: int, refine: int, storage: Path) -> tuple[float, ...]:
    """Return the calibration and held-out KL of what a search chose, and its seconds."""
    started = time.perf_counter()
    with mpq.open_store(str(storage)) as store:
        result = mpq.search(
            "examples.digits_vit:make_model",
            "examples.digits_vit:calibration_batches",
            held_out="examples.digits_vit:held_out_batches",
            budgets=["memory <= uniform int3"],
            schemes=SCHEMES,
            groups="none",
            solver=solver,
            num_trials=trials,
            refine=refine,
            seed=seed,
            executor="serial",
            storage=store,
        )
    chosen = {e.split: e.mean for e in result.evaluation if e.candidate == CHOSEN}
    return chosen["calibration"], chosen["held_out"], time.perf_counter() - started


def main() -> None:
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    print(f"digits ViT at the bytes of int3, {trials} trials, means of {SEEDS} seeds")
    print("solver                 calibration KL          held-out KL  seconds")
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(SEEDS):  # so that no row pays for the scores
            search("ilp", trials, seed, 0, Path(folder) / f"{seed}.db")
        for name, solver, refine in (
            ("additive (ilp)", "ilp", 0),
            ("pairs", "pairs", 0),
            ("auto, refine=4", "auto", 4),
            ("evolution", "evolution", 0),
            ("optuna (TPE)", "optuna", 0),
            ("nsga2", "nsga2", 0),
        ):
            found = [
                search(solver, trials, seed, refine, Path(folder) / f"{seed}.db")
                for seed in range(SEEDS)
            ]
            of_seeds = np.array(found)
            mean, spread = of_seeds.mean(axis=0), of_seeds.std(axis=0, ddof=1)
            print(
                f"{name:20} {mean[0]:.5f} ± {spread[0]:.5f}    {mean[1]:.5f} ± {spread[1]:.5f} "
                f"{mean[2]:8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
