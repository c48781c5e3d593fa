"""Solver "pairs": the pairwise score, by local search from many starts."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from mpq.core.problem import Problem, Solution
from mpq.core.tables import Floats, Indices
from solvers.check import finish
from solvers.descent import descend, repair
from solvers.exact import minimise
from solvers.infeasible import explain
from solvers.knapsack import Knapsack, fitting
from solvers.pairwise import responses_of
from solvers.relaxation import relax
from solvers.rounding import round_to_fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Minimise x^T G x over one cell per unit, G the interactions of the responses.

    Starts are the additive optimum (of G's diagonal), optima of randomly scaled diagonals, and
    random kicks of the best so far; each is improved by single changes and swaps until none
    helps. `Solution.score` is the pairwise score, and the answer is FEASIBLE with no bound:
    nothing is proven. Never worse than the additive optimum that it starts from; the same for
    the same `seed`.
    Raises InvalidInputError (`needs_responses`) for a problem without responses.
    """

    name: str = "pairs"
    seed: int = 0
    num_starts: int = 6
    num_kicks: int = 60
    time_limit_s: float = 10.0

    def solve(self, problem: Problem) -> Solution:
        """Return the best allocation found that meets every budget."""
        start = time.monotonic()
        interactions = responses_of(problem).interactions()
        additive = minimise(
            problem, np.diagonal(interactions), problem.budgets, time_limit_s=self.time_limit_s
        )
        if additive.choice is None:
            reason = explain(problem, time_limit_s=self.time_limit_s) if additive.proven else None
            return finish(
                problem,
                self.name,
                None,
                proven=additive.proven,
                seconds=time.monotonic() - start,
                infeasibility=reason,
            )
        choice = additive.choice
        everything = np.arange(len(problem.cells))
        knapsack = fitting(problem, np.diagonal(interactions), problem.rows(), everything)
        if knapsack is not None and len(choice):
            choice = _Descents(problem, interactions, knapsack).best(
                choice, num_starts=self.num_starts, num_kicks=self.num_kicks, seed=self.seed
            )
        return finish(problem, self.name, choice, proven=False, seconds=time.monotonic() - start)


class _Descents:
    def __init__(self, problem: Problem, interactions: Floats, knapsack: Knapsack) -> None:
        self.problem, self.knapsack = problem, knapsack
        cells, units = knapsack.cells, knapsack.units
        self.own = interactions[cells, cells]
        self.cross = interactions[np.ix_(cells, cells)]
        self.cross[units[:, None] == units] = 0.0
        self._keep_apart(problem)
        relaxed = relax(knapsack)
        self.prices = np.zeros(len(knapsack.slack)) if relaxed is None else relaxed.prices

    def _keep_apart(self, problem: Problem) -> None:
        """Make forbidden pairs worse than anything else."""
        worst = 1e3 * float(np.abs(self.own).sum() + np.abs(self.cross).max(initial=0.0)) or 1.0
        for pair in problem.forbidden_cells():
            if np.isin(pair, self.knapsack.cells).all():
                i, j = np.searchsorted(self.knapsack.cells, pair)
                self.cross[i, j] = self.cross[j, i] = worst

    def improved(self, choice: Indices | None) -> Indices | None:
        """Return the local optimum reached from a choice of entries; None if it does not fit."""
        if choice is None:
            return None
        choice = descend(self.knapsack, choice, prices=self.prices, cross=self.cross)
        cells = self.knapsack.cells[choice]
        return choice if self.problem.meets(cells) else None

    def score(self, choice: Indices) -> float:
        return float(self.own[choice].sum() + self.cross[np.ix_(choice, choice)].sum())

    def scaled_optimum(self, rng: np.random.Generator) -> Indices | None:
        """Return an almost best additive choice after scaling each score by about 1/2 to 2."""
        own = self.own * np.exp(rng.normal(0.0, 0.6, len(self.own)))
        least = np.minimum.reduceat(own, self.knapsack.starts[:-1])
        scaled = replace(self.knapsack, objective=own - least[self.knapsack.units])
        relaxed = relax(scaled)
        return None if relaxed is None else round_to_fit(scaled, relaxed)

    def kicked(self, choice: Indices, rng: np.random.Generator) -> Indices | None:
        """Return the choice with a few units changed at random, repaired to fit."""
        entries = rng.choice(len(self.own), size=min(4, len(self.own)), replace=False)
        choice = choice.copy()
        choice[self.knapsack.units[entries]] = entries
        return repair(self.knapsack, choice)

    def best(self, additive: Indices, *, num_starts: int, num_kicks: int, seed: int) -> Indices:
        """Return the cells of the best choice found, `additive` where nothing beats it."""
        rng = np.random.default_rng(seed)
        best = start = np.searchsorted(self.knapsack.cells, additive)
        for attempt in range(1 + num_starts + num_kicks):
            if attempt > num_starts:
                found = self.improved(self.kicked(best, rng))
            else:
                found = self.improved(self.scaled_optimum(rng) if attempt else start)
            if found is not None and self.score(found) < self.score(best):
                best = found
        return self.knapsack.cells[best]
