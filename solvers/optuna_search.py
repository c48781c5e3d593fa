"""Solver "optuna": TPE or NSGA-II of Optuna, every trial kept in a study."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from mpq.core.errors import InvalidInputError
from mpq.core.problem import Problem
from mpq.core.tables import Indices
from solvers.measuring import Measuring, Trials
from solvers.parameters import Parameters
from solvers.starts import starts
from solvers.switches import Switches

_NUM_POINTS = 6  # of the additive frontier among the first trials
_FRUITLESS = 20  # suggestions in a row of which none is new: there is nothing left to try
_COPY_S = 10.0  # a trial takes a database about 0.1 s, so they are written together


@dataclass(frozen=True, slots=True, kw_only=True)
class OptunaSearch(Measuring):
    """An Optuna study of the measured loss, one categorical parameter for each unit.

    The first trials are the additive optimum, the optimum with pairs, the uniform schemes that
    fit and points of the exact additive frontier. Then sampler "tpe" (Bergstra et al. 2011)
    minimises the loss, "nsga2" (Deb et al. 2002) the loss and every budgeted cost at once.
    What they suggest is repaired to fit and switched to something new where it was tried before,
    so the parameters of a trial are the allocation that was measured. `batch` trials are measured
    together.

    The study is in memory; with a `study` URL (sqlite:///studies.db, postgresql://...) its trials
    are copied there, as `study_name`, every few seconds, for `optuna-dashboard URL`. Where
    nothing can be chosen there is none. Raises InvalidInputError (`study`) for a URL that cannot
    be opened.
    """

    name: str = "optuna"
    sampler: Literal["tpe", "nsga2"] = "tpe"
    study: str | None = None
    study_name: str | None = None
    batch: int = 4

    def search(self, problem: Problem, additive: Indices, trials: Trials) -> None:
        """Measure the starts, then what the sampler suggests."""
        first, switches = starts(problem, additive, _NUM_POINTS), Switches.of(problem)
        if switches is None:
            trials.losses(list(first.values()))
            return
        parameters = Parameters(switches, additive, self.seed)
        with _quiet():
            study = self._study(problem, parameters, len(first))
            for origin, choice in first.items():
                study.enqueue_trial(parameters.of(choice), user_attrs={"from": origin})
            with _copied(study, self.study, self.study_name) as copy:
                count = len(first)  # together, as none of them depends on another
                while trials.left >= 1 and parameters.fruitless < _FRUITLESS:
                    self._measure(study, parameters, trials, min(count, int(trials.left)))
                    copy()
                    count = self.batch

    def _study(self, problem: Problem, parameters: Parameters, num_starts: int) -> Any:
        import optuna

        directions, sampler = ["minimize"], None
        if self.sampler == "nsga2":
            directions += ["minimize" for _ in problem.limits()]
            sampler = optuna.samplers.NSGAIISampler(
                population_size=max(2, num_starts), seed=self.seed
            )
        else:
            sampler = optuna.samplers.TPESampler(n_startup_trials=num_starts, seed=self.seed)
        return optuna.create_study(directions=directions, sampler=_fitting(sampler, parameters))

    def _measure(self, study: Any, parameters: Parameters, trials: Trials, count: int) -> None:
        """Ask for some trials, measure them together and tell what they lose."""
        asked = [study.ask(_distributions(parameters)) for _ in range(count)]
        choices = [parameters.choice(trial.params) for trial in asked]
        costs = trials.problem.limits() if self.sampler == "nsga2" else ()
        for trial, choice, loss in zip(asked, choices, trials.losses(choices), strict=True):
            totals = trials.problem.totals(choice)
            for name, total in totals.items():
                trial.set_user_attr(name, total)
            study.tell(trial, [loss, *(totals[cost] for cost in costs)])


def check_study(url: str) -> None:
    """Raise InvalidInputError (`study`) where no study can be kept at `url`."""
    with _quiet(), _storage(url):
        pass


def _distributions(parameters: Parameters) -> dict[str, Any]:
    import optuna

    categorical = optuna.distributions.CategoricalDistribution
    return {name: categorical(schemes) for name, schemes in parameters.schemes.items()}


def _fitting(inner: Any, parameters: Parameters) -> Any:
    """Return a sampler whose suggestions are those of `inner`, made to fit and new."""
    import optuna

    class Fitting(optuna.samplers.BaseSampler):  # type: ignore[misc]
        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return _distributions(parameters)

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, str]:
            known = inner.infer_relative_search_space(study, trial)
            found = inner.sample_relative(study, trial, known)
            for name, distribution in search_space.items():
                if name not in found:  # a mutation of NSGA-II, or a first trial
                    found[name] = inner.sample_independent(study, trial, name, distribution)
            return parameters.fitted(found)

        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
            return inner.sample_independent(study, trial, name, distribution)

        def before_trial(self, study: Any, trial: Any) -> None:
            inner.before_trial(study, trial)
            if isinstance(inner, optuna.samplers.NSGAIISampler):  # enqueued ones are parents, too
                inner.get_trial_generation(study, trial)

        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            inner.after_trial(study, trial, state, values)

    return Fitting()


@contextmanager
def _copied(source: Any, url: str | None, name: str | None) -> Iterator[Callable[[], None]]:
    """Yield a function that copies the finished trials of a study now and then, in the end all.

    Raises InvalidInputError (`study`) where the study of that name has other objectives.
    """
    import optuna

    if url is None:
        yield lambda: None
        return
    with _storage(url) as storage:
        study = optuna.create_study(
            storage=storage, study_name=name, directions=source.directions, load_if_exists=True
        )
        if study.directions != source.directions:
            raise InvalidInputError(
                "study",
                f"study {name!r} in {_masked(url)!r} has {len(study.directions)} objectives where "
                f"this search has {len(source.directions)}: give it another name",
            )
        written, last = 0, time.monotonic()

        def copy(at_once: bool = False) -> None:
            nonlocal written, last
            if at_once or time.monotonic() - last >= _COPY_S:
                finished = source.get_trials(deepcopy=False)[written:]
                study.add_trials([trial for trial in finished if trial.state.is_finished()])
                written, last = written + len(finished), time.monotonic()

        try:
            yield copy
        finally:
            copy(at_once=True)


@contextmanager
def _storage(url: str) -> Iterator[Any]:
    """Open the database of a study; raises InvalidInputError (`study`) where that fails."""
    import optuna

    try:
        storage = optuna.storages.RDBStorage(url)
    except Exception as error:  # whatever SQLAlchemy, a driver or the schema check raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InvalidInputError(
            "study",
            f"cannot open study {_masked(url)!r}: {_masked(reason)}; write for example "
            "'sqlite:///studies.db'",
        ) from error
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna's log to what is wrong."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _masked(url: str) -> str:
    """Return a URL without its password."""
    return re.sub(r"://([^:/@]*):[^@]*@", r"://\1:***@", url)
