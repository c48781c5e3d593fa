"""What a search returns, and what can be done with it later without the model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq.additivity import Additivity, additivity
from mpq.core.budgets import Budget, BudgetText
from mpq.core.chosen import Chosen
from mpq.core.constraints import Constraint
from mpq.core.deployment import Deployment
from mpq.core.errors import InvalidInputError, MpqWarning
from mpq.core.evaluation import CHOSEN, Evaluation
from mpq.core.formats import Scheme
from mpq.core.frontier import Chain, Frontier, Surface
from mpq.core.jobs import JobSpec
from mpq.core.layers import LayerGraph, LayerName
from mpq.core.least_cost import LeastCost
from mpq.core.problem import Allocation, Problem, Solution
from mpq.core.profiles import Profile
from mpq.core.quantities import quantity
from mpq.core.risk import risk_of
from mpq.core.shadow import ShadowPrices
from mpq.core.stability import Stability
from mpq.pins import Named, resolve_pins
from mpq.stability import stability, usual_draws
from mpq.stated import stated, under
from mpq.store.store import Store
from solvers import solve
from solvers.risk import at_risk, with_quantiles

if TYPE_CHECKING:
    from torch import nn

    from mpq.nn.quantizers import WeightQuantizer
    from mpq.what_if import RunWhatIf


KEPT_POINTS = 25
KEPT_GRID = (12, 12)


def parse_weights(texts: Sequence[str], score: float | None) -> dict[str, float]:
    """Read "name" or "name=weight" of the costs to minimise as the command line gives them."""
    if bool(texts) != (score is not None):
        raise InvalidInputError(
            "least", "--least and --score go together: --least memory --score 0.01"
        )
    weights = {}
    for text in texts:
        name, equals, weight = text.partition("=")
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError:
            raise InvalidInputError(
                "weights", f"what to minimise is written NAME or NAME=WEIGHT, got {text!r}"
            ) from None
    return weights


def least_within(
    problem: Problem,
    of: str | Mapping[str, float],
    score: float,
    risk: float | None,
    *,
    capped: bool,
) -> LeastCost:
    """Return the least of a cost, or weighted sum of costs, with this predicted loss or less.

    Budgets hold with probability `risk`; those on what is minimised are left out unless `capped`.
    """
    from solvers.least_cost import least_cost

    minimised = [of] if isinstance(of, str) else list(of)
    asked = at_risk(problem, risk, () if capped else minimised)
    caps = [
        replace(
            Constraint.at_most(problem.costs[cost], limit),
            name=f"{cost} <= {quantity(limit, problem.costs[cost].unit)}",
        )
        for cost, limit in asked.limits().items()
        if cost in minimised
    ]
    found = least_cost(replace(asked, constraints=(*asked.constraints, *caps)), of, score)
    return replace(found, budgets=asked.budgets)


def _pipeline(spec: JobSpec) -> dict[str, str]:
    """Return what is not the usual of the calibration pipeline, as plain data."""
    names = {"transforms": spec.transforms, "corrections": spec.corrections}
    told = {what: ", ".join(given) for what, given in names.items() if given}
    return told if spec.observer == "minmax" else {**told, "observer": spec.observer}


class SearchResult:
    """A finished search: the chosen allocation, what was predicted and what was measured."""

    def __init__(self, store: Store, run_id: str) -> None:
        self.store = store
        self.run_id = run_id
        self.graph: LayerGraph = store.graph(run_id)
        self.problem: Problem = store.problem(run_id)
        spec = store.run(run_id).spec
        self._asked_risk = spec.risk
        limited = [BudgetText.parse(text).cost for text in spec.budgets]
        self.risk: float | None = risk_of(spec.risk, self.problem.costs, limited)
        self._minimised = tuple(spec.minimised)
        self.solutions: dict[str, Solution] = {
            name: with_quantiles(self.problem, solution, self.risk)
            for name, solution in store.solutions(run_id)
        }
        self.evaluation: list[Evaluation] = store.evaluations(run_id)
        if CHOSEN not in self.solutions:
            state = store.run(run_id).state
            raise InvalidInputError("run_unfinished", f"run {run_id} has no result: it is {state}")

    def __repr__(self) -> str:
        return f"SearchResult(run_id={self.run_id!r}, {self.solution.status})"

    @property
    def solution(self) -> Solution:
        """The solution that measured best, with its totals, bound and gap."""
        return self.solutions[CHOSEN]

    @property
    def unit_allocation(self) -> Allocation:
        """The chosen scheme of each unit."""
        assert self.solution.allocation is not None
        return self.solution.allocation

    @property
    def allocation(self) -> Mapping[LayerName, Scheme]:
        """The chosen scheme of each searched layer, its input's included, and of each cache."""
        by_layer = {n: self.unit_allocation[u.name] for u in self.graph.units for n in u.layers}
        return Allocation(self.graph.merged(by_layer))

    def solve(
        self,
        budgets: Sequence[str | Budget],
        pin: Mapping[str, str | Scheme] | None = None,
        solver: str = "auto",
        risk: float | None = None,
        forbid: Sequence[tuple[Named, Named]] = (),
        constraints: Sequence[Constraint] = (),
    ) -> Solution:
        """Solve the same scores for other budgets; needs no model.

        Keys of `pin` are names of layers or units, or shell patterns. `risk` is the probability
        that each budget holds with (None: that of the search, 0.5: measured costs as they are).
        Of each pair in `forbid`, (("fc1", "int2"), ("fc2", "int2")), at most one is taken;
        `constraints` are further linear conditions, over the cells of `result.problem`.
        """
        asked, risk = under(
            self.graph,
            self.problem,
            self._asked_risk,
            budgets,
            pin=pin,
            risk=risk,
            forbid=forbid,
            constraints=constraints,
        )
        return solve(asked, solver, risk)

    def what_if(self) -> RunWhatIf:
        """Return what answers ever other budgets and pins in milliseconds, to play with."""
        from mpq.what_if import RunWhatIf

        return RunWhatIf(self.graph, self.problem, self._asked_risk)

    def asked(self, *free: str) -> Problem:
        """Return the problem that the search solved, at its risk, costs in `free` unlimited."""
        return at_risk(self.problem.with_budgets(self.solution.budgets), self.risk, free)

    def frontier(self, cost: str = "memory", points: int | None = KEPT_POINTS) -> Frontier:
        """Return the proven trade-off between one cost and the predicted loss.

        `points` is evenly spaced limits, None every allocation that nothing beats; the budgets
        on other costs are kept, but for those that a minimised cost ended at. That of 25 points
        is kept with the run.
        """
        kept = self.store.frontier(self.run_id, cost) if points == KEPT_POINTS else None
        if kept is not None:
            return kept
        from solvers.frontier import frontier

        return frontier(self.asked(cost, *self._minimised), cost, points)

    def surface(
        self,
        costs: tuple[str, str] = ("memory", "latency"),
        points: tuple[int, int] = KEPT_GRID,
    ) -> Surface:
        """Return the best predicted loss at each pair of limits of two costs, all proven.

        The one of memory and latency with the default points is kept with the run.
        """
        kept = self.store.surface(self.run_id, costs) if points == KEPT_GRID else None
        if kept is not None:
            return kept
        from solvers.surface import surface

        return surface(self.asked(*costs, *self._minimised), costs, points)

    def chain(self, cost: str = "memory") -> Chain:
        """Return nested allocations from the cheapest to the best: a network of any size."""
        from solvers.chain import chain

        return chain(self.problem, cost)

    def shadow_prices(self) -> ShadowPrices:
        """Return what each budget is worth at the proven optimum of the additive score."""
        from solvers.shadow import shadow_prices

        return shadow_prices(self.problem, self.solution)

    def least(
        self,
        of: str | Mapping[str, float] = "memory",
        *,
        score: float,
        budgets: Sequence[str | Budget] | None = None,
        pin: Mapping[str, str | Scheme] | None = None,
        risk: float | None = None,
    ) -> LeastCost:
        """Return the least of a cost, or weighted sum of costs, with this predicted loss or less.

        The run's budgets on other costs are kept unless `budgets`, all of which hold, replaces
        them; each holds with probability `risk` (None: that of the search).
        """
        kept = self.solution.budgets if budgets is None else budgets
        problem = stated(self.problem, kept, resolve_pins(self.graph, pin))
        risk = self.risk if risk is None else risk
        return least_within(problem, of, score, risk, capped=budgets is not None)

    def additivity(self) -> Additivity:
        """Return whether the parts of the chosen allocation add up: alone, in pairs, measured."""
        return additivity(self.problem, self.unit_allocation, self.evaluation)

    def stability(self, draws: int | None = None, seed: int = 0) -> Stability:
        """Return how much of the optimum of the scores is left when they are drawn anew.

        That is the additive optimum for the budgets of the search, by the solver "auto", which
        pairs and refinement may have left. `draws` is 50 by default, 20 for many units.
        """
        problem = self.asked()
        if draws is None:
            draws = usual_draws(problem) or 20
        return stability(problem, solve(problem), draws, seed)

    def apply(self, model: nn.Module, calibration: Any = None) -> AbstractContextManager[nn.Module]:
        """Return a context manager in which `model` computes as the chosen allocation would.

        After a search with transforms `model` is the prepared network (`mpq.prepared`).
        Corrections are made again on `calibration`, by default the batches of the job.
        """
        from mpq.applied import applied

        spec = self.store.run(self.run_id).spec
        given = self.graph, self.allocation, self.quantizer
        return applied(spec, *given, self.store, model, calibration)

    @property
    def quantizer(self) -> WeightQuantizer:
        """What stores weights as the search did: those made of calibration data were kept.

        These are the weights of the chosen allocation and of the best uniform one that fits.
        """
        from mpq.making import quantizer_of

        return quantizer_of(self.store, self.run_id, self.store.run(self.run_id).spec.clip)

    @property
    def chosen(self) -> Chosen:
        """The chosen allocation with its network, pins, budgets, totals and provenance."""
        record, solution = self.store.run(self.run_id), self.solution
        layers, allocation = self.graph.by_name, self.allocation
        schemes = {
            name: scheme
            for name, scheme in allocation.items()
            if not (layers[name].is_cache and scheme.is_native)
        }
        numbers = {"score": solution.score, "bound": solution.bound, "gap": solution.gap}
        return Chosen(
            graph=self.graph.only(schemes),
            schemes=schemes,
            pinned=frozenset(resolve_pins(self.graph, record.spec.pin)),
            budgets=solution.budgets,
            totals=solution.totals or {},
            cost_units={name: table.unit for name, table in self.problem.costs.items()},
            provenance={
                "run": record.id,
                "name": record.name,
                "model": record.spec.model,
                "metric": self.problem.sensitivity.metric,
                "calibration_data": record.calibration_data or None,
                "clip": record.spec.clip,
                **_pipeline(record.spec),
                "solver": solution.solver,
                "status": str(solution.status),
                **{k: v if math.isfinite(v) else None for k, v in numbers.items()},
                "device": record.device,
                "mpq_version": record.mpq_version,
                "created_at": record.created_at.isoformat(),
            },
        )

    def export(self, target: str, path: str | Path | None = None, **options: Any) -> Path:
        """Write the chosen allocation as another tool reads it and return the path.

        Targets are those of mpq.export.EXPORTERS, for example "compressed-tensors"; the default
        path is "mpq-TARGET" with its suffix, here; `strip="encoder."` takes that off the names of
        layers. Raises InvalidInputError, before anything is written, where the target cannot run
        a layer as chosen.
        """
        from mpq.export import export_allocation

        spec = self.store.run(self.run_id).spec
        for what in ("transforms", "corrections"):
            if names := getattr(spec, what):
                warnings.warn(
                    f"the file holds formats only: {what} {list(names)} of the run are not in it",
                    MpqWarning,
                    stacklevel=2,
                )
        return export_allocation(target, self.chosen, path, **options)

    def deploy(
        self,
        target: str,
        path: str | Path,
        *,
        model: nn.Module | str | None = None,
        calibration: Any = None,
        sample: Any = None,
        profiles: Mapping[str, Profile] | None = None,
        seconds: float = 10.0,
    ) -> Deployment:
        """Write the network for a runtime, each layer run by the kernel of its scheme.

        Targets are "onnxruntime" (an ONNX file) and "torch_cpu" (a TorchScript file, which
        `torch.jit.load` reads without this library, for inputs in the order of the sample).
        What was not an entry point of the run has to be passed: the model, the calibration
        batches or the sample, and the samples of profiles. The outputs are compared with those of
        the fake-quantized network and the model is timed beside its fp32 form, on the sample and
        on every profile; the record is kept with the run.
        """
        from mpq.deploy.deploy import deploy

        given = {"model": model, "calibration": calibration, "sample": sample}
        return deploy(self, target, path, profiles=profiles, seconds=seconds, **given)

    @property
    def data(self) -> Mapping[str, str]:
        """Where the "calibration" and "held_out" batches came from, and which they were."""
        return self.store.run(self.run_id).data

    @property
    def deployments(self) -> list[Deployment]:
        """What was deployed of this run, oldest first."""
        return self.store.deployments(self.run_id)

    def report(self, path: str | Path) -> Path:
        """Write the HTML page of this run."""
        from mpq.report import write_report

        return write_report(self.store, self.run_id, Path(path))
