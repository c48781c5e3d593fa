"""The other direction: the least of a cost at which every limit is met, found by measurement.

Candidates are all uniform schemes, the exact frontier of the cost (at each of its points with pairs
of units where they are known), and steps that take cost off the best of them, linearised around it.
Predictions only order them: what is chosen was measured, and it is the cheapest of all measured
that meet the limits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from mpq.candidates import Proposal, additively, predicted_loss
from mpq.choosing import Measure, keep_best, on_calibration
from mpq.core.errors import InvalidInputError
from mpq.core.evaluation import CHEAPER, POINT, UNIFORM, Evaluation
from mpq.core.jobs import JobSpec
from mpq.core.joint import JointCosts
from mpq.core.limits import Limit
from mpq.core.problem import Allocation, Budget, Problem, Solution, Status
from mpq.core.quantities import quantity
from mpq.core.risk import quantile
from mpq.core.tables import CostTable, Floats, Indices
from mpq.criterion import Criterion
from mpq.least import cheapest
from mpq.refine import Relinearise, nearby
from mpq.store.store import Store
from solvers import get_solver
from solvers.frontier import frontier
from solvers.pairs import Pairs
from solvers.risk import at_risk
from solvers.trust import cross_validated

OBJECTIVE = "minimised"  # the cost, or the weighted sum of costs, as a table of its own
_POINTS = 128  # of the frontier: 7 measurements find the border among them
_FIRST_STEP = 1 / 8  # of what can be taken off: of the first step of the refinement


def minimise(
    problem: Problem,
    spec: JobSpec,
    measured: Measure,
    around: Relinearise,
    store: Store,
    run_id: str,
    with_metrics: bool = False,
) -> tuple[Proposal, Criterion]:
    """Return the cheapest proposal that meets every limit on calibration data; it is the chosen.

    Measures each uniform scheme, at most 10 points of the frontier below the cheapest of those
    that meets the limits, and `refine` steps. Everything measured is kept with the run before the
    choice. Raises InfeasibleError naming the best value reached where nothing meets the limits.
    """
    priced = with_objective(problem, spec.minimised)
    limits = tuple(Limit.parse(text) for text in spec.limits)
    criterion = Criterion(limits=limits, cost=partial(_cost, priced))
    trials = _Trials(problem, priced, criterion, spec.minimised, measured, with_metrics, spec.risk)
    uniform = {f"{UNIFORM}{scheme}": a for scheme, a in problem.uniform().items()}
    trials.measure([trials.proposal(name, a, "uniform") for name, a in uniform.items()])
    solutions = frontier(priced, OBJECTIVE, _POINTS).solutions
    below = math.inf if trials.best is None else trials.cost(trials.best)
    points = [
        (f"{POINT}{number} of {len(solutions)}", solution.allocation)
        for number, solution in enumerate(solutions, 1)
        if solution.allocation is not None and _cost(priced, solution.allocation) < below
    ]
    cheapest(points, lambda point: trials.meets(*point), met_above=trials.best is not None)
    low = min(_cost(priced, s.allocation) for s in solutions if s.allocation is not None)
    try:
        trials.take_off(low, spec.refine, around)
    except InvalidInputError as error:
        if error.code != "no_gradient":
            raise
        store.log(run_id, "not refined", str(error))
    chosen = keep_best(trials.proposals, trials.evaluations, criterion, store, run_id)
    for line in trials.told(chosen):
        store.log(run_id, "minimised", line)
    return chosen, criterion


def with_objective(problem: Problem, weights: dict[str, float]) -> Problem:
    """Return the problem with the weighted sum of its costs as one more cost."""
    tables = [(problem.costs[cost], weight) for cost, weight in weights.items()]
    units = {table.unit for table, _ in tables}
    values = sum((weight * table.values for table, weight in tables), np.zeros(len(problem.cells)))
    table = CostTable.exact(
        OBJECTIVE,
        units.pop() if len(units) == 1 else "",
        problem.cells,
        values,
        fixed=math.fsum(weight * table.fixed for table, weight in tables),
    )
    pairs = [table.joint.scaled(weight) for table, weight in tables if table.joint]
    table = replace(table, joint=JointCosts.summed(pairs))
    return replace(problem, costs={**problem.costs, OBJECTIVE: table})


def _cost(priced: Problem, allocation: Allocation) -> float:
    return priced.total(OBJECTIVE, allocation.choice(priced.cells))


@dataclass(frozen=True, slots=True)
class _Trials:
    """What was measured so far, and what is measured next."""

    problem: Problem
    priced: Problem
    criterion: Criterion
    weights: dict[str, float]
    measured: Measure
    with_metrics: bool
    risk: float | None
    proposals: list[Proposal] = field(default_factory=list)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)

    def cost(self, proposal: Proposal) -> float:
        """Return what is minimised."""
        return _cost(self.priced, proposal.allocation)

    def allowed(self, proposal: Proposal) -> bool:
        """Tell whether a measured proposal could be chosen."""
        evaluation = self.evaluations[proposal.name]
        finite = math.isfinite(evaluation.mean)
        return proposal.fits and finite and self.criterion.allows(evaluation)

    @property
    def best(self) -> Proposal | None:
        """The cheapest that meets every limit."""
        return min(filter(self.allowed, self.proposals), key=self.cost, default=None)

    def proposal(self, name: str, allocation: Allocation, solver: str) -> Proposal:
        """Return an allocation with its gap to the best additive score at its own cost."""
        choice = allocation.choice(self.problem.cells)
        own = [Budget(cost, self._limit(cost, choice), "least found") for cost in self.weights]
        problem = self.problem.with_budgets((*self.problem.budgets, *own))
        solution = Solution(
            status=Status.FEASIBLE, solver=solver, budgets=problem.budgets, allocation=allocation
        )
        fits, bound = self.problem.meets(choice), -math.inf
        if fits:
            least = get_solver("auto").solve(at_risk(problem, self.risk))
            bound = bound if least.allocation is None else least.bound
        return Proposal(
            name=name,
            solution=additively(problem, solution, bound),
            predicted=predicted_loss(problem, choice, self._interactions),
            fits=fits,
        )

    def measure(self, proposals: Sequence[Proposal]) -> None:
        """Measure proposals, all at once, and remember them."""
        if proposals:
            found = self.measured([on_calibration(p, self.with_metrics) for p in proposals])
            self.evaluations.update(found)
            self.proposals.extend(proposals)

    def meets(self, name: str, allocation: Allocation) -> bool:
        """Measure a point of the frontier, or what is best with pairs at no more than its cost."""
        solver = "auto"
        if self.problem.responses is not None:
            solver = "pairs"
            paired = self._with_pairs(self.priced, _cost(self.priced, allocation))
            allocation = allocation if paired is None else paired
        proposal = self.proposal(name, allocation, solver)
        self.measure([proposal])
        return self.allowed(proposal)

    def take_off(self, low: float, steps: int, around: Relinearise) -> None:
        """Try to make the best cheaper in up to `steps` steps, each measured.

        The network is linearised around the best, and of the allocations near it that cost a step
        less the one of least predicted loss is measured. Where it fails the step is halved.
        """
        best, responses = self.best, None
        if best is None:
            return
        step = _FIRST_STEP * (self.cost(best) - low)
        for number in range(1, steps + 1):
            limit = self.cost(best) - step
            if not low <= limit < self.cost(best):
                return
            responses = around(best.allocation) if responses is None else responses
            region = math.ceil(len(self.problem.cells.units) / 3)
            local = cross_validated(nearby(self.priced, best.allocation, responses, region))
            allocation = self._with_pairs(local, limit)
            if allocation is not None:
                proposal = self.proposal(f"{CHEAPER}{number}", allocation, "pairs")
                self.measure([proposal])
                if self.allowed(proposal):
                    best, responses = proposal, None
                    continue
            step /= 2

    def _with_pairs(self, problem: Problem, limit: float) -> Allocation | None:
        budgets = (*problem.budgets, Budget(OBJECTIVE, max(limit, math.ulp(0.0))))
        return Pairs(prove=False).solve(problem.with_budgets(budgets)).allocation

    def _limit(self, cost: str, choice: Indices) -> float:
        """Return the tightest budget that a choice meets, at the risk that was asked for."""
        total = self.problem.total(cost, choice)
        if self.risk is not None:
            total = quantile(self.problem.costs[cost], choice, self.risk)
        return max(total, math.ulp(0.0))  # a budget is positive

    @property
    def _interactions(self) -> Floats | None:
        responses = self.problem.responses
        return None if responses is None else responses.interactions()

    def told(self, chosen: Proposal) -> list[str]:
        """Return what was minimised, beside uniform schemes, and which limit binds, as lines."""
        cost = self.cost(chosen)
        uniform = [p for p in self.proposals if p.name.startswith(UNIFORM) and self.allowed(p)]
        beside = "no uniform scheme meets the limits"
        if uniform:
            least = min(uniform, key=self.cost)
            share = cost / self.cost(least) if self.cost(least) > 0 else 1.0
            beside = (
                f"{share:.1%} of {least.name} ({self._amount(least)}), the cheapest uniform scheme "
                "that meets the limits"
            )
        measured = len({p.allocation for p in self.proposals})
        lines = [
            f"{' + '.join(self.weights)}: {chosen.name} has {self._amount(chosen)}, {beside}; "
            f"{measured} allocations measured"
        ]
        cheaper = [p for p in self.proposals if p.fits and self.cost(p) < cost]
        if not cheaper:
            return [*lines, "no limit binds: nothing cheaper was there to measure"]
        next_one = max(cheaper, key=self.cost)
        metrics = self.evaluations[next_one.name].metrics
        return [*lines] + [
            f"{limit} binds: {next_one.name} with {self._amount(next_one)} has {limit.metric} "
            f"{metrics[limit.metric]:.6g}"
            for limit in self.criterion.limits
            if not limit.met(metrics.get(limit.metric, math.nan))
        ]

    def _amount(self, proposal: Proposal) -> str:
        totals = self.problem.totals(proposal.allocation.choice(self.problem.cells))
        costs = self.problem.costs
        return " and ".join(quantity(totals[cost], costs[cost].unit) for cost in self.weights)
