"""The stages of a search in order; reads as the data flow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import nn

from mpq.adaptive import EnoughScores
from mpq.artifacts import parts_of
from mpq.asked import check_asked
from mpq.auto import AUTO, pick_metric
from mpq.candidates import Proposal, propose
from mpq.choices import scheme_texts
from mpq.choosing import Measure, best_uniform, choose
from mpq.core.errors import MpqError, RunFailedError
from mpq.core.evaluation import CHOSEN, Evaluation
from mpq.core.jobs import (
    Clip,
    Correction,
    Divergence,
    JobSpec,
    OnIndivisible,
    RunState,
    given_groups,
)
from mpq.core.limits import Limit
from mpq.core.live import live_text
from mpq.core.problem import Allocation, Budget, BudgetText, Problem, budget_text
from mpq.core.profiles import Profile, given_profiles
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
from mpq.intake import Given, graph_of, load, make_workload, sample_of, served_of, with_transforms
from mpq.limited import against_unquantized
from mpq.making import keep_made
from mpq.minimise import minimise as least_cost
from mpq.nn.workload import Workload
from mpq.prepare import Prepared, prepare
from mpq.progress import Bars, Progress, Silent
from mpq.residency import bytes_beside
from mpq.result import SearchResult
from mpq.scoring import relinearise, score
from mpq.store.store import Store, open_store
from mpq.tasks import Workers
from mpq.trials import check_trials, searching
from mpq.warned import warnings_kept
from mpq.weigh import weigh
from sensitivity import get_metric
from solvers import get_solver
from solvers.risk import at_risk
from solvers.trust import cross_validated


def search(
    model: nn.Module | str,
    calibration: Any,
    *,
    budgets: Sequence[str | Budget] | None = None,
    minimise: str | Mapping[str, float] | None = None,
    schemes: Sequence[str] | None = None,
    metric: str = "gauss_newton",
    solver: str = "auto",
    loss: Any = None,
    evaluate: Any = None,
    held_out: Any = None,
    sample: Any = None,
    profiles: Mapping[str, Profile] | None = None,
    divergence: Divergence = "auto",
    skip: Sequence[str] = (),
    pin: Mapping[str, str] | None = None,
    groups: Literal["auto", "none"] | Sequence[Sequence[str]] = "auto",
    embeddings: bool = False,
    kv_cache: bool | Mapping[str, int] = False,
    kv_schemes: Sequence[str] | None = None,
    activations: Literal["tied", "apart"] = "tied",
    activation_schemes: Sequence[str] | None = None,
    clip: Clip = "minmax",
    transforms: Sequence[str] = (),
    observer: str = "minmax",
    corrections: Sequence[Correction] = (),
    on_indivisible: OnIndivisible = "refuse",
    quality: Mapping[str, Any] | None = None,
    quality_groups: Literal["auto"] | Mapping[str, Sequence[str]] = "auto",
    limits: Sequence[str] = (),
    hardware: str = "local",
    executor: Literal["ray", "serial"] = "ray",
    num_workers: int | None = None,
    ray_address: str | None = None,
    worker_resources: Mapping[str, float] | None = None,
    task_tries: int = 3,
    task_grace_seconds: float = 600.0,
    num_probes: int = 2,
    refine: int = 4,
    latency_seconds: float = 60.0,
    metric_seconds: float = 120.0,
    precision: float | Literal["settled"] | None = None,
    num_trials: int = 100,
    trial_seconds: float = 600.0,
    study: str | None = None,
    risk: float | None = None,
    seed: int = 0,
    storage: str | Store | None = None,
    name: str = "",
    progress: Progress | bool = False,
) -> SearchResult:
    """Choose a scheme for every layer under all budgets, measure it, and keep everything.

    `model` is an nn.Module, "package.module:factory" or a Hugging Face directory; `calibration`
    and `held_out` are lists of batches, entry points of functions that return them or synthetic
    data: "zeroq", "genie(samples=128)", "random_tokens" (mpq.core.synthetic); `sample`
    is one batch of the shape that will be served (default: one calibration sample), which MACs
    and latency are for. `profiles` such as {"prefill": Profile(tokens=512), "decode":
    Profile(tokens=1, weight=64.0)} are the shapes of a network that is served in several: each
    is a cost by its name ("decode <= 20 ms"), and latency is their weighted mean. Budgets are
    texts such as "memory <= 60%", "latency <= 3 ms", "memory <= uniform int4" or Budget records.
    `schemes` defaults to what the hardware runs: "local" is this machine, measured, "device:NAME" a
    node of the Ray cluster, measured there; "roofline:H100" a model of one that is not here,
    "table:FILE.csv" times of your own, "bitplanes:a=...,c=..." kernels of bit planes.
    `loss(output, batch)` is used by the Hessian metric only; `evaluate(model)` returns
    {"name": number} and is reported. `divergence` compares outputs ("auto": cosine for outputs of
    unit length, else kl of logits). `clip` is how weight ranges are cut, `on_indivisible`
    what becomes of groups that do not divide a layer: "refuse", or "channel", a scale for each
    channel. `kv_cache=True`, or {"context": 4096, "batch": 8}, searches the KV caches of a language
    model too, `activations` "apart" the inputs of layers apart from weights (see JobSpec for their
    schemes). `transforms`, `observer` and `corrections` are the calibration pipeline (JobSpec).
    `quality` is {name: function}, by name (mpq.nn.quality), entry point or as it is; with it the
    sum of the qualities, each over the best uniform scheme's, decides instead of the divergence,
    and `quality_groups`, {name: [patterns of units]}, says which units each one scores ("auto":
    those that move it most). `limits` such as "accuracy >= 0.99" or "accuracy drop <= 1%" must be
    met on calibration data. `minimise`, "memory" or {"memory": 1.0, "latency": 2e6}, turns the
    question round: the least of a cost at which all limits are met, whatever the budgets. The
    metric "auto" scores by several within `metric_seconds` and lets measurements pick. Scoring ends
    early at a `precision`: a relative standard error, or "settled" (mpq.adaptive). The solvers
    "evolution", "optuna" and "nsga2" measure at most `num_trials` allocations within
    `trial_seconds`; `study` is the URL of a database that Optuna's trials are copied to. Each
    budget on measured times holds with probability `risk` (None: 0.95; 0.5 takes them as they are;
    solvers.risk). Tasks run on the Ray cluster at `ray_address` ("auto", "host:port"), by workers
    that take `worker_resources` such as {"gpu": 1}; tries and grace of tasks: see JobSpec.

    Raises InvalidInputError for what cannot be done as asked, InfeasibleError where no
    allocation meets the budgets (before anything is scored), RunFailedError for broken work.
    """
    lists = {"skip": skip, "limits": limits, "kv_schemes": kv_schemes}
    lists |= {"transforms": transforms, "corrections": corrections}
    lists["activation_schemes"] = activation_schemes
    check_asked(budgets, minimise, pin, quality, groups, lists)
    budgets = () if budgets is None else budgets
    profiles = given_profiles(profiles)
    spec = JobSpec(
        name=name,
        model=live_text(model),
        calibration=live_text(calibration),
        held_out=None if held_out is None else live_text(held_out),
        sample=None if sample is None else live_text(sample),
        profiles=dict(profiles),
        evaluate=None if evaluate is None else live_text(evaluate),
        loss=None if loss is None else live_text(loss),
        divergence=divergence,
        budgets=tuple(b if isinstance(b, str) else budget_text(b, profiles) for b in budgets),
        minimise=dict(minimise) if isinstance(minimise, Mapping) else minimise,
        schemes=None if schemes is None else scheme_texts(schemes),
        metric=metric,
        solver=solver,
        clip=clip,
        transforms=tuple(transforms),
        observer=observer,
        corrections=tuple(corrections),
        on_indivisible=on_indivisible,
        skip=tuple(skip),
        pin={layer: str(scheme) for layer, scheme in (pin or {}).items()},
        groups=groups if groups in ("auto", "none") else tuple(tuple(g) for g in groups),
        embeddings=embeddings,
        kv_cache=dict(kv_cache) if isinstance(kv_cache, Mapping) else kv_cache,
        kv_schemes=None if kv_schemes is None else tuple(kv_schemes),
        activations=activations,
        activation_schemes=None if activation_schemes is None else tuple(activation_schemes),
        hardware=hardware,
        quality={quality_name: live_text(q) for quality_name, q in (quality or {}).items()},
        quality_groups=given_groups(quality_groups),
        limits=tuple(limits),
        executor=executor,
        num_workers=num_workers,
        ray_address=ray_address,
        worker_resources=dict(worker_resources or {}),
        task_tries=task_tries,
        task_grace_seconds=task_grace_seconds,
        seed=seed,
        num_probes=num_probes,
        refine=refine,
        latency_seconds=latency_seconds,
        metric_seconds=metric_seconds,
        precision=precision,
        num_trials=num_trials,
        trial_seconds=trial_seconds,
        study=study,
        risk=risk,
    )
    given = load(
        model,
        calibration,
        held_out=held_out,
        sample=sample,
        loss=loss,
        evaluate=evaluate,
        quality=quality,
        profiles=profiles,
        seed=seed,
    )
    listener = progress if not isinstance(progress, bool) else Bars() if progress else Silent()
    return run(spec, given, open_store(storage), listener)


def run_job(
    spec: JobSpec,
    storage: str | Store | None = None,
    progress: Progress | None = None,
    run_id: str | None = None,
    executor: Executor | None = None,
) -> SearchResult:
    """Run a job whose parts are kept or entry points, here; `run_id` is a run that we drive."""
    store = open_store(storage)
    given = load(**parts_of(store, spec), seed=spec.seed)
    progress = progress or Silent()
    return run(spec, given, store, progress, run_id=run_id, executor=executor)


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
