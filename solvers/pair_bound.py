"""A lower bound on the pairwise score: tiny problems by trying all, others by convex forms."""

from __future__ import annotations

import math

import numpy as np

from mpq.core.problem import Problem
from mpq.core.tables import Indices
from solvers.convex import Proof
from solvers.pairwise import MANY, Interacting

_MOST_WORK = 3e7  # products of the exhaustive search: some hundredths of a second
_MOST_EQUATIONS = 900  # of the semidefinite relaxation: one to two seconds
_ROUNDS = 3
_FEWER = 0.8  # share of entries that must be left for another round not to be worth while


def can_try_all(form: Interacting) -> bool:
    """Tell whether there are so few choices that each of them can be scored."""
    if len(form.own) >= MANY:
        return False
    work = float(np.log(np.diff(form.knapsack.starts)).sum() + 2 * np.log(len(form.own)))
    return work <= math.log(_MOST_WORK)


def best_of_all(problem: Problem, form: Interacting) -> Indices | None:
    """Return the best choice of entries that meets every condition, None where none does."""
    knapsack = form.knapsack
    sizes = np.diff(knapsack.starts)
    places = np.stack(np.unravel_index(np.arange(int(np.prod(sizes))), sizes), axis=1)
    choices = knapsack.starts[:-1] + places
    for row, slack in zip(knapsack.weights, knapsack.slack, strict=True):
        choices = choices[row[choices].sum(axis=1) <= slack * (1 + 1e-9)]
    taken = np.zeros((len(choices), len(form.own)))
    np.put_along_axis(taken, choices, 1.0, axis=1)
    scores = form.own[choices].sum(axis=1) + np.einsum("ij,ij->i", taken @ form.cross, taken)
    for number in np.argsort(scores, kind="stable"):
        if problem.meets(knapsack.cells[choices[number]]):
            return np.asarray(choices[number])
    return None


def lower_bound(form: Interacting, best: Indices) -> float:
    """Return a number that no choice that fits scores below, inf where only `best` is left.

    `best` (entry of each unit) is a good choice. What a bound shows to be no better than it is
    left out, and what remains is bounded again.
    """
    score, bound = form.score(best) + float(form.doubt[best].sum()), -math.inf
    for _ in range(_ROUNDS):
        if len(form.own) == len(best):
            return math.inf
        proof = _proof(form, best, score)
        if proof is None:
            return bound
        bound = max(bound, min(proof.bound, score))
        open_still = proof.bound + proof.reduced < score
        open_still[best] = True
        kept = np.flatnonzero(open_still)
        if len(best) < len(kept) and len(kept) > _FEWER * len(open_still):
            return bound
        best, form = np.searchsorted(kept, best), form.part(kept)
    return math.inf if len(form.own) == len(best) else bound


def _proof(form: Interacting, best: Indices, score: float) -> Proof | None:
    from solvers.semidefinite import relax_pairs, size_of

    if size_of(form) <= _MOST_EQUATIONS:
        return relax_pairs(form, best, score)
    if len(form.own) < MANY:
        return None
    from solvers.shifted import shift_pairs  # loads the compiler, a third of a second

    return shift_pairs(form, best, score)
