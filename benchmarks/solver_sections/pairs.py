"""How good, how tightly bounded and how fast is solver "pairs"?

First its score over the best of all, found by trying every choice, where units of an example drawn
by seed may take four schemes and all others keep int8; then the proven gap on the whole examples;
then the time for 200 units, 8 schemes, 512 samples and 2 probes, and for the examples, warm.
Run: python -m benchmarks.solver_sections.pairs
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from mpq.core.formats import parse_scheme
from mpq.core.problem import Budget, Problem, Solution
from solvers.pairs import Pairs
from tests.oracles import fast_pairwise_brute_force
from tests.test_solvers import drawn, with_responses

EXAMPLES = ("digits_resnet20", "digits_vit")
SCHEMES = ["int2", "int3", "int4", "int5", "int6", "int7", "int8"]
FOUR = tuple(map(parse_scheme, ("int2", "int3", "int4", "int6")))
FREE = 10  # units
INT8 = parse_scheme("int8")
SMALL_SEEDS, SPEED_SEEDS = 5, 20


def responses_of_example(name: str) -> Problem:
    """Score an example as a search does and return its problem."""
    import mpq

    with tempfile.TemporaryDirectory() as folder, mpq.open_store(str(Path(folder) / "r.db")) as s:
        result = mpq.search(
            f"examples.{name}:make_model",
            f"examples.{name}:calibration_batches",
            budgets=["memory <= uniform int3"],
            schemes=SCHEMES,
            groups="none",
            refine=0,
            executor="serial",
            storage=s,
        )
        return s.problem(result.run_id)


def limited(problem: Problem, share: float) -> Problem:
    """Return the problem with the memory at a share of the way from its least to its most."""
    table = problem.costs["memory"]
    begins = problem.cells.offsets[:-1]
    low = float(np.minimum.reduceat(table.values, begins).sum())
    high = float(np.maximum.reduceat(table.values, begins).sum())
    return problem.with_budgets([Budget("memory", table.fixed + low + share * (high - low))])


def part(problem: Problem, seed: int) -> Problem:
    """Return the problem in which units drawn by seed may take four schemes, others int8."""
    units = problem.cells.units
    free = set(np.random.default_rng(seed).choice(len(units), FREE, replace=False).tolist())
    allowed = {u: FOUR if n in free else (INT8,) for n, u in enumerate(units)}
    return problem.pinned(allowed)


def timed(problem: Problem, **options: int | bool) -> tuple[Solution, float]:
    """Solve and return the milliseconds of one processor too, whatever else it is busy with."""
    start = time.process_time()
    solution = Pairs(**options).solve(problem)  # type: ignore[arg-type]
    return solution, 1e3 * (time.process_time() - start)


def ratios(name: str, problem: Problem) -> None:
    for share in (0.1, 0.25, 0.5):
        found = []
        for seed in range(SMALL_SEEDS):
            small = limited(part(problem, seed), share)
            best = fast_pairwise_brute_force(small)
            assert best is not None
            found.append(timed(small, seed=seed, prove=False)[0].score / best)
        print(
            f"{name:16} {FREE:2} x 4 {share:6.2f} {SMALL_SEEDS:6} {np.median(found):11.6f} "
            f"{max(found):11.6f}",
            flush=True,
        )


def gaps(name: str, problem: Problem) -> None:
    for share in (0.05, 0.1, 0.25, 0.4):
        whole = limited(problem, share)
        plain = timed(whole, prove=False)[1]
        solution, proven = timed(whole)
        size = f"{len(whole.cells.units)} x {len(SCHEMES)}"
        print(
            f"{name:16} {size:8} {share:6.2f} {solution.score:10.3g} {solution.gap:8.3f} "
            f"{plain:10.0f} {proven:11.0f}",
            flush=True,
        )


def speed() -> None:
    problems = [
        with_responses(drawn(200, 8, seed=seed), samples=512, seed=seed)
        for seed in range(SPEED_SEEDS)
    ]
    timed(problems[0])  # compiles where that was never done
    plain = [timed(problem, prove=False)[1] for problem in problems]
    proven = [timed(problem) for problem in problems]
    print(
        f"{'synthetic':16} {'200 x 8':8} {0.3:6.2f} {'':10} "
        f"{np.median([s.gap for s, _ in proven]):8.3f} {np.median(plain):10.0f} "
        f"{np.median([ms for _, ms in proven]):11.0f}   (medians of {SPEED_SEEDS} seeds)",
        flush=True,
    )


def main() -> None:
    problems = {name: responses_of_example(name) for name in EXAMPLES}
    print("example          size   memory  seeds  score/best       worst")
    for name, problem in problems.items():
        ratios(name, problem)
    print("\nexample          size     memory      score      gap  ms, plain  with bound")
    for name, problem in problems.items():
        gaps(name, problem)
    speed()


if __name__ == "__main__":
    main()
