"""Scoring that ends early: only when it may, with the scores of what it saw, losing nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mpq
from mpq.adaptive import EnoughScores, drawn, score_error
from mpq.core.problem import Budget
from mpq.core.protocols import Scores
from mpq.core.tables import Cells, Responses, SensitivityTable
from mpq.nn.fingerprint import batches_digest
from mpq.nn.workload import Workload
from mpq.progress import Silent
from mpq.scoring import score
from mpq.store.store import Store, open_store
from mpq.tasks import Workers
from sensitivity.gauss_newton import GaussNewton
from tests.builders import cells, cost, mlp, workload
from workers import get_executor

SAMPLES = 4096


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "runs.db")) as opened:
        yield opened


def made_scores(of: Cells, values: np.ndarray, stderr: np.ndarray | float) -> Scores:
    errors = np.broadcast_to(stderr, values.shape)
    table = SensitivityTable(metric="made", cells=of, values=values, stderr=errors)
    return Scores(sensitivity=table)


def response_scores(of: Cells, vectors: np.ndarray) -> Scores:
    responses = Responses(cells=of, vectors=vectors.astype(np.float32))
    values, stderr = responses.own_scores()
    table = SensitivityTable(metric="made", cells=of, values=values, stderr=stderr)
    return Scores(sensitivity=table, responses=responses)


def asking(of: Cells, limit: float, precision: Any, seed: int = 0) -> EnoughScores:
    return EnoughScores(
        costs={"memory": cost(of)},
        budgets=(Budget("memory", limit),),
        precision=precision,
        seed=seed,
    )


# --- the rule --------------------------------------------------------------------------------


def slow_is_settled(scores: Scores, limit: float, seed: int) -> bool:
    """Try every allocation in each draw: the choice may lose over 5 % in one of 20."""
    of = scores.sensitivity.cells
    memory = cost(of).values
    choices = [
        list(numbers)
        for numbers in itertools.product(*(range(a, b) for a, b in itertools.pairwise(of.offsets)))
        if memory[list(numbers)].sum() <= limit
    ]
    values = scores.sensitivity.values
    chosen = min(choices, key=lambda c: values[c].sum())
    failed = 0
    for draw in drawn(scores, 20, seed):
        least = min(draw[c].sum() for c in choices)
        failed += draw[chosen].sum() - least > 0.05 * abs(least)
    return failed <= 1


@pytest.mark.parametrize("with_responses", [True, False])
def test_settled_is_what_trying_every_allocation_says(with_responses: bool) -> None:
    generator = np.random.default_rng(1)
    of = cells(3)
    answers = []
    for trial in range(40):
        values = np.sort(generator.exponential(size=(3, 3)), axis=1)[:, ::-1].ravel()
        noise = 10.0 ** generator.uniform(-1.5, 0.5)
        if with_responses:
            shape = (len(of), 24, 2)
            spread = 1 + noise * generator.standard_normal(shape)
            scores = response_scores(of, np.sqrt(2 * values)[:, None, None] * spread)
        else:
            scores = made_scores(of, values, noise * values)
        limit = float(generator.uniform(13, 21))
        expected = slow_is_settled(scores, limit, seed=trial)
        assert asking(of, limit, "settled", trial)(scores, SAMPLES) == expected
        answers.append(expected)
    assert 5 < sum(answers) < 35  # both answers were tried


def test_a_precise_score_is_enough_and_a_wide_one_is_not() -> None:
    of = cells(3)
    values = np.arange(9, 0, -1.0)
    for stderr, wanted, answer in [(0.01, 0.02, True), (0.03, 0.02, False)]:
        scores = made_scores(of, values, stderr * values)
        assert asking(of, 20.0, wanted)(scores, SAMPLES) is answer


def test_few_samples_are_never_enough() -> None:
    of = cells(3)
    exact = made_scores(of, np.arange(9, 0, -1.0), 0.0)
    for precision in ("settled", 0.5):
        ask = asking(of, 20.0, precision)
        assert [ask(exact, samples) for samples in (1, 31, 32)] == [False, False, True]


def test_scores_that_nothing_fits_are_not_enough() -> None:
    of = cells(3)
    exact = made_scores(of, np.arange(9, 0, -1.0), 0.0)
    assert not asking(of, 1.0, "settled")(exact, SAMPLES)


def test_what_fits_is_what_fits_at_the_risk() -> None:
    of = cells(3)
    exact = made_scores(of, np.arange(9, 0, -1.0), 0.0)
    ask = asking(of, 12.0, "settled")  # the smallest total, of an uncertain cost
    wide = replace(ask.costs["memory"], high=1.5 * ask.costs["memory"].values)
    ask = replace(ask, costs={"memory": wide})
    assert ask(exact, SAMPLES)
    assert not replace(ask, risk=0.95)(exact, SAMPLES)


def test_a_negative_score_leaves_nothing_to_settle() -> None:
    of = cells(1, ("int4", "int8"))
    scores = made_scores(of, np.array([-1.0, -2.0]), 0.01)  # both count as 0: the cheaper is best
    assert asking(of, 9.0, "settled")(scores, SAMPLES)


# --- error bars ------------------------------------------------------------------------------


def test_the_error_of_a_score_keeps_what_its_cells_have_in_common() -> None:
    generator = np.random.default_rng(2)
    of = cells(3)
    shared = generator.standard_normal((1, 50, 2))
    own = generator.standard_normal((9, 50, 2))
    choice = np.array([1, 4, 8])
    for vectors in (own, np.repeat(shared, 9, axis=0)):
        scores = response_scores(of, vectors)
        totals = [
            sum(0.5 * float(vectors[c, n, k]) ** 2 for c in choice for k in range(2)) / 2
            for n in range(50)
        ]
        expected = np.std(totals, ddof=1) / 50**0.5
        assert score_error(scores, choice) == pytest.approx(expected, rel=1e-5)
        bound = made_scores(of, scores.sensitivity.values, scores.sensitivity.stderr)
        assert score_error(bound, choice) >= score_error(scores, choice) - 1e-9


def test_the_error_of_a_score_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    of = cells(2)
    scale = np.linspace(1, 3, len(of))[:, None, None]
    choice = np.array([2, 4])
    truth = 0.5 * float(np.square(scale[choice]).sum())
    trials, covered = 400, 0
    for _ in range(trials):
        shared = generator.standard_normal((1, 200, 2))
        vectors = scale * (shared + generator.standard_normal((len(of), 200, 2))) / 2**0.5
        scores = response_scores(of, vectors)
        value = scores.sensitivity.values[choice].sum()
        covered += abs(value - truth) <= 1.96 * score_error(scores, choice)
    expected, error = 0.95, (0.95 * 0.05 / trials) ** 0.5
    assert abs(covered / trials - expected) < 3 * error + 0.01  # 0.01: scores are skewed


@pytest.mark.parametrize("with_responses", [True, False])
def test_draws_vary_as_much_as_the_error_bars_say(with_responses: bool) -> None:
    of = cells(2)
    vectors = np.random.default_rng(4).standard_normal((len(of), 400, 2))
    scores = response_scores(of, vectors)
    if not with_responses:
        scores = made_scores(of, scores.sensitivity.values, scores.sensitivity.stderr)
    count = 4000
    values = np.array(list(drawn(scores, count, seed=5)))
    table = scores.sensitivity
    error = table.stderr / count**0.5
    assert (abs(values.mean(axis=0) - table.values) < 5 * error).all()
    spread = values.std(axis=0, ddof=1) / table.stderr
    assert (abs(spread - 1) < 5 / (2 * count) ** 0.5 + 1 / 400).all()


def test_draws_of_responses_move_together_what_the_samples_move_together() -> None:
    of = cells(2)
    vectors = np.repeat(np.random.default_rng(6).standard_normal((1, 30, 2)), len(of), axis=0)
    for values in drawn(response_scores(of, vectors), 5, seed=7):
        assert np.ptp(values) < 1e-12


def test_draws_are_the_same_for_the_same_seed() -> None:
    scores = made_scores(cells(2), np.ones(6), 0.5)
    one, again, other = (list(drawn(scores, 3, seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


# --- scoring in rounds -----------------------------------------------------------------------


def batches(count: int = 8, samples: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(samples, 6, generator=generator) for _ in range(count)]


def small(of: list[torch.Tensor]) -> Workload:
    torch.manual_seed(0)
    return workload(
        mlp().eval(), of, ("int2", "int4"), key="small", batch_keys=batches_digest(tuple(of))
    )


def workers_of(load: Workload, store: Store) -> Workers:
    return Workers.of(load, get_executor("serial"), store, Silent())


def test_scoring_ends_after_the_round_that_is_enough(store: Store) -> None:
    seen: list[float] = []
    told: list[str] = []

    def enough(scores: Scores, samples: float) -> bool:
        assert scores.responses is not None
        assert scores.responses.vectors.shape[1] == samples
        seen.append(samples)
        return samples >= 20

    found = score(workers_of(small(batches()), store), "gauss_newton", enough, told.append)
    assert seen == [6, 12, 24]
    assert told == ["gauss_newton: 4 of 8 tasks were precise enough"]
    with open_store("sqlite://") as fresh:
        only = score(workers_of(small(batches()[:4]), fresh), "gauss_newton")
    np.testing.assert_array_equal(found.sensitivity.values, only.sensitivity.values)
    np.testing.assert_array_equal(found.sensitivity.stderr, only.sensitivity.stderr)


def test_scoring_in_full_goes_on_from_where_it_ended(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, ran = GaussNewton.run, []

    def counting(self: GaussNewton, load: Workload, task: Any) -> Any:
        ran.append(task.part[0])
        return real(self, load, task)

    monkeypatch.setattr(GaussNewton, "run", counting)
    workers = workers_of(small(batches()), store)
    score(workers, "gauss_newton", lambda scores, samples: samples >= 10)
    assert ran == [0, 1]
    full = score(workers, "gauss_newton")
    assert ran == list(range(8))
    with open_store("sqlite://") as fresh:
        at_once = score(workers_of(small(batches()), fresh), "gauss_newton")
    np.testing.assert_array_equal(full.sensitivity.values, at_once.sensitivity.values)


def test_scoring_that_is_never_enough_sees_everything(store: Store) -> None:
    asked: list[float] = []
    told: list[str] = []

    def never(scores: Scores, samples: float) -> bool:
        asked.append(samples)
        return False

    workers = workers_of(small(batches()), store)
    found = score(workers, "gauss_newton", never, told.append)
    assert asked == [6, 12, 24]  # not after the last round: nothing is left to leave out
    assert told == []
    full = score(workers, "gauss_newton")
    np.testing.assert_array_equal(found.sensitivity.values, full.sensitivity.values)


def test_one_batch_says_nothing_of_an_error_over_batches(store: Store) -> None:
    seen: list[float] = []

    def enough(scores: Scores, samples: float) -> bool:
        seen.append(samples)
        return scores.sensitivity.stderr.max() < np.inf

    score(workers_of(small(batches(4, 40)), store), "hessian_quadratic", enough)
    assert seen == [80]


# --- a search --------------------------------------------------------------------------------


class Parallel(nn.Module):
    """Six equal layers that see independent inputs; three count `share` times as much."""

    def __init__(self, share: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 5) for _ in range(6)])
        for layer in self.layers:
            layer.load_state_dict(self.layers[0].state_dict())
        self.shares = [1.0, share] * 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inputs = zip(self.layers, x.split(4, dim=1), self.shares, strict=True)
        return sum(share * layer(part) for layer, part, share in inputs)


def search(store: Store, share: float, precision: Any, seed: int = 1) -> mpq.SearchResult:
    generator = torch.Generator().manual_seed(seed)
    return mpq.search(
        Parallel(share).eval(),
        [torch.randn(16, 24, generator=generator) for _ in range(8)],
        storage=store,
        schemes=["int2", "int8"],
        budgets=["bops <= 15.7%"],  # three of six in 8 bits
        executor="serial",
        refine=0,
        precision=precision,
    )


def scored_samples(result: mpq.SearchResult) -> int:
    assert result.problem.responses is not None
    return result.problem.responses.vectors.shape[1]


@pytest.mark.parametrize("precision", ["settled", 0.3])
def test_a_clear_choice_ends_scoring_early(store: Store, precision: Any) -> None:
    result = search(store, 0.01, precision)
    assert [str(scheme) for scheme in result.allocation.values()] == ["int8", "int2"] * 3
    assert scored_samples(result) < 128
    (event,) = [e.message for e in store.events(result.run_id) if e.kind == "precision"]
    assert "of 8 tasks were precise enough" in event
    assert search(store, 0.01, None).allocation == result.allocation


@pytest.mark.parametrize("precision", ["settled", 0.001])
def test_ties_between_many_layers_are_scored_to_the_end(store: Store, precision: Any) -> None:
    in_full = 0
    for seed in range(4):  # chance can tell equal layers apart, but rarely
        result = search(store, 1.0, precision, seed)
        assert sorted(map(str, result.allocation.values())) == ["int2"] * 3 + ["int8"] * 3
        ended = [e for e in store.events(result.run_id) if e.kind == "precision"]
        assert (scored_samples(result) < 128) == bool(ended)
        in_full += not ended
    assert in_full >= 3
