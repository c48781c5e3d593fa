"""The metric "auto": several metrics propose, the measurement picks."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mpq.adaptive import Enough
from mpq.core.errors import InfeasibleError, InvalidInputError, MpqError, RunFailedError
from mpq.core.evaluation import Evaluation
from mpq.core.problem import Allocation, Budget, Problem
from mpq.core.protocols import Scores, Task
from mpq.core.tables import CostTable, SensitivityTable
from mpq.evaluate import Candidate, measure
from mpq.scoring import run_task, score, work_of
from mpq.tasks import Workers
from sensitivity import METRICS, get_metric
from solvers import solve

AUTO = "auto"
_CHEAP_FIRST = (
    "gauss_newton",
    "weight_error",
    "taylor",
    "fisher",
    "lrp",
    "mixllm",
    "autoquantize",
    "gauss_newton_trace",
    "kl",
    "sqnr",
    "loss",
    "higgs",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What several metrics found and by which tasks, and why others found nothing."""

    scores: Mapping[str, Scores]
    tasks: Mapping[str, Sequence[Task]]
    refused: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class PickedMetric:
    """The scores of the metric whose choice measured best, the choices of all, and the story."""

    scores: Scores
    allocations: Mapping[str, Allocation]
    lines: tuple[str, ...]


def known_metrics() -> list[str]:
    """Return all metrics, those that are known to be cheap first."""
    cheap = [name for name in _CHEAP_FIRST if name in METRICS]
    return [*cheap, *(name for name in METRICS if name not in cheap)]


def pick_metric(
    workers: Workers,
    costs: Mapping[str, CostTable],
    budgets: Sequence[Budget],
    seconds: float,
    enough: Enough | None = None,
    risk: float | None = None,
) -> PickedMetric:
    """Score by `gauss_newton` and what else fits into `seconds`, and measure each one's optimum.

    The scores are the table of the metric whose additive optimum has the least divergence on
    the calibration data, with the responses of `gauss_newton`. Which metrics take part depends
    on how fast they are here. Cost beside the scoring: a forward pass over the data for each.
    """
    scored = score_all(workers, known_metrics(), seconds, enough)
    chosen = {
        name: optimum(scores.sensitivity, costs, budgets, risk)
        for name, scores in scored.scores.items()
    }
    candidates = [
        Candidate(name=name, split="calibration", allocation=allocation)
        for name, allocation in chosen.items()
    ]
    measured = {e.candidate: e for e in measure(workers, candidates)}
    picked = min(measured, key=lambda name: measured_value(measured[name]))
    responses = next((s.responses for s in scored.scores.values() if s.responses), None)
    return PickedMetric(
        scores=replace(scored.scores[picked], responses=responses),
        allocations={f"optimum of {name}": allocation for name, allocation in chosen.items()},
        lines=(
            f"picked {picked}: of all metrics' optima its one measured best",
            *(f"{name}: its optimum measured {e.mean:.6g}" for name, e in measured.items()),
            *(f"{name} left out: {reason}" for name, reason in scored.refused.items()),
        ),
    )


def score_all(
    workers: Workers, names: Sequence[str], seconds: float, enough: Enough | None = None
) -> Scored:
    """Score by the first metric that can, and by those after it that fit into `seconds`.

    One task of a metric is timed; it is scored if that time is left for each of its tasks (as if
    there were one worker), so the time is exceeded by one task at most. Tasks that were done
    before cost nothing. Raises what the first metric raises where none can score these cells.
    """
    deadline = time.monotonic() + seconds
    refused: dict[str, MpqError | str] = {}
    scores: dict[str, Scores] = {}
    tasks: dict[str, Sequence[Task]] = {}  # asked for once: keys may differ at each call
    for name in names:
        if scores and time.monotonic() > deadline:
            refused[name] = f"not tried: the {seconds:g} s are over"
            continue
        try:
            tasks[name] = get_metric(name).tasks(workers.workload)
            needed = _seconds_left(workers, name, tasks[name]) if scores else 0.0
            left = max(0.0, deadline - time.monotonic())
            if needed <= left or not scores:
                scores[name] = score(workers, name, enough, tasks=tasks[name])
            else:
                refused[name] = (
                    f"would take about {needed:.0f} s more, {left:.0f} s of {seconds:g} s are left"
                )
        except (InvalidInputError, RunFailedError) as error:
            refused[name] = error
    if not scores:
        raise next(reason for reason in refused.values() if isinstance(reason, MpqError))
    return Scored(
        scores=scores, tasks=tasks, refused={name: str(why) for name, why in refused.items()}
    )


def _seconds_left(workers: Workers, name: str, of_metric: Sequence[Task]) -> float:
    """Do one task of a metric, unless all are done, and return what the others will take."""
    tasks = {task.key: task for task in of_metric}
    done = workers.store.partial_seconds(tasks)
    missing = [key for key in tasks if key not in done]
    if not missing:
        return 0.0
    workers.finished(f"trying ({name})", run_task, [work_of(name, tasks[missing[0]])])
    return workers.store.partial_seconds(missing[:1])[missing[0]] * (len(missing) - 1)


def optimum(
    table: SensitivityTable,
    costs: Mapping[str, CostTable],
    budgets: Sequence[Budget],
    risk: float | None = None,
) -> Allocation:
    """Return the allocation of least additive score; raises InfeasibleError where none fits."""
    problem = Problem(sensitivity=table.clamped(), costs=costs, budgets=tuple(budgets))
    solution = solve(problem, risk=risk)
    if solution.infeasibility is not None:
        raise InfeasibleError("infeasible", solution.infeasibility.told)
    if solution.allocation is None:
        raise RunFailedError("solver", "solver 'auto' found no allocation in its time")
    return solution.allocation


def measured_value(evaluation: Evaluation) -> float:
    """Return the measured divergence, infinite where an output is not a number."""
    return math.inf if math.isnan(evaluation.mean) else evaluation.mean
