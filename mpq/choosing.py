"""Choose: measure every proposal on calibration data, refine the best, keep the best allowed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from mpq.candidates import Proposal, best
from mpq.core.errors import InvalidInputError
from mpq.core.evaluation import CHOSEN, Evaluation
from mpq.core.jobs import JobSpec
from mpq.core.limits import Limit
from mpq.core.problem import Allocation, Problem
from mpq.criterion import Criterion
from mpq.evaluate import Candidate
from mpq.refine import Relinearise, refine
from mpq.store.store import Store

Measure = Callable[[Sequence[Candidate]], dict[str, Evaluation]]


def choose(
    problem: Problem,
    proposals: list[Proposal],
    spec: JobSpec,
    measured: Measure,
    around: Relinearise,
    store: Store,
    run_id: str,
    with_metrics: bool = False,
) -> tuple[Proposal, Criterion]:
    """Return the proposal that is best on calibration data, and by what; it becomes the chosen.

    Everything measured is kept with the run before the choice, so that a limit that nobody meets
    loses nothing.
    """
    as_candidate = partial(on_calibration, with_metrics=with_metrics)
    evaluations = measured([as_candidate(proposal) for proposal in proposals])
    criterion = _criterion(spec, proposals, evaluations)
    if spec.solver == "auto" and spec.refine:
        allowed = [p for p in proposals if criterion.allows(evaluations[p.name])]
        free = replace(criterion, limits=())
        first = best(allowed if any(p.fits for p in allowed) else proposals, evaluations, free)
        try:
            steps = refine(
                problem,
                first,
                evaluations[first.name],
                around,
                lambda p: measured([as_candidate(p)])[p.name],
                spec.refine,
                criterion,
            )
        except InvalidInputError as error:
            if error.code != "no_gradient":
                raise
            store.log(run_id, "not refined", str(error))
            steps = []
        for proposal, evaluation in steps:
            proposals.append(proposal)
            evaluations[proposal.name] = evaluation
    chosen = keep_best(proposals, evaluations, criterion, store, run_id)
    fitting = [proposal.name for proposal in proposals if proposal.fits]
    by = f" by {' + '.join(criterion.scales)}" if criterion.scales else ""
    store.log(
        run_id, "chosen", f"{chosen.name} measured best on calibration{by} of {', '.join(fitting)}"
    )
    return chosen, criterion


def keep_best(
    proposals: Sequence[Proposal],
    evaluations: Mapping[str, Evaluation],
    criterion: Criterion,
    store: Store,
    run_id: str,
) -> Proposal:
    """Return the best proposal, after keeping the solutions of all that fit with the run."""
    for proposal in proposals:
        if proposal.fits:
            store.put_solution(run_id, proposal.name, proposal.solution)
    chosen = best(proposals, evaluations, criterion)
    store.put_solution(run_id, CHOSEN, chosen.solution)
    store.put_evaluation(run_id, replace(evaluations[chosen.name], candidate=CHOSEN))
    for limit in criterion.limits:
        value = evaluations[chosen.name].metrics[limit.metric]
        store.log(run_id, "limit", f"{limit}: {chosen.name} has {value:.6g}")
    return chosen


def _criterion(
    spec: JobSpec, proposals: Sequence[Proposal], evaluations: Mapping[str, Evaluation]
) -> Criterion:
    limits = [Limit.parse(text) for text in spec.limits]
    fitting = [evaluations[p.name] for p in proposals if p.fits]
    uniform = [e for e in fitting if e.candidate.startswith("uniform ")]
    return Criterion.of(spec.quality, limits, uniform, fitting)


def on_calibration(proposal: Proposal, with_metrics: bool) -> Candidate:
    """Return what is measured of a proposal before the choice."""
    return Candidate(
        name=proposal.name,
        split="calibration",
        allocation=proposal.allocation,
        predicted=proposal.predicted,
        with_metrics=with_metrics,
    )


def best_uniform(
    problem: Problem, criterion: Criterion, evaluations: Sequence[Evaluation]
) -> dict[str, Allocation]:
    """Return the best uniform scheme that fits, by its name, or nothing."""
    evaluated = {e.candidate: e for e in evaluations if e.split == "calibration"}
    fitting = {
        f"uniform {scheme}": allocation
        for scheme, allocation in problem.uniform().items()
        if problem.fits(allocation)
    }
    allowed = [name for name in fitting if criterion.allows(evaluated[name])]
    if not fitting:
        return {}
    name = min(allowed or fitting, key=lambda uniform: criterion.value(evaluated[uniform]))
    return {name: fitting[name]}
