"""When scoring has seen enough calibration data: its error bars no longer matter to the choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mpq.core.problem import Budget, Problem
from mpq.core.protocols import Scores
from mpq.core.tables import CostTable, Floats, Indices
from solvers import solve
from solvers.risk import at_risk

Enough = Callable[[Scores, float], bool]

_LEAST_SAMPLES = 32  # with fewer the error bars themselves are guesses
_DRAWS = 20
_MAY_FAIL = 1  # of the draws: settled in at least 95 % of them
_SMALL_SHARE = 0.05  # of the score, which predicts no better than that


@dataclass(frozen=True, slots=True, kw_only=True)
class EnoughScores:
    """Tells after each round of scoring tasks whether the rest may be left out.

    `precision` is one of

    - a number p: the standard error of the score of the additive optimum is at most p times that
      score.
    - "settled": the choice is. The scores are drawn 20 times within their error bars; the optimum
      of the scores as they are may lose more than 5 % of the score against the optimum of the
      draw in at most one of them.

    A draw of a metric with responses is a bootstrap over the calibration samples, so what errors
    of different cells have in common is kept; else it is normal and independent for each cell,
    which is careful: errors that cells share would cancel. Without responses the standard error
    of a score is the sum of those of its cells, an upper bound.

    Assumes that batches come in no order that matters. Nothing is enough before 32 samples. Cost:
    one exact solution of the additive problem, for "settled" up to 21.
    """

    costs: Mapping[str, CostTable]
    budgets: tuple[Budget, ...]
    precision: float | Literal["settled"]
    seed: int = 0
    risk: float | None = None

    def __call__(self, scores: Scores, num_samples: float) -> bool:
        """Tell whether scores of the first `num_samples` calibration samples are enough."""
        if num_samples < _LEAST_SAMPLES:
            return False
        problem = Problem(
            sensitivity=scores.sensitivity.clamped(), costs=self.costs, budgets=self.budgets
        )
        problem = at_risk(problem, self.risk)
        allocation = solve(problem).allocation
        if allocation is None:
            return False  # whoever solves for good says why
        choice = allocation.choice(problem.cells)
        if self.precision == "settled":
            return self._is_settled(problem, scores, choice)
        return score_error(scores, choice) <= self.precision * abs(problem.score(choice))

    def _is_settled(self, problem: Problem, scores: Scores, choice: Indices) -> bool:
        failed = 0
        for values in drawn(scores, _DRAWS, self.seed):
            table = replace(scores.sensitivity, values=values)
            best = solve(replace(problem, sensitivity=table))
            lost = math.fsum(values[choice]) - best.score
            failed += not lost <= _SMALL_SHARE * abs(best.score)
            if failed > _MAY_FAIL:
                return False
        return True


def score_error(scores: Scores, choice: Indices) -> float:
    """Return the standard error of the additive score of a choice, over calibration samples."""
    if scores.responses is None:
        return math.fsum(scores.sensitivity.stderr[choice])
    vectors = scores.responses.vectors[choice].astype(np.float64)
    per_sample = 0.5 * np.square(vectors).mean(axis=2).sum(axis=0)
    if len(per_sample) < 2:
        return math.inf
    return float(per_sample.std(ddof=1)) / math.sqrt(len(per_sample))


def drawn(scores: Scores, draws: int, seed: int) -> Iterator[Floats]:
    """Yield values of all cells drawn within their error bars, at least 0, reproducibly."""
    generator = np.random.default_rng(seed)
    values, stderr = scores.sensitivity.values, scores.sensitivity.stderr
    if scores.responses is None:
        for _ in range(draws):
            moved = values + stderr * generator.standard_normal(len(values))
            yield np.maximum(moved, 0.0)
        return
    vectors = scores.responses.vectors
    per_sample = 0.5 * np.square(vectors, dtype=np.float64).mean(axis=2)
    samples = per_sample.shape[1]
    for _ in range(draws):
        times = generator.multinomial(samples, np.full(samples, 1 / samples))
        yield per_sample @ times / samples
