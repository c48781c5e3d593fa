"""What a comparison of sensitivity metrics found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mpq.core.problem import Budget

Budgets = tuple[Budget, ...]  # that hold together


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricVerdict:
    """How well one metric predicts and chooses.

    `spearman` and `kendall` compare its additive score with the measured divergence of random
    allocations, within each budget, averaged over budgets (None: too few different allocations);
    their standard errors are over allocations. `ratio` is the median of predicted over measured
    divergence (None where the metric predicts another quantity). `regrets` are, budget by budget,
    the measured divergence of its own optimum over that of the best candidate known, minus 1,
    and `regret` their mean. `seconds` is the time of all its tasks, added up; `peak_bytes` what
    its first task added to a worker's resident memory (None: unknown).
    """

    metric: str
    spearman: float | None
    spearman_stderr: float | None
    kendall: float | None
    kendall_stderr: float | None
    ratio: float | None
    regret: float
    regrets: tuple[float, ...]
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RefereeReport:
    """Metrics compared on one network by what their choices really do.

    `picked` is the verdict with the least regret, the higher Spearman of equals. A verdict
    "a + b" is the mean of the two best after scaling each to the measured divergences; it is
    there where it measured better than both. `best` is the least measured divergence at each of
    the `budgets`, `refused` why a metric was left out, `num_random` the random allocations over
    all budgets and `num_measured` the different allocations measured.
    """

    run_id: str
    divergence: str
    budgets: tuple[Budgets, ...]
    best: tuple[float, ...]
    verdicts: tuple[MetricVerdict, ...]
    picked: str
    refused: Mapping[str, str]
    num_random: int
    num_measured: int
