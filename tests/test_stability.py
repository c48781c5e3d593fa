"""Which schemes other samples would have chosen as well."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import mpq
from mpq.adaptive import drawn
from mpq.core.errors import InvalidInputError
from mpq.core.problem import Problem
from mpq.core.protocols import Scores
from mpq.core.tables import Responses
from mpq.stability import stability, stability_lines, usual_draws
from mpq.store.store import Store, open_store
from solvers import solve
from tests.builders import mlp
from tests.oracles import every_choice
from tests.test_imports import loaded
from tests.test_solvers import drawn as drawn_problem
from tests.test_solvers import made


def with_errors(problem: Problem, stderr: object) -> Problem:
    values = problem.sensitivity.values
    table = replace(problem.sensitivity, stderr=np.broadcast_to(stderr, values.shape))
    return replace(problem, sensitivity=table)


def sampled(problem: Problem, samples: int = 24, noise: float = 0.5, seed: int = 0) -> Problem:
    """Responses whose mean squares are the scores, with an error over samples."""
    rng = np.random.default_rng(seed)
    size = np.sqrt(2 * problem.sensitivity.values)[:, None, None]
    vectors = size * (1 + noise * rng.normal(size=(len(size), samples, 2)))
    responses = Responses(cells=problem.cells, vectors=vectors.astype(np.float32))
    values, stderr = responses.own_scores()
    table = replace(problem.sensitivity, values=values, stderr=stderr)
    return replace(problem, sensitivity=table, responses=responses)


@pytest.mark.parametrize("kind", ["normal", "responses"])
def test_shares_are_those_of_trying_every_choice_in_every_draw(kind: str) -> None:
    for seed in range(4):
        problem = drawn_problem(4, 3, seed=seed)
        if kind == "responses":
            problem = sampled(problem, seed=seed)
        else:
            problem = with_errors(problem, 0.5 * problem.sensitivity.values)
        solution = solve(problem)
        assert solution.allocation is not None
        found = stability(problem, solution, draws=30, seed=seed)
        choices = [choice for choice in every_choice(problem) if problem.meets(choice)]
        own = solution.allocation.choice(problem.cells)
        kept, lost, best = np.zeros(len(own)), [], []
        scores = Scores(sensitivity=problem.sensitivity, responses=problem.responses)
        for values in drawn(scores, 30, seed):
            least = min(choices, key=lambda c: values[c].sum())
            kept += least == own
            lost.append(values[own].sum() - values[least].sum())
            best.append(values[least].sum())
        assert list(found.kept.values()) == pytest.approx((kept / 30).tolist(), abs=1 / 30 + 1e-9)
        assert found.lost == pytest.approx(sum(lost) / sum(best), rel=1e-2, abs=1e-4)
        assert found.score == pytest.approx(solution.score)
        assert (found.num_draws, dict(found.schemes)) == (30, dict(solution.allocation))


def test_exact_scores_keep_everything() -> None:
    problem = drawn_problem(30, 5)
    found = stability(problem, solve(problem, "ilp"), draws=5)
    assert set(found.kept.values()) == {1.0}
    assert (found.unsure, found.runner_up, found.spread, found.lost) == ((), {}, 0.0, 0.0)


def test_a_clear_margin_is_kept_and_a_tie_flips_every_second_time() -> None:
    """Two units cost the same in both schemes: one knows its scores, the other does not."""
    problem = made([[4.0, 1.0], [3.0, 3.0]], {"memory": [[1, 1], [1, 1]]}, {"memory": 9})
    problem = with_errors(problem, [0.0, 0.0, 0.5, 0.5])
    draws = 400
    found = stability(problem, solve(problem), draws=draws)
    sure, tied = found.kept["unit0"], found.kept["unit1"]
    assert sure == 1.0
    assert abs(tied - 0.5) <= 4 * math.sqrt(0.25 / draws)
    assert found.unsure == ("unit1",)
    (other,) = set(problem.cells.schemes[1]) - {found.schemes["unit1"]}
    assert found.runner_up == {"unit1": other}
    spread = 0.5  # of the score of the unit that has an error
    assert found.spread == pytest.approx(spread, rel=4 / math.sqrt(2 * draws))


def test_the_least_sure_unit_comes_first_and_the_runner_up_is_the_most_frequent() -> None:
    scores = [[1.0, 1.6, 2.6], [1.0, 1.1, 9.0], [1.0, 8.0, 9.0]]
    problem = with_errors(
        made(scores, {"memory": [[1] * 3] * 3}, {"memory": 9}),
        [0.8, 0.8, 0.1, 0.1, 0.3, 0.1, 0.1, 0.1, 0.1],
    )
    found = stability(problem, solve(problem), draws=200)
    assert found.unsure == ("unit1", "unit0")
    schemes = problem.cells.schemes[0]
    assert found.runner_up == {"unit0": schemes[1], "unit1": schemes[1]}


def test_budgets_and_conditions_hold_in_every_draw() -> None:
    """The best scheme of a unit does not fit beside the others, whatever the draw."""
    problem = made([[2.0, 0.0]] * 2, {"memory": [[1, 2]] * 2}, {"memory": 2})
    problem = with_errors(problem, 1.0)
    assert set(stability(problem, solve(problem), draws=20).kept.values()) == {1.0}


def test_the_same_seed_draws_the_same() -> None:
    problem = with_errors(drawn_problem(20, 5), 0.1)
    solution = solve(problem)
    assert stability(problem, solution, seed=3) == stability(problem, solution, seed=3)
    assert stability(problem, solution, seed=3) != stability(problem, solution, seed=4)


def test_responses_that_did_not_score_are_not_drawn_from() -> None:
    problem = sampled(drawn_problem(6, 4), noise=2.0)
    assert problem.responses is not None
    other = replace(problem, sensitivity=drawn_problem(6, 4, seed=1).sensitivity)
    found = stability(other, solve(other), draws=10)
    assert set(found.kept.values()) == {1.0}  # its own scores are exact


def test_what_cannot_be_drawn_is_one_line() -> None:
    problem = made([[1.0]], {"memory": [[2]]}, {"memory": 1})
    with pytest.raises(InvalidInputError, match="a solution that is infeasible has no schemes"):
        stability(problem, solve(problem))
    problem = made([[1.0]], {"memory": [[2]]}, {"memory": 3})
    for draws in (0, 1.5, True):
        with pytest.raises(InvalidInputError, match="a whole number from 1 on"):
            stability(problem, solve(problem), draws=draws)  # type: ignore[arg-type]


def test_fewer_draws_for_more_units() -> None:
    found = [usual_draws(drawn_problem(units, 8)) for units in (250, 251, 2501)]
    assert found == [50, 20, 0]


# --- of a run ----------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "runs.db")) as opened:
        yield opened


def test_a_run_tells_how_sure_it_is(store: Store, tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = mpq.search(
        mlp(),
        [torch.randn(16, 6) for _ in range(2)],
        budgets=["memory <= uniform int4"],
        schemes=["int2", "int3", "int4", "int6", "int8"],
        executor="serial",
        storage=store,
    )
    found = result.stability()
    assert found.num_draws == 50
    assert set(found.kept) == {"0", "2"}
    assert found.spread > 0
    additive = result.solutions["additive"].allocation
    assert additive is not None
    assert dict(found.schemes) == dict(additive)
    page = result.report(tmp_path / "page.html").read_text()
    assert "Drawn anew 50 times" in page
    code = f"""
from mpq.store.store import open_store
from mpq.terminal import print_run, run_view
with open_store({str(tmp_path / "runs.db")!r}) as store:
    view = run_view(store, {result.run_id!r})["stability"]
    assert view["kept"] == {dict(found.kept)!r}, view
    assert view["score"] == {found.score!r}
    print_run(store, {result.run_id!r})
"""
    assert loaded(code) & {"torch", "ray", "transformers"} == set()


def test_unsure_units_are_told_a_few_lines_long() -> None:
    unsure = [
        {"unit": f"u{i}", "scheme": "int4", "kept": 0.5 + i / 100, "runner_up": "int3"}
        for i in range(7)
    ]
    view = {
        "num_draws": 50,
        "kept": dict.fromkeys("abcdefgh", 1.0),
        "unsure": unsure,
        "lost": 0.012,
    }
    lines = stability_lines(view)
    assert lines[0] == (
        "the optimum of the scores keeps 1 of 8 units in at least 80% of 50 draws within their "
        "error bars; it loses 1.2% to theirs on average"
    )
    assert lines[1] == "  unsure u0: int4 in 50%, else mostly int3"
    assert lines[-1] == "  and 2 more"
    assert len(lines) == 7
    assert stability_lines(None) == []
