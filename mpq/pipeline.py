"""The stages of a search in order; reads as the data flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from mpq.adaptive import EnoughScores
from mpq.auto import AUTO, pick_metric
from mpq.candidates import Proposal, propose
from mpq.choosing import Measure, best_uniform, choose
from mpq.core.errors import MpqError, RunFailedError
from mpq.core.evaluation import CHOSEN, Evaluation
from mpq.core.jobs import (
    JobSpec,
    RunState,
)
from mpq.core.limits import Limit
from mpq.core.problem import Allocation, BudgetText, Problem
from mpq.core.protocols import Executor, Scores
from mpq.costing import Hardware
from mpq.criterion import Criterion
from mpq.data import warn_if_unchecked
from mpq.decoupled import check_groups, decoupled
from mpq.driving import driving
from mpq.evaluate import Candidate, check_evaluate, measure
from mpq.executing import executor_for
from mpq.families import within_families
from mpq.frontiers import keep_frontiers
from mpq.intake import Given, graph_of, make_workload, sample_of, served_of, with_transforms
from mpq.limited import against_unquantized
from mpq.making import keep_made
from mpq.minimise import minimise as least_cost
from mpq.nn.workload import Workload
from mpq.prepare import Prepared, prepare
from mpq.progress import Progress
from mpq.residency import bytes_beside
from mpq.result import SearchResult
from mpq.scoring import relinearise, score
from mpq.store.store import Store
from mpq.tasks import Workers
from mpq.trials import check_trials, searching
from mpq.warned import warnings_kept
from mpq.weigh import weigh
from sensitivity import get_metric
from solvers import get_solver
from solvers.risk import at_risk
from solvers.trust import cross_validated


def run(
    spec: JobSpec,
    given: Given,
    store: Store,
    progress: Progress,
    stages: Callable[[JobSpec, Prepared], None] | None = None,
    run_id: str | None = None,
    executor: Executor | None = None,
) -> SearchResult:
    """Do every stage of a checked job; a failure is kept with the run and raised.

    `stages` are what follows the preparation, by default those of a search. `run_id` is a run
    whose lease the caller holds; what an earlier driver finished is not done again. `executor` is
    one that was made for the job; it is closed at the end.
    """
    with warnings_kept() as keep, ExitStack() as stack:
        executor = executor or executor_for(spec)
        stack.callback(executor.close)
        if spec.metric != AUTO:
            get_metric(spec.metric)
        if spec.solver != "auto":
            get_solver(spec.solver)
        check_trials(spec, store)
        budgets = [BudgetText.parse(text) for text in spec.budgets]
        given = with_transforms(spec, given)
        beside = partial(bytes_beside, model=given.model, sample=sample_of(given))
        graph = graph_of(spec, given)
        served = served_of(spec, given, graph)
        alone = executor.run_exclusively
        hardware = Hardware(spec, budgets, store, progress, beside, served, alone)
        workload = make_workload(spec, given, graph, hardware.schemes)
        check_groups(spec, workload.graph)
        if run_id is None:
            run_id = store.create_run(spec, hardware.device)
            stack.enter_context(driving(store, run_id))
        stack.callback(keep, store, run_id)
        store.start_run(run_id, hardware.device)
        store.put_data(run_id, given.calibration_data, given.held_out_data)
        warn_if_unchecked(given.calibration_data, given.held_out_data)
        try:
            prepared = prepare(
                budgets,
                hardware,
                workload,
                sample_of(given),
                executor,
                store,
                run_id,
                progress,
                spec.risk,
            )
            (stages or _stages)(spec, prepared)
            store.set_state(run_id, RunState.SUCCEEDED)
        except MpqError as error:
            store.set_state(run_id, RunState.FAILED, error)
            raise
        except KeyboardInterrupt:
            store.set_state(run_id, RunState.STOPPED)
            raise
        except Exception as error:
            failure = RunFailedError("run_failed", f"{type(error).__name__}: {error}")
            store.set_state(run_id, RunState.FAILED, failure)
            raise failure from error
    return SearchResult(store, run_id)


def _stages(spec: JobSpec, prepared: Prepared) -> None:
    workers, run_id = prepared.workers, prepared.run_id
    store, workload = workers.store, workers.workload
    check_evaluate(workers)
    asked = [Limit.parse(text) for text in spec.limits]
    limits, with_metrics = against_unquantized(workers, asked, run_id)
    spec = replace(spec, limits=tuple(limit.text for limit in limits), risk=prepared.risk)
    scores, others = _score(spec, prepared)
    plain = Problem(
        sensitivity=scores.sensitivity.clamped(),
        costs=prepared.costs,
        budgets=prepared.budgets,
        responses=scores.responses,
    )
    problem = at_risk(plain, spec.risk)
    store.put_sensitivity(run_id, scores.sensitivity)
    if problem.responses is not None:
        problem = cross_validated(problem)
        assert problem.responses is not None
        store.put_responses(run_id, problem.responses)
        store.log(run_id, "pairs", f"pairs of units are trusted by {problem.responses.trust:g}")
    measured = partial(_measure, workers, run_id)
    around = partial(relinearise, workers)
    if spec.minimise:
        chosen, criterion = least_cost(problem, spec, measured, around, store, run_id, with_metrics)
    else:
        if spec.quality:
            others |= decoupled(workers, problem, spec, run_id).allocations
        if spec.solver == "auto":
            others |= within_families(problem)
        with searching(spec, problem, workers, run_id, with_metrics) as solver:
            proposals = propose(problem, solver, others)
        chosen, criterion = choose(
            problem, proposals, spec, measured, around, store, run_id, with_metrics
        )
    within = plain.with_budgets(chosen.solution.budgets)
    keep_frontiers(within, spec, store, run_id, workers.progress)
    uniform = _compare(chosen, criterion, problem, workload, measured, store, run_id)
    kept = [chosen.allocation, *uniform]
    keep_made(store, run_id, workload.graph, workload.quantizer, kept)
    weigh(chosen, workload, store, run_id)


def _score(spec: JobSpec, prepared: Prepared) -> tuple[Scores, dict[str, Allocation]]:
    """Return the scores, and allocations that are worth measuring beside their own."""
    workers, log = prepared.workers, partial(prepared.workers.store.log, prepared.run_id)
    enough = None
    if spec.precision is not None:
        enough = EnoughScores(
            costs=prepared.costs,
            budgets=prepared.budgets,
            precision=spec.precision,
            seed=spec.seed,
            risk=spec.risk,
        )
    if spec.metric != AUTO:
        return score(workers, spec.metric, enough, partial(log, "precision")), {}
    picked = pick_metric(
        workers, prepared.costs, prepared.budgets, spec.metric_seconds, enough, spec.risk
    )
    for line in picked.lines:
        log("metric", line)
    return picked.scores, dict(picked.allocations)


def _measure(
    workers: Workers, run_id: str, candidates: Sequence[Candidate]
) -> dict[str, Evaluation]:
    """Measure candidates of one split and keep the evaluations with the run."""
    found = measure(workers, candidates)
    for evaluation in found:
        workers.store.put_evaluation(run_id, evaluation)
    return {evaluation.candidate: evaluation for evaluation in found}


def _compare(
    chosen: Proposal,
    criterion: Criterion,
    problem: Problem,
    workload: Workload,
    measured: Measure,
    store: Store,
    run_id: str,
) -> list[Allocation]:
    """Measure the chosen allocation and the best uniform scheme that fits on held-out data.

    Returns the uniform one, if any fits. One that meets the limits comes before those that do not.
    Without held-out batches only the user's metrics are measured.
    """
    best = best_uniform(problem, criterion, store.evaluations(run_id))
    split = "held_out" if workload.held_out else "calibration"
    if not workload.held_out:
        store.log(run_id, "not checked", "no held-out batches were given")
        if workload.evaluate is None:
            return list(best.values())
    candidates = [
        Candidate(
            name=CHOSEN,
            split=split,
            allocation=chosen.allocation,
            predicted=chosen.predicted,
            with_metrics=True,
        ),
        Candidate(name="unquantized", split=split, allocation=Allocation({}), with_metrics=True),
    ]
    candidates += [
        Candidate(name=name, split=split, allocation=allocation, with_metrics=True)
        for name, allocation in best.items()
    ]
    measured(candidates)
    return list(best.values())
