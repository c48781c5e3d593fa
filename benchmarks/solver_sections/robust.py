"""What do answers that hold with error bars cost, and do they hold?

First: how often true latencies keep the budget of an answer at risk 0.95 and of a plain one
(50 units x 8, a latency budget, intervals of 5 to 15 % to each side, 20,000 draws of 20 problems)
when all of each error is common to all cells, as the answer takes it to be, half of its variance,
or none. Then what that care costs: processor time under two budgets, and the score above that of
the plain answer. Last: the processor time of `stability`, warm, on memory and latency that grow
with bits and on two costs at odds, scores with errors of 30 %.
Run: python -m benchmarks.solver_sections.robust
"""

from __future__ import annotations

import os
import time
from dataclasses import replace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from benchmarks.solvers import instance
from mpq.core.problem import Problem, Solution
from mpq.stability import stability, usual_draws
from solvers import solve

RISK = 0.95
DRAWS = 20_000
SEEDS = 20


def measured(problem: Problem, seed: int) -> Problem:
    """Give latencies intervals as a stopwatch does: even in the logarithm."""
    table = problem.costs["latency"]
    width = np.random.default_rng(seed).uniform(0.05, 0.15, len(table.values))
    low, high = table.values * np.exp(-width), table.values * np.exp(width)
    return replace(problem, costs={**problem.costs, "latency": replace(table, low=low, high=high)})


def scored(problem: Problem, error: float) -> Problem:
    """Give scores errors that are a share of them."""
    table = problem.sensitivity
    return replace(problem, sensitivity=replace(table, stderr=error * table.values))


def ordered(problem: Problem) -> Problem:
    """Let latency grow with bits, as memory does."""
    table = problem.costs["latency"]
    values = np.sort(table.values.reshape(len(problem.cells.units), -1), axis=1)
    latency = replace(table, values=values.ravel(), low=values.ravel(), high=values.ravel())
    return replace(problem, costs={**problem.costs, "latency": latency})


def kept(problem: Problem, solution: Solution, common: float, seed: int) -> float:
    """Return how often drawn latencies keep the budget; `common` of the variance is shared."""
    rng = np.random.default_rng(seed)
    assert solution.allocation is not None
    choice = solution.allocation.choice(problem.cells)
    table = problem.costs["latency"]
    sigma = np.log(table.high[choice] / table.low[choice]) / (2 * 1.959964)
    together = rng.standard_normal((DRAWS, 1))
    errors = np.sqrt(common) * together
    if common < 1:
        errors = errors + np.sqrt(1 - common) * rng.standard_normal((DRAWS, len(choice)))
    totals = table.fixed + (table.values[choice] * np.exp(sigma * errors)).sum(axis=1)
    return float((totals <= problem.limits()["latency"]).mean())


def coverage() -> None:
    print(f"budget kept, mean (least) of {SEEDS} problems; binomial error of each 0.15 %\n")
    print("errors in common      plain            risk 0.95")
    problems = [measured(instance(50, tight=0.3, seed=seed), seed) for seed in range(SEEDS)]
    problems = [p.with_budgets([b for b in p.budgets if b.cost == "latency"]) for p in problems]
    answers = [(solve(p), solve(p, risk=RISK)) for p in problems]
    for common in (1.0, 0.5, 0.0):
        shares = np.array(
            [
                [kept(p, answer, common, seed) for answer in both]
                for seed, (p, both) in enumerate(zip(problems, answers, strict=True))
            ]
        )
        plain, risk = (f"{s.mean():7.1%} ({s.min():.1%})" for s in shares.T)
        print(f"{common:16.0%} {plain:>18} {risk:>18}", flush=True)


def price() -> None:
    print("\n   units      plain ms  risk 0.95 ms   max gap   score above plain")
    for units in (50, 500):
        plain_s, risk_s, gaps, more = [], [], [], []
        for seed in range(SEEDS):
            problem = measured(instance(units, tight=0.3, seed=seed), seed)
            start = time.process_time()
            plain = solve(problem)
            plain_s.append(time.process_time() - start)
            start = time.process_time()
            careful = solve(problem, risk=RISK)
            risk_s.append(time.process_time() - start)
            gaps.append(careful.gap)
            more.append(careful.score / plain.score - 1)
        print(
            f"{units:5d} x 8 {1e3 * np.median(plain_s):12.1f} {1e3 * np.median(risk_s):13.1f} "
            f"{max(gaps):9.1e} {np.median(more):17.1%}",
            flush=True,
        )


def resampling() -> None:
    print("\n   units  costs       draws   median s    max s   unsure units")
    for units in (20, 200, 2000):
        for name in ("ordered", "at odds"):
            spent, unsure, draws = [], [], 0
            for seed in range(5):
                problem = scored(instance(units, tight=0.3, seed=seed), 0.3)
                problem = ordered(problem) if name == "ordered" else problem
                solution, draws = solve(problem), usual_draws(problem)
                start = time.process_time()
                found = stability(problem, solution, draws)
                spent.append(time.process_time() - start)
                unsure.append(len(found.unsure) / units)
            print(
                f"{units:5d} x 8  {name:10} {draws:6d} {np.median(spent):10.2f} "
                f"{max(spent):8.2f} {np.mean(unsure):12.0%}",
                flush=True,
            )


def main() -> None:
    solve(instance(300, tight=0.3, seed=0))  # compiles where that was never done
    coverage()
    price()
    resampling()


if __name__ == "__main__":
    main()
