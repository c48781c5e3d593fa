"""Let a solver search by measurements: its trials run on calibration data and are kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from mpq.candidates import predicted_loss
from mpq.core.errors import InvalidInputError, StorageError
from mpq.core.evaluation import TRIAL, Evaluation
from mpq.core.jobs import JobSpec
from mpq.core.limits import Limit
from mpq.core.problem import Allocation, Problem
from mpq.core.protocols import Solver
from mpq.core.tables import Floats
from mpq.criterion import Criterion
from mpq.evaluate import Candidate, measure
from mpq.progress import Advance, Silent
from mpq.store.address import shown, storage_url
from mpq.store.store import Store
from mpq.tasks import Workers
from solvers import get_solver
from solvers.measuring import Measuring
from solvers.optuna_search import OptunaSearch, check_study


def check_trials(spec: JobSpec, store: Store) -> None:
    """Raise InvalidInputError where a job's study cannot be opened, before anything is scored."""
    if spec.study is None:
        return
    if _same_database(spec.study, store):
        raise InvalidInputError(
            "study",
            f"study {shown(store.url)!r} is the database of the runs and Optuna needs one of its "
            "own: write for example 'sqlite:///studies.db'",
        )
    check_study(spec.study)


def _same_database(study: str, store: Store) -> bool:
    try:
        return storage_url(study) == store.url
    except StorageError:  # no database that runs could be in
        return False


@contextmanager
def searching(
    spec: JobSpec, problem: Problem, workers: Workers, run_id: str, with_metrics: bool
) -> Iterator[str | Solver]:
    """Yield what a job's solver is called, or the solver itself where it measures.

    Each allocation that it measures on all calibration samples becomes an evaluation of the run,
    "trial 0" and so on. What it minimises is what decides between the candidates of a search; an
    allocation that breaks a limit loses infinitely much.
    """
    solver = None if spec.solver == "auto" else get_solver(spec.solver)
    if not isinstance(solver, Measuring):
        yield spec.solver
        return
    with workers.progress.stage(f"trials ({solver.name})", spec.num_trials) as advance:
        trials = _Trials(
            workers=replace(workers, progress=Silent()),
            problem=problem,
            run_id=run_id,
            with_metrics=with_metrics,
            criterion=_criterion(spec, problem, workers),
            interactions=None if problem.responses is None else problem.responses.interactions(),
            advance=advance,
        )
        solver = replace(
            solver,
            measure=trials,
            seed=spec.seed,
            num_trials=spec.num_trials,
            time_limit_s=spec.trial_seconds,
        )
        if isinstance(solver, OptunaSearch):
            name = f"{spec.name or 'mpq'} {run_id}"
            solver = replace(solver, study=spec.study, study_name=name)
        yield solver
    number, loss = trials.best
    workers.store.log(
        run_id,
        "trials",
        f"{trials.count} allocations measured by {solver.name}, {TRIAL}{number} best: {loss:.6g}",
    )


def _criterion(spec: JobSpec, problem: Problem, workers: Workers) -> Criterion:
    """Return what decides; the scales of qualities are of uniform schemes, which are measured."""
    limits = [Limit.parse(text) for text in spec.limits]
    if not spec.quality:
        return Criterion(limits=tuple(limits))
    uniform = {f"uniform {scheme}": a for scheme, a in problem.uniform().items()}
    found = [
        _candidate(name, allocation, None, with_metrics=False)
        for name, allocation in uniform.items()
    ]
    evaluations = measure(workers, found) if found else []
    fitting = [e for e in evaluations if problem.fits(e.allocation)]
    return Criterion.of(spec.quality, limits, fitting, evaluations)


def _candidate(
    name: str,
    allocation: Allocation,
    predicted: float | None,
    with_metrics: bool,
    share: float = 1.0,
) -> Candidate:
    return Candidate(
        name=name,
        split="calibration",
        allocation=allocation,
        with_metrics=with_metrics,
        predicted=predicted,
        share=share,
    )


@dataclass(slots=True, kw_only=True)
class _Trials:
    """The measurement that a solver is given."""

    workers: Workers
    problem: Problem
    run_id: str
    with_metrics: bool
    criterion: Criterion
    interactions: Floats | None
    advance: Advance
    count: int = 0
    spent: float = 0.0
    best: tuple[int, float] = (0, math.inf)

    def __call__(self, allocations: Sequence[Allocation], share: float = 1.0) -> list[float]:
        """Return what decides between allocations; those measured on all samples are kept."""
        whole = share == 1.0
        asked = [
            _candidate(
                f"{TRIAL}{number}",
                allocation,
                predicted_loss(
                    self.problem, allocation.choice(self.problem.cells), self.interactions
                ),
                self.with_metrics and whole,
                share,
            )
            for number, allocation in enumerate(allocations, self.count)
        ]
        evaluations = measure(self.workers, asked)
        for _ in range(int(self.spent + share * len(asked)) - int(self.spent)):
            self.advance()
        self.spent += share * len(asked)
        if not whole:
            return [self.criterion.value(e) for e in evaluations]
        return [self._kept(e) for e in evaluations]

    def _kept(self, evaluation: Evaluation) -> float:
        """Keep a trial with the run and return its loss."""
        self.workers.store.put_evaluation(self.run_id, evaluation)
        allowed = self.criterion.allows(evaluation)
        loss = self.criterion.value(evaluation) if allowed else math.inf
        if loss < self.best[1]:
            self.best = (self.count, loss)
        self.count += 1
        return loss
