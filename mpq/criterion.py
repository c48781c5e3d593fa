"""What makes one measured candidate better than another, and which may not be chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mpq.core.errors import InfeasibleError
from mpq.core.evaluation import Evaluation
from mpq.core.limits import Limit
from mpq.core.problem import Allocation

_ZERO = 1e-12  # a scale below this is taken as this: equal outputs stay better than any others


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """Least divergence; with quality functions the least sum of degradations; or least cost.

    With a `cost` the value of a candidate is that of its allocation. Else, without `scales`, it is
    the mean divergence. With them it is the sum over qualities of the degradation divided by the
    quality's scale: the least degradation that a uniform scheme within the budgets has. So every
    quality counts alike whatever its unit, and as uniform schemes are candidates, what is chosen
    is never worse than the best of them.
    """

    scales: Mapping[str, float] = field(default_factory=dict)
    limits: tuple[Limit, ...] = ()
    cost: Callable[[Allocation], float] | None = None

    @classmethod
    def of(
        cls,
        qualities: Iterable[str],
        limits: Sequence[Limit],
        uniform: Sequence[Evaluation],
        fitting: Sequence[Evaluation],
    ) -> Criterion:
        """Take the scales from fitting uniform candidates or, where none fits, from all fitting."""
        scales = {}
        for name in qualities:
            measured = [e.metrics[name] for e in uniform or fitting]
            finite = [abs(value) for value in measured if math.isfinite(value)]
            scales[name] = max(_ZERO, min(finite, default=1.0))
        return cls(scales=scales, limits=tuple(limits))

    def value(self, evaluation: Evaluation) -> float:
        """Return what is minimised; NaN and infinity where an output is not finite."""
        if self.cost is not None:
            return self.cost(evaluation.allocation) if math.isfinite(evaluation.mean) else math.inf
        if not self.scales:
            return evaluation.mean
        return sum(evaluation.metrics[name] / scale for name, scale in self.scales.items())

    def allows(self, evaluation: Evaluation) -> bool:
        """Tell whether a candidate meets every limit."""
        return all(limit.met(_of(limit, evaluation)) for limit in self.limits)

    def unreached(self, evaluations: Sequence[Evaluation]) -> InfeasibleError:
        """Return the error for candidates of which none meets every limit."""
        return InfeasibleError(
            "limits",
            f"no candidate meets {' and '.join(map(str, self.limits))}: "
            f"{'; '.join(_closest(limit, evaluations) for limit in self.limits)}; raise the "
            f"budgets, add wider schemes or relax the limit",
        )


def _of(limit: Limit, evaluation: Evaluation) -> float:
    """Return what a limit is on; NaN where the user's `evaluate` left it out."""
    return evaluation.metrics.get(limit.metric, math.nan)


def _closest(limit: Limit, evaluations: Sequence[Evaluation]) -> str:
    best = limit.nearest(_of(limit, e) for e in evaluations)
    if math.isnan(best):
        return f"{limit.metric} is NaN for all of them"
    names = [e.candidate for e in evaluations if _of(limit, e) == best]
    return f"the best {limit.metric} is {best:.6g} ({names[0]})"
