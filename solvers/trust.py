"""How far pairs of units can be believed: chosen by samples that they were not taken from."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from mpq.core.problem import Problem
from mpq.core.tables import PAIRS_TRUSTED, Floats
from solvers.pairs import Pairs
from solvers.pairwise import responses_of

TRUSTS = (0.0, 0.25, 0.5, PAIRS_TRUSTED)
_LEAST_SAMPLES = 4
_MARGIN = 1 / 3  # of the standard error: trust is given up on a slight sign already


def cross_validated(problem: Problem) -> Problem:
    """Return the problem with the trust in pairs that serves unseen samples best.

    A minimiser finds the pairs whose errors seem to cancel, and with few samples most of those
    are noise. So every second sample leads to a choice for each trust, the other samples say
    what it would lose, without bias, and the same the other way round. Taken is the largest
    trust that loses no more than the best one by a third of the standard error of their difference
    over samples. Two times four quick solves.

    Raises InvalidInputError (`needs_responses`) for a problem without responses.
    """
    responses = responses_of(problem)
    if responses.vectors.shape[1] < _LEAST_SAMPLES or not len(problem.cells):
        return problem
    halves = [responses.of_samples(slice(start, None, 2)) for start in (0, 1)]
    quick = Pairs(num_starts=0, num_kicks=4, prove=False)
    losses: dict[float, list[Floats]] = {trust: [] for trust in TRUSTS}
    for seen, unseen in (halves, halves[::-1]):
        for trust in TRUSTS:
            half = replace(problem, responses=replace(seen, trust=trust))
            allocation = quick.solve(half).allocation
            if allocation is None:
                return problem
            losses[trust].append(unseen.losses(allocation.choice(problem.cells)))
    together = {trust: np.concatenate(of_halves) for trust, of_halves in losses.items()}
    least = min(together.values(), key=lambda of_samples: float(of_samples.mean()))
    trust = max(trust for trust in TRUSTS if _as_good(together[trust], least))
    return replace(problem, responses=replace(responses, trust=trust))


def _as_good(losses: Floats, least: Floats) -> bool:
    more = losses - least
    return bool(more.mean() <= _MARGIN * more.std(ddof=1) / math.sqrt(len(more)))
