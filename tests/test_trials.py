"""Searches by measurements: trials of a run, shares of the samples, what a person sees of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch

import mpq
from mpq.core.errors import InvalidInputError
from mpq.core.evaluation import CHOSEN, Evaluation, without_trials
from mpq.core.jobs import JobSpec
from mpq.core.problem import Allocation
from mpq.evaluate import Candidate, measure
from mpq.nn.fingerprint import batches_digest
from mpq.progress import Silent
from mpq.result import SearchResult
from mpq.store.store import Store, open_store
from mpq.tasks import Workers
from mpq.terminal import print_run
from solvers.check import check
from tests.builders import Decoder, mlp, schemes, tokens, workload
from workers import get_executor

CASES = [("mlp", "evolution"), ("mlp", "nsga2"), ("decoder", "evolution"), ("decoder", "optuna")]
NUM_TRIALS = 24


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with open_store(str(tmp_path_factory.mktemp("trials") / "runs.db")) as opened:
        yield opened


def network(kind: str) -> tuple[torch.nn.Module, list[Any]]:
    torch.manual_seed(0)
    if kind == "mlp":
        generator = torch.Generator().manual_seed(1)
        model = torch.nn.Sequential(mlp(6, 12, 12), torch.nn.ReLU(), mlp(12, 8, 3))
        return model.eval(), [torch.randn(9, 6, generator=generator) for _ in range(3)]
    return Decoder().eval(), [tokens(4, 5), tokens(3, 7)]


def search(store: Store, kind: str, solver: str, **options: Any) -> SearchResult:
    model, calibration = network(kind)
    settings: dict[str, Any] = {
        "budgets": ["memory <= uniform int3"],
        "schemes": ["int2", "int3", "int4", "int6", "int8"],
        "executor": "serial",
        "groups": "none",
        "num_trials": NUM_TRIALS,
    }
    return mpq.search(model, calibration, solver=solver, storage=store, **(settings | options))


@pytest.fixture(scope="module", params=CASES)
def found(request: pytest.FixtureRequest, store: Store) -> tuple[SearchResult, SearchResult]:
    """The same search twice, the second in a database that has everything."""
    kind, solver = request.param
    return search(store, kind, solver), search(store, kind, solver)


def trials_of(result: SearchResult) -> list[Evaluation]:
    return [e for e in result.evaluation if e.candidate.startswith("trial ")]


def test_never_worse_than_the_best_uniform_scheme_nor_than_any_trial(
    found: tuple[SearchResult, SearchResult],
) -> None:
    result = found[0]
    problem = result.problem.with_budgets(result.solution.budgets)
    assert problem.fits(result.unit_allocation)
    calibration = {e.candidate: e.mean for e in result.evaluation if e.split == "calibration"}
    uniform = problem.uniform().items()
    fitting = [calibration[f"uniform {s}"] for s, a in uniform if problem.fits(a)]
    assert len(fitting) == 2
    assert calibration[CHOSEN] <= min(fitting)
    assert calibration[CHOSEN] <= min(e.mean for e in trials_of(result))


def test_every_trial_is_an_evaluation_that_meets_the_budgets(
    found: tuple[SearchResult, SearchResult],
) -> None:
    result = found[0]
    problem = result.problem.with_budgets(result.solution.budgets)
    trials = trials_of(result)
    assert [e.candidate for e in trials] == [f"trial {n}" for n in range(len(trials))]
    assert all(problem.fits(e.allocation) for e in trials)
    assert all(e.predicted is not None for e in trials)
    solver = result.store.run(result.run_id).spec.solver
    if solver != "evolution":
        assert len(trials) == NUM_TRIALS
    else:
        assert 4 <= len(trials) < NUM_TRIALS
    (line,) = [e.message for e in result.store.events(result.run_id) if e.kind == "trials"]
    best = min(trials, key=lambda e: e.mean)
    assert line == (
        f"{len(trials)} allocations measured by {solver}, {best.candidate} best: {best.mean:.6g}"
    )
    answer = result.solutions[solver]
    check(problem, answer)
    assert answer.allocation == best.allocation
    assert np.isfinite(answer.gap)


def test_the_same_search_gives_the_same_trials(found: tuple[SearchResult, SearchResult]) -> None:
    first, again = found
    assert first.unit_allocation == again.unit_allocation
    assert [(e.allocation, e.mean) for e in trials_of(first)] == [
        (e.allocation, e.mean) for e in trials_of(again)
    ]


def test_trials_do_not_drown_what_a_person_reads(
    found: tuple[SearchResult, SearchResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = found[0]
    print_run(result.store, result.run_id)
    shown = capsys.readouterr().out
    assert "uniform int3" in shown
    assert "allocations measured by" in shown
    page = result.report(tmp_path / "page.html").read_text(encoding="utf-8")
    for text in (shown, page):
        assert len(re.findall(r"\btrial \d", text)) == 1  # of the best one
    assert not any(e.candidate.startswith("trial") for e in without_trials(result.evaluation))


def test_a_study_of_a_search_is_one_of_the_run(store: Store, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/studies.db"
    result = search(store, "mlp", "optuna", study=url, name="ours", num_trials=8)
    storage = optuna.storages.RDBStorage(url)
    study = optuna.load_study(study_name=f"ours {result.run_id}", storage=storage)
    assert [trial.value for trial in study.trials] == [e.mean for e in trials_of(result)]
    storage.remove_session()
    storage.engine.dispose()


def test_a_bad_study_is_told_before_anything_is_scored(store: Store) -> None:
    before = len(store.runs(limit=1000))
    with pytest.raises(InvalidInputError, match="cannot open study 'nowhere'"):
        search(store, "mlp", "optuna", study="nowhere")
    assert len(store.runs(limit=1000)) == before


def test_the_database_of_the_runs_is_no_study(store: Store) -> None:
    with pytest.raises(InvalidInputError, match="Optuna needs one of its own"):
        search(store, "mlp", "optuna", study=f"sqlite:///{store.url.database}")


def test_trials_that_break_a_limit_are_not_chosen(store: Store) -> None:
    """The limit is on the number of weights that are zero, which few bits give many of."""

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        weights = [p for p in model.parameters() if p.ndim > 1]
        return {"zeros": float(sum((w == 0).sum() for w in weights))}

    free = search(store, "mlp", "evolution", evaluate=evaluate, limits=["zeros <= 1000"])
    zeros = [e.metrics["zeros"] for e in trials_of(free)]
    bound = float(np.median(zeros))
    (chosen,) = [e for e in free.evaluation if (e.candidate, e.split) == (CHOSEN, "calibration")]
    bound = min(bound, chosen.metrics["zeros"] - 1)  # so that the limit binds
    limited = search(store, "mlp", "evolution", evaluate=evaluate, limits=[f"zeros <= {bound}"])
    (chosen,) = [e for e in limited.evaluation if (e.candidate, e.split) == (CHOSEN, "calibration")]
    assert chosen.metrics["zeros"] <= bound
    allowed = [e.mean for e in trials_of(limited) if e.metrics["zeros"] <= bound]
    assert chosen.mean <= min(allowed)


def test_with_qualities_their_sum_decides(store: Store) -> None:
    quality = {"kl": "kl", "mse": "mse"}
    result = search(store, "mlp", "evolution", quality=quality, num_trials=12)
    calibration = {e.candidate: e for e in result.evaluation if e.split == "calibration"}
    problem = result.problem.with_budgets(result.solution.budgets)
    uniform = [calibration[f"uniform {s}"] for s, a in problem.uniform().items() if problem.fits(a)]
    scales = {name: min(e.metrics[name] for e in uniform) for name in quality}

    def value(e: Evaluation) -> float:
        return sum(e.metrics[name] / scale for name, scale in scales.items())

    assert value(calibration[CHOSEN]) <= min(map(value, [*trials_of(result), *uniform]))


# --- shares of the samples ----------------------------------------------------------------------


def workers_of(store: Store, sizes: tuple[int, ...]) -> tuple[Workers, list[Any]]:
    torch.manual_seed(0)
    model = mlp().eval()
    batches = tuple(
        torch.randn(size, 6, generator=torch.Generator().manual_seed(number))
        for number, size in enumerate(sizes)
    )
    load = workload(
        model, batches, ("int2", "int4"), key=f"{sizes}", batch_keys=batches_digest(batches)
    )
    executor, ran = get_executor("serial"), []
    real = executor.map

    def counting(setup, fn, items):  # type: ignore[no-untyped-def]
        ran.extend(items)
        return real(setup, fn, items)

    executor.map = counting  # type: ignore[method-assign]
    return Workers.of(load, executor, store, Silent()), ran


@pytest.mark.parametrize("sizes", [(8, 8, 8), (24,), (3, 20, 1)])
@pytest.mark.parametrize(("share", "samples"), [(1 / 8, 3), (1 / 2, 12), (0.01, 1), (1.0, 24)])
def test_a_share_is_the_first_samples(
    tmp_path: Path, sizes: tuple[int, ...], share: float, samples: int
) -> None:
    with open_store(str(tmp_path / "runs.db")) as own:
        workers, ran = workers_of(own, sizes)
        allocation = Allocation(dict.fromkeys(workers.workload.cells.units, schemes("int2")[0]))

        def measured(share: float) -> np.ndarray:
            candidate = Candidate(name="x", split="calibration", allocation=allocation, share=share)
            (evaluation,) = measure(workers, [candidate])
            assert evaluation.per_sample is not None
            return evaluation.per_sample

        part = measured(share)
        whole = measured(1.0)
        assert len(part) == samples
        np.testing.assert_allclose(part, whole[:samples], rtol=1e-5)
        pieces = len(ran)
        assert np.array_equal(measured(share), part)
        assert len(ran) == pieces  # nothing is measured twice
        full = sum(np.cumsum(sizes) <= samples)
        cut = samples not in np.cumsum(sizes)
        assert pieces == len(sizes) + cut
        assert full + cut >= 1


# --- jobs ---------------------------------------------------------------------------------------

JOB: dict[str, Any] = {"model": "a:b", "calibration": "a:c", "budgets": ("memory <= 60%",)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_trials": 0}, "num_trials: a whole number from 1 on, got 0"),
        ({"num_trials": 2.5}, "num_trials: a whole number from 1 on, got 2.5"),
        ({"trial_seconds": 0}, "trial_seconds: a positive number of seconds, got 0"),
        ({"study": "sqlite:///x.db"}, "study: solvers 'optuna' and 'nsga2' keep one"),
        ({"study": "sqlite:///x.db", "solver": "evolution"}, "with solver 'evolution'"),
    ],
)
def test_a_job_with_bad_trials_is_one_clear_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        JobSpec(**JOB, **changes)
    assert message in str(caught.value)
    assert caught.value.code == "job_value"
