"""Choose: measure every proposal on calibration data, refine the best, keep the best allowed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from mpq.candidates import Proposal, best
from mpq.core.errors import InvalidInputError
from mpq.core.evaluation import CHOSEN, Evaluation
from mpq.core.jobs import JobSpec
from mpq.core.limits import Limit
from mpq.core.problem import Allocation, Problem
from mpq.criterion import Criterion
from mpq.evaluate import Candidate
from mpq.families import family_of_candidate, family_schemes, of_family
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
        try:
            for start in _starts(problem, proposals, evaluations, criterion, around):
                for proposal, evaluation in refine(
                    start.problem,
                    start.proposal,
                    evaluations[start.proposal.name],
                    start.around,
                    lambda p: measured([as_candidate(p)])[p.name],
                    spec.refine,
                    criterion,
                    start.name,
                ):
                    proposals.append(proposal)
                    evaluations[proposal.name] = evaluation
        except InvalidInputError as error:
            if error.code != "no_gradient":
                raise
            store.log(run_id, "not refined", str(error))
    chosen = keep_best(proposals, evaluations, criterion, store, run_id)
    fitting = [proposal.name for proposal in proposals if proposal.fits]
    by = f" by {' + '.join(criterion.scales)}" if criterion.scales else ""
    store.log(
        run_id, "chosen", f"{chosen.name} measured best on calibration{by} of {', '.join(fitting)}"
    )
    return chosen, criterion


@dataclass(frozen=True, slots=True)
class _Start:
    """Where a refinement begins, and within which choices."""

    name: str
    problem: Problem
    proposal: Proposal
    around: Relinearise


def _starts(
    problem: Problem,
    proposals: Sequence[Proposal],
    evaluations: Mapping[str, Evaluation],
    criterion: Criterion,
    around: Relinearise,
) -> list[_Start]:
    """Return the best proposal, and the best of a single family of formats within its family.

    Fewer choices are fewer ways to fit the calibration data too well.
    """
    allowed = [p for p in proposals if criterion.allows(evaluations[p.name])]
    candidates = allowed if any(p.fits for p in allowed) else proposals
    free = replace(criterion, limits=())
    found = [_Start("refined", problem, best(candidates, evaluations, free), around)]
    alone = [p for p in candidates if p.fits and family_of_candidate(p.name)]
    if alone:
        proposal = best(alone, evaluations, free)
        family = family_of_candidate(proposal.name)
        cells, numbers = problem.cells.restrict(family_schemes(problem.cells, family))
        found.append(
            _Start(
                f"refined only {family}",
                of_family(problem, family),
                proposal,
                lambda base: around(base).restrict(cells, numbers),
            )
        )
    return found


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
