"""Fourth stage: improve the best measured allocation by linearising around it again.

Around the original network the second-order model fails at low bits. Around the quantized network
the divergence of a nearby allocation is its slope plus its curvature (sensitivity.responses); the
solver minimises both within a trust region on the number of units that change, the result is
measured, and only what measures better is kept (`gains`, by what decides the choice).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mpq.candidates import Proposal, additively
from mpq.core.evaluation import Evaluation
from mpq.core.problem import Allocation, Budget, Problem, Status
from mpq.core.tables import CostTable, Responses, SensitivityTable
from mpq.criterion import Criterion
from solvers.pairs import Pairs
from solvers.trust import cross_validated

Relinearise = Callable[[Allocation], Responses]
MeasureOne = Callable[[Proposal], Evaluation]
_CHANGES = "changed units"


def refine(
    problem: Problem,
    start: Proposal,
    measured: Evaluation,
    relinearise: Relinearise,
    measure: MeasureOne,
    steps: int,
    criterion: Criterion,
    name: str = "refined",
) -> list[tuple[Proposal, Evaluation]]:
    """Return what at most `steps` steps tried, in order, with its measurement.

    Each step costs one measurement, and after a success one new linearisation. The trust region
    begins at a third of the units and is halved by a failure; a step that the model itself does
    not expect to help ends the refinement.
    """
    best, best_measured, bound = start, measured, start.solution.bound
    responses: Responses | None = None
    region = math.ceil(len(problem.cells.units) / 3)
    tried: list[tuple[Proposal, Evaluation]] = []
    while len(tried) < steps and region >= 1:
        if responses is None:
            responses = relinearise(best.allocation)
        around_best = nearby(problem, best.allocation, responses, region)
        solution = Pairs(prove=False).solve(cross_validated(around_best))
        if solution.allocation is None or not solution.score < 0:
            break
        # what is proven is proven of the region, not of the whole problem
        found = replace(solution, budgets=problem.budgets, status=Status.FEASIBLE)
        proposal = Proposal(
            name=f"{name} {len(tried) + 1}",
            solution=additively(problem, found, bound),
            predicted=best_measured.mean + solution.score,
            fits=problem.fits(solution.allocation),
        )
        evaluation = measure(proposal)
        tried.append((proposal, evaluation))
        if gains(criterion, evaluation, best_measured):
            best, best_measured, responses = proposal, evaluation, None
        else:
            region //= 2
    return tried


def gains(criterion: Criterion, new: Evaluation, old: Evaluation) -> bool:
    """Tell whether a step is kept: it measures better and breaks no limit that was met.

    By the divergence it has to gain on both halves of the samples, every second one: what one
    half gains and the other does not is luck.
    """
    if criterion.allows(old) and not criterion.allows(new):
        return False
    if criterion.scales:
        return criterion.value(new) < criterion.value(old)
    assert new.per_sample is not None
    assert old.per_sample is not None
    gain = old.per_sample - new.per_sample
    return len(gain) > 0 and all(half.mean() > 0 for half in (gain[::2], gain[1::2]) if len(half))


def nearby(problem: Problem, base: Allocation, responses: Responses, region: int) -> Problem:
    """Return the problem of changing at most `region` units of `base`."""
    values, stderr = responses.own_scores()
    changed = np.ones(len(problem.cells))
    changed[base.choice(problem.cells)] = 0.0
    costs = {
        **problem.costs,
        _CHANGES: CostTable.exact(_CHANGES, "units", problem.cells, changed),
    }
    return Problem(
        sensitivity=SensitivityTable(
            metric="relinearised", cells=problem.cells, values=values, stderr=stderr
        ),
        costs=costs,
        budgets=(*problem.budgets, Budget(_CHANGES, float(region))),
        responses=responses,
        constraints=problem.constraints,
        forbidden=problem.forbidden,
    )
