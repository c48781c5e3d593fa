"""What solvers that search by measurements share: a budget of trials and the best of them."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mpq.core.errors import InvalidInputError
from mpq.core.problem import Allocation, Problem, Solution
from mpq.core.protocols import Measure
from mpq.core.tables import Indices
from solvers.check import finish
from solvers.exact import minimise
from solvers.infeasible import explain

_PROGRAM_S = 60.0  # what an integer program may take


@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring(ABC):
    """A solver whose answer is the allocation that measured best of those it tried.

    Without a `measure` the predicted score stands in for it, with pairs where the problem has
    responses. At most `num_trials` allocations are measured on all samples, one on a share of
    them counting as that share, and nothing new is begun after `time_limit_s`. The additive
    optimum is always the first trial. `Solution.score` and bound are additive: the gap tells how
    far the answer is from the additive optimum, not that nothing measures better.
    Deterministic for a `seed` unless stopped by the time. Raises InvalidInputError
    (`num_trials`) for no trials.
    """

    name: str = ""
    measure: Measure | None = None
    seed: int = 0
    num_trials: int = 100
    time_limit_s: float = 600.0

    def __post_init__(self) -> None:
        if self.num_trials < 1:
            raise InvalidInputError(
                "num_trials", f"a search makes at least 1 trial, got {self.num_trials}"
            )

    def solve(self, problem: Problem) -> Solution:
        """Return the allocation that measured best of those that meet every budget."""
        start = time.monotonic()
        limit_s = min(_PROGRAM_S, self.time_limit_s)
        additive = minimise(
            problem, problem.sensitivity.values, problem.budgets, time_limit_s=limit_s
        )
        choice, infeasibility = additive.choice, None
        if choice is not None:
            predicted = Predicted.of(problem)
            trials = Trials(
                problem=problem,
                predicted=predicted,
                measure=self.measure or predicted,
                limit=self.num_trials,
                deadline=start + self.time_limit_s,
            )
            self.search(problem, choice, trials)
            choice = trials.best
        elif additive.proven:
            infeasibility = explain(problem, time_limit_s=limit_s)
        return finish(
            problem,
            self.name,
            choice,
            proven=choice is None and additive.proven,
            bound=additive.bound,
            seconds=time.monotonic() - start,
            infeasibility=infeasibility,
        )

    @abstractmethod
    def search(self, problem: Problem, additive: Indices, trials: Trials) -> None:
        """Measure allocations, the `additive` optimum first, while trials are `left`."""


@dataclass(slots=True, kw_only=True)
class Trials:
    """Measures choices that meet the problem, so many at most, and remembers the best."""

    problem: Problem
    predicted: Predicted
    measure: Measure
    limit: int
    deadline: float
    spent: float = 0.0
    best: Indices | None = None
    _loss: float = field(default=math.inf)

    @property
    def left(self) -> float:
        """Return how many allocations may still be measured on all samples."""
        late = self.spent > 0 and time.monotonic() >= self.deadline
        return 0.0 if late else self.limit - self.spent

    def losses(self, choices: Sequence[Indices], share: float = 1.0) -> list[float]:
        """Return what the first of the choices lose, as many of them as are `left`.

        What is not finite loses infinitely much.
        """
        taken = choices[: int(self.left / share + 1e-9)]
        if not taken:
            return []
        assert all(map(self.problem.meets, taken))
        cells = self.problem.cells
        measured = self.measure([Allocation.from_choice(cells, c) for c in taken], share)
        losses = [float(loss) if math.isfinite(loss) else math.inf for loss in measured]
        self.spent += share * len(taken)
        if share == 1.0:
            for choice, loss in zip(taken, losses, strict=True):
                if self.best is None or loss < self._loss:
                    self.best, self._loss = choice, loss
        return losses


@dataclass(frozen=True, slots=True)
class Predicted:
    """The predicted score as a measurement that takes no forward pass."""

    problem: Problem
    interactions: np.ndarray | None

    @classmethod
    def of(cls, problem: Problem) -> Predicted:
        """Return the score with pairs where the problem has responses, else the additive one."""
        responses = problem.responses
        return cls(problem, None if responses is None else responses.interactions())

    def __call__(self, allocations: Sequence[Allocation], share: float = 1.0) -> list[float]:
        """Return the predicted score of each allocation; there are no samples to share."""
        return [self.score(a.choice(self.problem.cells)) for a in allocations]

    def score(self, choice: Indices) -> float:
        """Return the predicted score of a choice."""
        if self.interactions is None:
            return self.problem.score(choice)
        return float(self.interactions[np.ix_(choice, choice)].sum())
