"""How fast and how exact solver "auto" is, next to PuLP with CBC, and its frontiers.

Heavy-tailed synthetic instances, two budgets, gap 1e-4, warm, one thread; tight: 5 % of range.
Times are processor time, CBC's own process included: on an idle machine that of the clock.
Then what pairs, error bars, questions about an answer and the other solvers take: each of
benchmarks/solver_sections also runs alone (python -m benchmarks.solver_sections.pairs); `measured`,
which measures for a quarter of an hour, only so.
Run: python -m benchmarks.solvers [units ...]; with units these sizes alone.
"""

from __future__ import annotations

import importlib
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from mpq.core.formats import parse_scheme
from mpq.core.problem import Budget, Problem
from mpq.core.tables import Cells, CostTable, SensitivityTable
from solvers.auto import Auto

SCHEMES = ("int2", "int3", "int4", "int5", "int6", "int7", "int8", "bf16")
SEEDS = {500: 20, 5000: 20, 1_000_000: 3}
SECTIONS = ("pairs", "robust", "answers", "baselines")
GRID = (22, 22)  # of limits, of which some 50 to 60 near both ends cannot be met


def spent_s() -> float:
    """Return the processor time of this process and of those it started."""
    mine, others = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return mine.ru_utime + mine.ru_stime + others.ru_utime + others.ru_stime


def instance(units: int, *, tight: float, seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    shape = (units, len(SCHEMES))
    size = np.exp(rng.normal(0, 1, (units, 1)))
    loss = np.exp(rng.normal(0, 2, (units, 1))) * np.sort(rng.random(shape))[:, ::-1] ** 2
    memory = np.round(1e6 * size * np.sort(rng.random(shape)))
    latency = 1e-3 * size * rng.random(shape)  # not monotone in bits
    small = np.argmin(memory / memory.mean() + latency / latency.mean(), axis=1)[:, None]
    cells = Cells(
        units=tuple(f"unit{u}" for u in range(units)),
        schemes=(tuple(map(parse_scheme, SCHEMES)),) * units,
    )
    costs = {"memory": ("bytes", memory), "latency": ("s", latency)}
    return Problem(
        sensitivity=SensitivityTable(
            metric="synthetic", cells=cells, values=loss.ravel(), stderr=np.zeros(len(cells))
        ),
        costs={n: CostTable.exact(n, unit, cells, v.ravel()) for n, (unit, v) in costs.items()},
        budgets=tuple(Budget(n, _limit(values, small, tight)) for n, (_, values) in costs.items()),
    )


def _limit(values: np.ndarray, small: np.ndarray, tight: float) -> float:
    low = np.take_along_axis(values, small, 1).sum()
    return float(low + tight * (values.max(axis=1).sum() - low))


def cbc_seconds(problem: Problem) -> float:
    """Solve by PuLP and CBC to the same gap, building the model included."""
    import pulp

    start = spent_s()
    program, offsets = pulp.LpProblem("cbc", pulp.LpMinimize), problem.cells.offsets
    x = [program.add_variable(f"x{i}", 0, 1, pulp.LpInteger) for i in range(len(problem.cells))]
    program += pulp.lpDot(problem.sensitivity.values.tolist(), x)
    for u in range(len(offsets) - 1):
        program += pulp.lpSum(x[offsets[u] : offsets[u + 1]]) == 1
    for budget in problem.budgets:
        row = problem.costs[budget.cost].values / budget.limit
        program += pulp.lpDot(row.tolist(), x) <= 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        program.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=1e-4, timeLimit=60))
    return spent_s() - start


def speed(units: int, tight: float) -> None:
    spent, gaps, ratios = [], [], []
    for seed in range(SEEDS.get(units, 5)):
        problem = instance(units, tight=tight, seed=seed)
        if units > 100_000 and not seed:
            Auto().solve(problem)  # the machine gives out its memory, which takes a second
        start = spent_s()
        solution = Auto().solve(problem)
        spent.append(spent_s() - start)
        gaps.append(solution.gap)
        if units <= 500 and seed < 5:
            ratios.append(cbc_seconds(problem) / spent[-1])
    cbc = f"{np.median(ratios):8.0f}" if ratios else "       -"
    print(
        f"{units:8d} x 8 {tight:6.2f} {len(spent):6d} {1e3 * np.median(spent):10.1f} "
        f"{1e3 * max(spent):10.1f} {max(gaps):10.1e} {cbc}",
        flush=True,
    )


def frontiers(seeds: int = 20) -> None:
    """Print how long it takes to know what every budget would give."""
    from solvers.chain import chain
    from solvers.surface import surface

    spent, points, gaps, slowest = [], [], [], []
    for seed in range(seeds):
        start = spent_s()
        found = surface(instance(500, tight=0.3, seed=seed), points=GRID, gap=1e-3)
        spent.append(spent_s() - start)
        solved = [s for row in found.solutions for s in row if s is not None]
        points.append(len(solved))
        gaps.append(max(s.gap for s in solved))
        slowest.append(max(s.seconds for s in solved))
    print(
        f"memory-latency surface, 500 x 8, {seeds} seeds: {min(points)} to {max(points)} points, "
        f"gap at most {max(gaps):.1e}; median {np.median(spent):.2f} s, max {max(spent):.2f} s; "
        f"slowest point {max(slowest):.2f} s"
    )
    times, steps = [], []
    for seed in range(seeds):
        problem = instance(5000, tight=0.3, seed=seed)
        chain(problem, "memory")
        start = spent_s()
        steps.append(len(chain(problem, "memory")))
        times.append(spent_s() - start)
    print(
        f"complete convex frontier, 5000 x 8, {seeds} seeds: {np.median(steps):.0f} points; median "
        f"{1e3 * np.median(times):.1f} ms, max {1e3 * max(times):.1f} ms"
    )


COLD = """
import time
start = time.process_time()
from benchmarks.solvers import Auto, instance
Auto(few_cells=0).solve(instance(100, tight=0.3, seed=0))
print(time.process_time() - start)
"""


def cold_seconds() -> float:
    """Return what the first solve takes in a new process, imports included."""
    root = Path(__file__).resolve().parents[1]
    found = subprocess.run(
        [sys.executable, "-c", COLD], capture_output=True, text=True, check=True, cwd=root
    )
    return float(found.stdout)


def main() -> None:
    Auto(few_cells=0).solve(instance(50, tight=0.3, seed=0))  # compiles where that was never done
    print(f"first solve in a new process: {cold_seconds():.2f} s\n")
    print("   units   tight  seeds  median ms     max ms    max gap  times CBC")
    for units in [int(float(text)) for text in sys.argv[1:]] or SEEDS:
        for tight in (0.3,) if units > 100_000 else (0.3, 0.05):
            speed(units, tight)
    print()
    frontiers()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kilobytes on Linux
    print(f"\npeak memory: {peak:.2f} GB")
    for name in () if len(sys.argv) > 1 else SECTIONS:
        print(f"\n-- {name}", flush=True)
        importlib.import_module(f"benchmarks.solver_sections.{name}").main()


if __name__ == "__main__":
    main()
