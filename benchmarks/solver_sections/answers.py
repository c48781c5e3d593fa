"""How long the questions about an answer take: 500 units of 8 schemes, two budgets.

Instances of benchmarks/solvers.py, one thread, warm. Proven: share of the four neighbours of each
budget that are proven. Infeasible: both limits at 30 % of what they were.
Run: python -m benchmarks.solver_sections.answers [units]
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from benchmarks.solvers import instance
from mpq.core.problem import Problem
from solvers.auto import Auto
from solvers.infeasible import explain
from solvers.least_cost import least_cost
from solvers.quick import minimise_quickly
from solvers.several import apart, together
from solvers.shadow import shadow_prices

SEEDS = 20


def timed(question: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    answer = question()
    return time.perf_counter() - start, answer


def ask(problem: Problem, spent: dict[str, list[float]], proven: list[bool]) -> None:
    solution = Auto().solve(problem)
    score = 1.1 * solution.score
    tight = problem.with_budgets([replace(b, limit=0.3 * b.limit) for b in problem.budgets])
    halves = {"one": problem, "other": problem}
    limits = [replace(b, limit=2 * b.limit) for b in problem.budgets]
    questions: dict[str, Callable[[], object]] = {
        "solve": lambda: Auto().solve(problem),
        "shadow prices": lambda: shadow_prices(problem, solution),
        "least memory": lambda: least_cost(problem, "memory", score),
        "least weighted sum": lambda: least_cost(problem, {"memory": 1.0, "latency": 2e9}, score),
        "why infeasible": lambda: explain(tight, time_limit_s=60, by=minimise_quickly),
        "two models": lambda: apart(Auto().solve(together(halves, limits)).allocation),
    }
    for name, question in questions.items():
        seconds, answer = timed(question)
        spent.setdefault(name, []).append(seconds)
        if name == "shadow prices":
            for budget in answer.budgets:
                parts = (budget.without, budget.raised, budget.better, budget.cheaper)
                proven += [part.proven for part in parts]


def main() -> None:
    units = int(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1].isdigit() else 500
    ask(instance(50, tight=0.3, seed=0), {}, [])  # compiles where that was never done
    for tight in (0.3, 0.05):
        spent: dict[str, list[float]] = {}
        proven: list[bool] = []
        for seed in range(SEEDS):
            ask(instance(units, tight=tight, seed=seed), spent, proven)
        print(f"{units} x 8, limits at {tight:g} of their range, {SEEDS} instances")
        for name, seconds in spent.items():
            median, most = 1e3 * np.median(seconds), 1e3 * max(seconds)
            print(f"  {name:20s} median {median:8.1f} ms   max {most:8.1f} ms")
        print(f"  of shadow prices proven: {np.mean(proven):.0%}\n", flush=True)


if __name__ == "__main__":
    main()
