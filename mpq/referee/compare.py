"""Run the referee on one workload and keep what it found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import nn

from mpq.artifacts import parts_of
from mpq.auto import AUTO, known_metrics, measured_value, optimum
from mpq.candidates import propose
from mpq.core.errors import InfeasibleError, InvalidInputError
from mpq.core.evaluation import CHOSEN
from mpq.core.jobs import JobSpec
from mpq.core.live import live_text
from mpq.core.problem import Budget, BudgetText, Problem, budget_text
from mpq.core.profiles import as_texts, given_profiles
from mpq.core.quantities import quantity
from mpq.core.referee import Budgets, RefereeReport
from mpq.core.tables import SensitivityTable
from mpq.intake import load
from mpq.jobfile import parse_job
from mpq.pipeline import run
from mpq.prepare import Prepared
from mpq.progress import Bars, Progress, Silent
from mpq.referee.examine import Examination, examine, verdict_line
from mpq.referee.ranks import LEAST_PAIRS
from mpq.store.store import Store, open_store
from sensitivity import get_metric

BudgetSetting = str | Budget | Sequence[str | Budget]

_SPREAD = (0.125, 0.25, 0.5)  # of the way from the cheapest to the dearest allocation
_OF_A_SEARCH = (  # keys of a job that mean nothing here
    *("metric", "metric_seconds", "precision", "solver", "refine", "held_out", "evaluate"),
    *("quality", "quality_groups", "limits", "minimise", "risk"),
)


def compare_metrics(
    model: nn.Module | str,
    calibration: Any,
    *,
    budgets: Sequence[BudgetSetting],
    metrics: Sequence[str] | None = None,
    seconds: float = 300.0,
    allocations: int = 12,
    loss: Any = None,
    sample: Any = None,
    storage: str | Store | None = None,
    progress: Progress | bool = False,
    **job: Any,
) -> RefereeReport:
    """Judge sensitivity metrics on a network by what their choices really do to it.

    Each of `budgets` is judged on its own: a text, a Budget, or a list of them that hold
    together; all limit the same costs. `metrics` are names (default: all that can score these
    schemes), `seconds` the time that scoring may take, `allocations` the random allocations at
    each of the budgets. `model`, `calibration`, `loss` and `sample` are as for `search`, `job`
    other keys of a job (schemes, clip, skip, pin, executor, seed, ...). Everything is judged on
    the calibration data, see RefereeReport for what is compared. The best candidate within the
    first of the budgets becomes the result of a stored run.
    """
    together = _together(budgets)
    for key in _OF_A_SEARCH:
        if key in job:
            raise InvalidInputError("job_key", f"compare_metrics makes no use of {key!r}")
    profiles = given_profiles(job.get("profiles"))
    texts = [
        [budget_text(b, profiles) if isinstance(b, Budget) else b for b in one] for one in together
    ]
    parsed = [[BudgetText.parse(text) for text in one] for one in texts]
    for one, given_texts in zip(parsed, texts, strict=True):
        if {b.cost for b in one} != {b.cost for b in parsed[0]}:
            raise InvalidInputError(
                "budgets",
                f"all of the budgets limit the same costs: {' and '.join(texts[0])!r} does, but "
                f"not {' and '.join(given_texts)!r}",
            )
    live = {"model": model, "calibration": calibration, "loss": loss, "sample": sample}
    named: dict[str, Any] = {
        key: live_text(value) for key, value in live.items() if value is not None
    }
    named |= {"profiles": as_texts(profiles)}
    spec = parse_job({**job, **named, "budgets": texts[0], "metric": AUTO}, "compare_metrics")
    listener = progress if not isinstance(progress, bool) else Bars() if progress else Silent()
    asked = Asked.of(metrics, seconds, allocations)

    def settings(prepared: Prepared) -> list[Budgets]:
        return [tuple(budget.resolve(prepared.costs) for budget in one) for one in parsed]

    live["profiles"] = profiles
    return _compare(spec, live, asked, settings, open_store(storage), listener)


def compare_job(
    spec: JobSpec,
    *,
    metrics: Sequence[str] | None = None,
    seconds: float = 300.0,
    allocations: int = 12,
    storage: str | Store | None = None,
    progress: Progress | None = None,
) -> RefereeReport:
    """Judge metrics on the network of a job.

    They are judged at the job's budgets, and at limits of the first budgeted cost an eighth, a
    quarter and half of the way from its cheapest to its dearest allocation, as far as the other
    budgets allow: in tight places, where metrics differ. Keys that are for a search only, such as
    limits, are ignored, which the run's log tells.
    """
    if not spec.budgets:
        raise InvalidInputError(
            "budgets", "metrics are judged under budgets and the job has none: add one to it"
        )
    asked = Asked.of(metrics, seconds, allocations)
    plain = JobSpec(model=spec.model, calibration=spec.calibration, budgets=spec.budgets)
    defaults: dict[str, Any] = {key: getattr(plain, key) for key in _OF_A_SEARCH}
    ignored = [key for key, value in defaults.items() if getattr(spec, key) != value]
    spec = replace(spec, **defaults | {"metric": AUTO})
    store = open_store(storage)
    live = parts_of(store, spec)
    return _compare(spec, live, asked, _spread, store, progress or Silent(), ignored)


def _together(budgets: Any) -> list[list[str | Budget]]:
    """Return the budgets of each setting; raises InvalidInputError where there are none."""
    if isinstance(budgets, str | Budget) or not isinstance(budgets, Sequence) or not budgets:
        raise InvalidInputError("budgets", f"budgets is a list, got {budgets!r}: write [it]")
    for one in budgets:
        if not isinstance(one, str | Budget | Sequence) or not one:
            raise InvalidInputError(
                "budgets",
                f"each of budgets is a text such as 'memory <= 60%' or a list of them, got {one!r}",
            )
    return [[one] if isinstance(one, str | Budget) else list(one) for one in budgets]


@dataclass(frozen=True, slots=True)
class Asked:
    """What the referee is asked for, checked."""

    metrics: tuple[str, ...]
    seconds: float
    allocations: int

    @classmethod
    def of(cls, metrics: Sequence[str] | None, seconds: float, allocations: int) -> Asked:
        """Check what was given; raises InvalidInputError."""
        if metrics is not None and (
            isinstance(metrics, str) or not isinstance(metrics, Sequence) or not metrics
        ):
            raise InvalidInputError("metrics", f"metrics is a list, got {metrics!r}: write [it]")
        if not all(isinstance(name, str) and name for name in metrics or ()):
            raise InvalidInputError("metrics", f"each of metrics is a name, got {metrics!r}")
        names = tuple(dict.fromkeys(metrics or known_metrics()))
        for name in names:
            get_metric(name)
        if not isinstance(seconds, Real) or not 0 < seconds < math.inf:
            raise InvalidInputError("seconds", f"a positive number of seconds, got {seconds!r}")
        if not isinstance(allocations, Integral) or allocations < LEAST_PAIRS:
            raise InvalidInputError(
                "allocations",
                f"allocations: a whole number from {LEAST_PAIRS} on, got {allocations!r}",
            )
        return cls(names, float(seconds), int(allocations))


def _spread(prepared: Prepared) -> list[Budgets]:
    """Return the budgets of a job, and others along its first cost that can be met."""
    first, *others = prepared.budgets
    table = prepared.costs[first.cost]
    starts = table.cells.offsets[:-1]
    low = table.fixed + math.fsum(np.minimum.reduceat(table.values, starts))
    high = table.fixed + math.fsum(np.maximum.reduceat(table.values, starts))
    nothing = np.zeros(len(table.cells))
    untried = SensitivityTable(metric="none", cells=table.cells, values=nothing, stderr=nothing)
    found = [prepared.budgets]
    for share in _SPREAD:
        limit = low + share * (high - low)
        text = f"{first.cost} <= {quantity(limit, table.unit)}"
        budgets = (Budget(first.cost, limit, text), *others)
        with suppress(InfeasibleError):
            optimum(untried, prepared.costs, budgets)
            found.append(budgets)
    return found


def _compare(
    spec: JobSpec,
    live: dict[str, Any],
    asked: Asked,
    settings: Callable[[Prepared], list[Budgets]],
    store: Store,
    progress: Progress,
    ignored: Sequence[str] = (),
) -> RefereeReport:
    reports = []

    def stages(spec: JobSpec, prepared: Prepared) -> None:
        if ignored:
            line = f"the job's {', '.join(ignored)}: not for comparing metrics"
            progress.note(f"ignored {line}")
            store.log(prepared.run_id, "ignored", line)
        examination = examine(
            prepared.workers,
            prepared.costs,
            settings(prepared),
            asked.metrics,
            seconds=asked.seconds,
            allocations=asked.allocations,
            seed=spec.seed,
            run_id=prepared.run_id,
        )
        _keep(examination, prepared)
        reports.append(examination.report)

    run(spec, load(**live, seed=spec.seed), store, progress, stages)
    return reports[0]


def _keep(examination: Examination, prepared: Prepared) -> None:
    """Keep scores, measurements and the best candidate within the first budgets with the run."""
    store, run_id = prepared.workers.store, prepared.run_id
    report, scores = examination.report, examination.scores
    store.put_sensitivity(run_id, scores.sensitivity)
    if scores.responses is not None:
        store.put_responses(run_id, scores.responses)
    problem = Problem(
        sensitivity=scores.sensitivity.clamped(), costs=prepared.costs, budgets=report.budgets[0]
    )
    evaluations = [
        replace(e, predicted=problem.score(e.allocation.choice(problem.cells)))
        if problem.sensitivity.is_divergence
        else e
        for e in examination.evaluations
    ]
    for evaluation in evaluations:
        store.put_evaluation(run_id, evaluation)
    chosen = min(
        (e for e in evaluations if problem.fits(e.allocation)), key=lambda e: measured_value(e)
    )
    proposals = propose(problem, "ilp", {chosen.candidate: chosen.allocation})
    solution = next(p.solution for p in proposals if p.allocation == chosen.allocation)
    store.put_solution(run_id, CHOSEN, solution)
    store.put_evaluation(run_id, replace(chosen, candidate=CHOSEN))
    for verdict in report.verdicts:
        store.log(run_id, "referee", verdict_line(verdict))
    for name, reason in report.refused.items():
        store.log(run_id, "referee", f"{name} left out: {reason}")
    store.log(run_id, "chosen", f"{chosen.candidate} measured best on calibration")
