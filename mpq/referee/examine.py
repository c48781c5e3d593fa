"""Which metric to believe: predictions and choices of several, judged by real measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mpq.auto import measured_value, optimum, score_all
from mpq.core.evaluation import Evaluation
from mpq.core.problem import Allocation, Budget, Problem, budget_text
from mpq.core.protocols import Partial, Scores, Task
from mpq.core.referee import Budgets, MetricVerdict, RefereeReport
from mpq.core.tables import BLEND, CostTable, SensitivityTable
from mpq.evaluate import Candidate, measure
from mpq.nn.fingerprint import digest
from mpq.referee.peak_memory import peak_bytes
from mpq.referee.random_allocations import random_allocations
from mpq.referee.ranks import kendall, spearman
from mpq.scoring import run_task, work_of
from mpq.tasks import Bench, Workers

_VERSION = 1  # of the memory measurement: part of its content keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """The report, the scores of the picked metric, and every candidate as measured."""

    report: RefereeReport
    scores: Scores
    evaluations: tuple[Evaluation, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Contender:
    name: str
    scores: Scores
    optima: tuple[Allocation, ...]  # one for each setting
    seconds: float
    peak_bytes: int | None


def examine(
    workers: Workers,
    costs: Mapping[str, CostTable],
    settings: Sequence[Budgets],
    names: Sequence[str],
    *,
    seconds: float,
    allocations: int,
    seed: int,
    run_id: str = "",
) -> Examination:
    """Judge metrics by what allocations do on the calibration data.

    At each of the `settings` (budgets that hold together) it measures every metric's optimum,
    up to `allocations` random ones, and the uniform schemes: at most settings x (metrics +
    allocations + 1) + schemes forward passes over the data, none twice. Scoring stays within
    about `seconds`, see `score_all`; one more task of each metric is run to see its memory.
    Raises InfeasibleError where no allocation meets a setting.
    """
    cells = workers.workload.cells
    randoms = [
        random_allocations(cells, costs, budgets, allocations, seed + number)
        for number, budgets in enumerate(settings)
    ]
    scored = score_all(workers, names, seconds)
    trial = _Trial(workers, costs, tuple(settings), randoms)
    contenders = [
        trial.contender(name, scores, *_cost(workers, name, scored.tasks[name]))
        for name, scores in scored.scores.items()
    ]
    verdicts = in_order(trial.verdicts(contenders))
    if len(verdicts) > 1:
        two = [c for v in verdicts[:2] for c in contenders if c.name == v.metric]
        blend = trial.blend(two[0], two[1])
        if blend is not None:
            *singles, last = trial.verdicts([*contenders, blend])
            verdicts = in_order(singles)
            if last.regret < verdicts[0].regret:
                verdicts, contenders = [last, *verdicts], [*contenders, blend]
    report = RefereeReport(
        run_id=run_id,
        divergence=workers.workload.divergence.kind,
        budgets=tuple(settings),
        best=trial.best(),
        verdicts=tuple(verdicts),
        picked=verdicts[0].metric,
        refused=scored.refused,
        num_random=sum(map(len, randoms)),
        num_measured=len(trial.measured),
    )
    (scores,) = [c.scores for c in contenders if c.name == report.picked]
    return Examination(report=report, scores=scores, evaluations=tuple(trial.measured.values()))


def in_order(verdicts: Sequence[MetricVerdict]) -> list[MetricVerdict]:
    """Return verdicts by regret, of equals by Spearman, then by seconds."""
    return sorted(verdicts, key=lambda v: (v.regret, -(v.spearman or 0.0), v.seconds))


def verdict_line(verdict: MetricVerdict) -> str:
    """Return a verdict in one line."""
    rank = "?" if verdict.spearman is None else f"{verdict.spearman:.3f}"
    return (
        f"{verdict.metric}: regret {verdict.regret:.1%}, Spearman {rank}, {verdict.seconds:.1f} s"
    )


def setting_text(budgets: Sequence[Budget]) -> str:
    """Return budgets as they were written."""
    return " and ".join(budget.text or budget_text(budget) for budget in budgets)


def watch_task(bench: Bench, work: tuple[str, Task]) -> Partial:
    """Do one task of a metric and return "bytes", what it added to the resident memory."""
    peak = peak_bytes(lambda: run_task(bench, work))
    return {"bytes": np.array(-1 if peak is None else peak)}


def _cost(workers: Workers, name: str, tasks: Sequence[Task]) -> tuple[float, int | None]:
    """Return the seconds of all tasks of a scored metric and the memory of the first."""
    seconds = math.fsum(workers.store.partial_seconds([task.key for task in tasks]).values())
    key = digest("memory of a task", _VERSION, tasks[0].key)
    watched = replace(work_of(name, tasks[0]), key=key)
    (found,) = workers.finished(f"memory ({name})", watch_task, [watched])
    peak = int(found["bytes"])
    return seconds, None if peak < 0 else peak


class _Trial:
    """The candidates of every contender, measured."""

    def __init__(
        self,
        workers: Workers,
        costs: Mapping[str, CostTable],
        settings: tuple[Budgets, ...],
        randoms: Sequence[Sequence[Allocation]],
    ) -> None:
        self.measured: dict[Allocation, Evaluation] = {}
        self._workers, self._costs = workers, costs
        self._settings, self._randoms = settings, randoms
        cells = workers.workload.cells
        zeros = np.zeros(len(cells))
        nothing = SensitivityTable(metric="none", cells=cells, values=zeros, stderr=zeros)
        self._problem = Problem(sensitivity=nothing, costs=costs, budgets=())
        uniform = {f"uniform {s}": a for s, a in self._problem.uniform().items()}
        self._measure(uniform)
        for budgets, allocations in zip(settings, randoms, strict=True):
            text = setting_text(budgets)
            self._measure({f"random {i + 1} at {text}": a for i, a in enumerate(allocations)})

    def contender(self, name: str, scores: Scores, seconds: float, peak: int | None) -> _Contender:
        """Return a metric with its optimum at each setting, measured."""
        optima = [optimum(scores.sensitivity, self._costs, budgets) for budgets in self._settings]
        texts = [setting_text(budgets) for budgets in self._settings]
        self._measure({f"{name} at {text}": a for text, a in zip(texts, optima, strict=True)})
        return _Contender(
            name=name, scores=scores, optima=tuple(optima), seconds=seconds, peak_bytes=peak
        )

    def _measure(self, candidates: Mapping[str, Allocation]) -> None:
        new: dict[Allocation, str] = {}
        for name, allocation in candidates.items():
            if allocation not in self.measured:
                new.setdefault(allocation, name)
        if new:
            asked = [
                Candidate(name=name, split="calibration", allocation=allocation)
                for allocation, name in new.items()
            ]
            self.measured |= {e.allocation: e for e in measure(self._workers, asked)}

    def best(self) -> tuple[float, ...]:
        """Return the least measured divergence within each setting."""
        return tuple(
            min(
                measured_value(evaluation)
                for allocation, evaluation in self.measured.items()
                if self._problem.with_budgets(budgets).fits(allocation)
            )
            for budgets in self._settings
        )

    def verdicts(self, contenders: Sequence[_Contender]) -> list[MetricVerdict]:
        """Judge contenders by everything that is measured so far."""
        best = self.best()
        return [self._verdict(contender, best) for contender in contenders]

    def _verdict(self, contender: _Contender, best: Sequence[float]) -> MetricVerdict:
        pairs = self._pairs(contender.scores.sensitivity)
        rho, tau = spearman(pairs), kendall(pairs)
        regrets = tuple(
            _regret(measured_value(self.measured[allocation]), least)
            for allocation, least in zip(contender.optima, best, strict=True)
        )
        return MetricVerdict(
            metric=contender.name,
            spearman=rho.value if rho else None,
            spearman_stderr=rho.stderr if rho else None,
            kendall=tau.value if tau else None,
            kendall_stderr=tau.stderr if tau else None,
            ratio=_ratio(pairs) if contender.scores.sensitivity.is_divergence else None,
            regret=math.fsum(regrets) / len(regrets),
            regrets=regrets,
            seconds=contender.seconds,
            peak_bytes=contender.peak_bytes,
        )

    def _pairs(self, table: SensitivityTable) -> list[tuple[list[float], list[float]]]:
        """Return (predicted, measured) of the random allocations of each setting."""
        return [
            (
                [math.fsum(table.values[a.choice(table.cells)]) for a in allocations],
                [measured_value(self.measured[a]) for a in allocations],
            )
            for allocations in self._randoms
        ]

    def blend(self, one: _Contender, other: _Contender) -> _Contender | None:
        """Return the mean of two metrics, each scaled to what is measured; None: no scale."""
        tables = [one.scores.sensitivity, other.scores.sensitivity]
        ratios = [_ratio(self._pairs(table)) for table in tables]
        if any(ratio is None for ratio in ratios):
            return None
        weights = [0.5 / ratio for ratio in ratios if ratio is not None]
        table = replace(
            tables[0],
            metric=f"{one.name}{BLEND}{other.name}",
            values=weights[0] * tables[0].values + weights[1] * tables[1].values,
            stderr=np.hypot(weights[0] * tables[0].stderr, weights[1] * tables[1].stderr),
        )
        peaks = [c.peak_bytes for c in (one, other) if c.peak_bytes is not None]
        return self.contender(
            table.metric,
            Scores(sensitivity=table),
            one.seconds + other.seconds,
            max(peaks, default=None),
        )


def _regret(value: float, least: float) -> float:
    if value <= least:
        return 0.0
    return value / least - 1.0 if least > 0 else math.inf


def _ratio(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float | None:
    """Return the median of predicted over measured; None where that is no positive number."""
    ratios = [p / m for of in pairs for p, m in zip(*of, strict=True) if m > 0 and math.isfinite(m)]
    found = float(np.median(ratios)) if ratios else 0.0
    return found if found > 0 and math.isfinite(found) else None
