"""What the baseline solvers take, and how far from the best the greedy one ends.

Heavy-tailed synthetic instances with byte costs, processor time of one thread; tight: 5 % of the
range.
Run: python -m benchmarks.solver_sections.baselines
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from typing import TypeVar

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from benchmarks.solvers import SCHEMES, instance
from mpq.core.errors import InvalidInputError
from mpq.core.problem import Problem
from solvers.auto import Auto
from solvers.brute_force import BruteForce
from solvers.dp import Dp, pareto
from solvers.greedy import Greedy
from solvers.ilp import Ilp

Found = TypeVar("Found")


def problem(units: int, choices: int, *, tight: float, budgets: int, seed: int = 0) -> Problem:
    """Return an instance of fewer schemes under the first one or two of its budgets."""
    whole = instance(units, tight=tight, seed=seed)
    kept = np.round(np.linspace(0, len(SCHEMES) - 1, choices)).astype(int)
    cells = whole.cells
    allowed = {unit: [cells.schemes[0][k] for k in kept] for unit in cells.units}
    fewer = whole.pinned(allowed)
    return fewer.with_budgets(fewer.budgets[:budgets])


def timed(work: Callable[[], Found]) -> tuple[Found, float]:
    start = time.process_time()
    found = work()
    return found, time.process_time() - start


def frontiers() -> None:
    print("dp, the whole frontier of bytes and score")
    print("    units  points  most states  seconds")
    for units, choices in ((50, 4), (200, 4), (100, 8), (200, 8)):
        for seed in (0, 1):
            free = problem(units, choices, tight=0.3, budgets=0, seed=seed)
            try:
                found, spent = timed(lambda: pareto(free, "memory"))  # noqa: B023
            except InvalidInputError as error:
                print(f"{units:5d} x {choices}  refused: {error}")
                continue
            most = max(found.num_states)
            print(f"{units:5d} x {choices} {len(found.costs):7d} {most:12d} {spent:8.2f}")


def optima() -> None:
    print("\ndp, the optimum                    greedy            cbc      brute_force")
    print("    units budgets tight  seconds   seconds   excess  seconds  seconds")
    cases = [(8, 7, 2, 0.3), (50, 4, 1, 0.3), (50, 4, 2, 0.3), (200, 8, 1, 0.3)]
    cases += [(200, 8, 1, 0.05), (200, 8, 2, 0.3), (5000, 8, 1, 0.3), (5000, 8, 2, 0.3)]
    for units, choices, budgets, tight in cases:
        given = problem(units, choices, tight=tight, budgets=budgets)
        best = Auto(few_cells=0).solve(given).score
        texts = [f"{'-':>8}"] * 3
        if units <= 200:
            texts[0] = timed_or_refused(lambda: Dp().solve(given))  # noqa: B023
            texts[1] = wall(lambda: Ilp(name="cbc", library="cbc").solve(given))  # noqa: B023
        if units <= 8:
            texts[2] = timed_or_refused(lambda: BruteForce().solve(given))  # noqa: B023
        greedy, spent = timed(lambda: Greedy().solve(given))  # noqa: B023
        print(
            f"{units:5d} x {choices} {budgets:7d} {tight:5.2f} {texts[0]} {spent:9.3f} "
            f"{100 * (greedy.score / best - 1):7.1f}% {texts[1]} {texts[2]}",
            flush=True,
        )


def timed_or_refused(work: Callable[[], object]) -> str:
    try:
        return f"{timed(work)[1]:8.3f}"
    except InvalidInputError:
        return f"{'refused':>8}"


def wall(work: Callable[[], object]) -> str:
    """Return the seconds on the clock: CBC is a process of its own."""
    start = time.perf_counter()
    work()
    return f"{time.perf_counter() - start:8.3f}"


def main() -> None:
    frontiers()
    optima()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kilobytes on Linux
    print(f"\npeak memory: {peak:.2f} GB")


if __name__ == "__main__":
    main()
