"""Solver "pairs": the pairwise score, by local search from many starts, and a bound."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from mpq.core.problem import Problem, Solution
from mpq.core.tables import Floats, Indices
from solvers.check import finish
from solvers.descent import descend, field_of, repair
from solvers.exact import Minimise, minimise
from solvers.infeasible import explain
from solvers.knapsack import Knapsack, with_terms
from solvers.pair_bound import best_of_all, can_try_all, lower_bound
from solvers.pairwise import MANY, Interacting, bounded_interactions, responses_of
from solvers.relaxation import relax

_POOL = 64  # entries whose pairs are tried for a swap
_KICKED = 4  # units


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Minimise x^T G x over one cell per unit, G the interactions of the responses.

    Starts are the additive optimum (of G's diagonal), almost optima of randomly scaled
    diagonals, and random kicks of the best so far; each is improved by single changes and swaps
    until none helps. `Solution.score` is the pairwise score. With `prove` a convex relaxation
    bounds it from below (`solvers.pair_bound`); without, the bound is -inf and the answer
    FEASIBLE, unless no pair interacts: then it is the additive optimum, proven. Never worse than
    the additive optimum that it starts from; the same for the same `seed`.
    Raises InvalidInputError (`needs_responses`) for a problem without responses.
    """

    name: str = "pairs"
    seed: int = 0
    num_starts: int = 6
    num_kicks: int = 60
    time_limit_s: float = 10.0
    prove: bool = True

    def solve(self, problem: Problem) -> Solution:
        """Return the best allocation found that meets every budget."""
        start = time.monotonic()
        interactions, doubt = bounded_interactions(responses_of(problem))
        minimiser = _minimiser(problem)
        additive = minimiser(
            problem,
            np.diagonal(interactions).copy(),
            problem.budgets,
            time_limit_s=self.time_limit_s,
        )
        choice, bound, proven, reason = additive.choice, -math.inf, additive.proven, None
        if choice is None and proven:
            reason = explain(problem, time_limit_s=self.time_limit_s, by=minimiser)
        elif choice is not None:
            form = Interacting.of(problem, interactions, doubt)
            proven = proven and form is not None and not form.cross.any()
            if form is not None and not proven:
                choice, bound = self._improved(problem, form, choice)
        return finish(
            problem,
            self.name,
            choice,
            proven=proven,
            bound=bound,
            seconds=time.monotonic() - start,
            infeasibility=reason,
        )

    def _improved(
        self, problem: Problem, form: Interacting, additive: Indices
    ) -> tuple[Indices, float]:
        """Return the best cells found and a bound, inf where nothing is better."""
        cells = form.knapsack.cells
        start = np.searchsorted(cells, additive)
        if can_try_all(form):
            best = best_of_all(problem, form)
            return cells[start if best is None else best], math.inf if self.prove else -math.inf
        best = Descents(problem, form).best(
            start, num_starts=self.num_starts, num_kicks=self.num_kicks, seed=self.seed
        )
        return cells[best], lower_bound(form, best) if self.prove else -math.inf


def _minimiser(problem: Problem) -> Minimise:
    """Return what finds the additive optimum: compiled for many cells."""
    if len(problem.cells) < MANY:
        return minimise
    from solvers.quick import minimise_quickly

    return minimise_quickly


def _local_search(
    knapsack: Knapsack,
) -> tuple[Callable[[Knapsack, Indices], Indices | None], Callable[..., Indices]]:
    """Return what repairs and what descends: compiled for many."""
    if len(knapsack.cells) < MANY or knapsack.terms is not None:
        return repair, descend
    from solvers.quick_descent import descend_quickly, repair_quickly

    return repair_quickly, descend_quickly


def _prices(knapsack: Knapsack) -> Floats:
    """Return almost the best prices of the weights, zero where there are none."""
    if len(knapsack.cells) < MANY:
        relaxed = relax(knapsack)
        return np.zeros(len(knapsack.slack)) if relaxed is None else relaxed.prices
    from solvers.lagrange import maximise_dual

    prices = np.zeros(len(knapsack.slack))
    rows = np.flatnonzero(knapsack.weights.any(axis=1))
    if len(rows):
        part = replace(knapsack, weights=knapsack.weights[rows], slack=knapsack.slack[rows])
        dual = maximise_dual(part)
        if dual is not None:
            prices[rows] = dual.prices
    return prices


class Descents:
    """Local searches of one problem, whose score is the pairwise one of `form`."""

    def __init__(self, problem: Problem, form: Interacting) -> None:
        self.problem, self.own = problem, form.own
        self.knapsack = with_terms(problem, form.knapsack)
        self.cross = self._apart(form)
        self.prices = _prices(form.knapsack)
        self.repair, self.descend = _local_search(self.knapsack)

    def _apart(self, form: Interacting) -> Floats:
        """Return the cross terms with forbidden pairs worse than anything else."""
        cells, cross = form.knapsack.cells, form.cross
        pairs = [p for p in self.problem.forbidden_cells() if np.isin(p, cells).all()]
        if not pairs:
            return cross
        cross = cross.copy()
        worst = 1e3 * float(np.abs(self.own).sum() + np.abs(cross).max(initial=0.0)) or 1.0
        for i, j in np.searchsorted(cells, pairs):
            cross[i, j] = cross[j, i] = worst
        return cross

    def improved(self, choice: Indices | None, field: Floats | None = None) -> _Found | None:
        """Return the local optimum reached from a choice of entries; None if it does not fit."""
        if choice is None:
            return None
        if field is None:
            field = field_of(self.cross, choice)
        choice = self.descend(
            self.knapsack,
            choice,
            prices=self.prices,
            cross=self.cross,
            field=field,
            pool=_POOL,
        )
        score = float(self.own[choice].sum() + field[choice].sum())
        return _Found(choice=choice, field=field, score=score)

    def improved_if_fits(self, choice: Indices) -> _Found | None:
        """Return the local optimum reached from a choice after it was made to fit."""
        return self.improved(self.repair(self.knapsack, choice))

    def priced(self) -> Indices | None:
        """Return the choice that is cheapest at the prices of the rows, made to fit."""
        return self._cheapest(self.knapsack)

    def scaled(self, rng: np.random.Generator) -> Indices | None:
        """Return a good additive choice after scaling each score by about 1/2 to 2."""
        objective = self.knapsack.objective * np.exp(rng.normal(0.0, 0.6, len(self.own)))
        return self._cheapest(replace(self.knapsack, objective=objective))

    def _cheapest(self, knapsack: Knapsack) -> Indices | None:
        worth = knapsack.objective + self.prices @ knapsack.weights
        return self.repair(knapsack, np.lexsort((worth, knapsack.units))[knapsack.starts[:-1]])

    def kicked(self, best: _Found, rng: np.random.Generator) -> _Found | None:
        """Return the local optimum after a few units changed at random, repaired to fit."""
        entries = rng.choice(len(self.own), size=min(_KICKED, len(self.own)), replace=False)
        choice = best.choice.copy()
        choice[self.knapsack.units[entries]] = entries
        repaired = self.repair(self.knapsack, choice)
        if repaired is None:
            return None
        moved = np.flatnonzero(repaired != best.choice)
        field = best.field.copy()
        for new, old in zip(repaired[moved], best.choice[moved], strict=True):
            field += self.cross[new]
            field -= self.cross[old]
        return self.improved(repaired, field)

    def best(
        self,
        start: Indices,
        *,
        num_starts: int,
        num_kicks: int,
        seed: int,
        further: Sequence[Indices] = (),
    ) -> Indices:
        """Return the best choice of entries found, `start` where nothing beats it.

        `further` are choices to start from as well, made to fit where they do not.
        """
        rng = np.random.default_rng(seed)
        field = field_of(self.cross, start)
        score = float(self.own[start].sum() + field[start].sum())
        best = _Found(choice=start, field=field, score=score)
        tries: list[Callable[[], _Found | None]] = [
            lambda: self.improved(start),
            *(partial(self.improved_if_fits, choice) for choice in further),
            *[lambda: self.improved(self.scaled(rng))] * num_starts,
            *[lambda: self.kicked(best, rng)] * num_kicks,
        ]
        for attempt in tries:
            found = attempt()
            if found is None or not found.score < best.score:
                continue
            if self.problem.meets(self.knapsack.cells[found.choice]):
                best = found
        return best.choice


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A choice of entries, the sum of its rows of the cross terms, and its score."""

    choice: Indices
    field: Floats
    score: float
