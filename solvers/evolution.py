"""Solver "evolution": small switches of the best so far, measured in stages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mpq.core.problem import Problem
from mpq.core.tables import Indices
from solvers.measuring import Measuring, Trials
from solvers.starts import starts
from solvers.switches import Switches

_NUM_STARTS = 3
_LAST = ((1.0, 1),)  # stages where not a whole generation is left
_FRUITLESS = 20  # generations without anything new after which there is nothing left to find


@dataclass(frozen=True, slots=True, kw_only=True)
class Evolution(Measuring):
    """(1 + lambda) evolution in the manner of EvoPress (Sieberling et al. 2025).

    It begins with the best of the additive optimum, the optimum with pairs and the best uniform
    scheme that fits. A generation draws `num_offspring` of the parent, each some level switches
    away (at most `num_switches`) and within every budget. The predicted score picks
    `num_measured` of them; each of the `stages`, (share of the samples, how many survive it),
    measures what the one before left. The last one becomes the parent if it measures better on
    all samples. What was measured once is not tried again.
    """

    name: str = "evolution"
    num_offspring: int = 128
    num_switches: int = 3
    num_measured: int = 16
    stages: tuple[tuple[float, int], ...] = ((1 / 8, 4), (1 / 2, 1), (1.0, 1))

    def search(self, problem: Problem, additive: Indices, trials: Trials) -> None:
        """Measure the starts, then a generation after the other."""
        rng, switches = np.random.default_rng(self.seed), Switches.of(problem)
        first = list(starts(problem, additive).values())[:_NUM_STARTS]
        trials.losses(first)
        seen, fruitless = {choice.tobytes() for choice in first}, 0
        while switches is not None and trials.left >= 1 and fruitless < _FRUITLESS:
            assert trials.best is not None
            drawn = switches.mutated(trials.best, self.num_offspring, self.num_switches, rng)
            offspring = [choice for choice in drawn if choice.tobytes() not in seen]
            fruitless = 0 if offspring else fruitless + 1
            predicted = map(trials.predicted.score, offspring)
            survivors = _least(offspring, predicted, self.num_measured)
            seen |= {choice.tobytes() for choice in survivors}
            for share, kept in self.stages if trials.left >= self._generation else _LAST:
                survivors = _least(survivors, trials.losses(survivors, share), kept)

    @property
    def _generation(self) -> float:
        """Return what a generation costs, in allocations measured on all samples."""
        counts = [self.num_measured, *(kept for _, kept in self.stages)]
        return sum(count * share for count, (share, _) in zip(counts, self.stages, strict=False))


def _least(choices: Sequence[Indices], losses: Iterable[float], count: int) -> list[Indices]:
    """Return the `count` choices of least loss, the least first, of those that have one."""
    by_loss = sorted(zip(losses, range(len(choices)), strict=False))
    return [choices[number] for _, number in by_loss[:count]]
