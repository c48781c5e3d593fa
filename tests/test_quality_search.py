"""Searches that qualities and limits decide."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mpq
from mpq.core.errors import InfeasibleError, InvalidInputError
from mpq.core.evaluation import CHOSEN
from mpq.core.jobs import RunState
from mpq.core.limits import Limit
from mpq.core.problem import Allocation, Budget, Problem
from mpq.criterion import Criterion
from mpq.nn.patch import quantized
from mpq.result import SearchResult
from mpq.store.store import Store, open_store
from tests.oracles import every_choice
from tests.pictures import (
    GROUPS,
    QUALITY,
    batches,
    layout,
    make_picture,
    measured,
    on_calibration,
    search,
    texture,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "runs.db")) as opened:
        yield opened


# --- the criterion ---------------------------------------------------------------------------


def test_qualities_are_counted_in_what_the_best_uniform_scheme_has() -> None:
    uniform = [measured("uniform int4", a=2.0, b=30.0), measured("uniform int3", a=9.0, b=20.0)]
    other = measured("additive", a=0.1, b=1.0)
    criterion = Criterion.of(["a", "b"], [], uniform, [*uniform, other])
    assert criterion.value(uniform[0]) == pytest.approx(2 / 2 + 30 / 20)
    assert criterion.value(other) == pytest.approx(0.1 / 2 + 1 / 20)
    alone = Criterion.of(["a", "b"], [], [], [other])
    assert alone.value(other) == pytest.approx(2.0)


def test_equal_outputs_win_and_broken_ones_lose() -> None:
    same, near = measured("uniform fp32", a=0.0), measured("additive", a=1e-9)
    broken = measured("uniform int2", a=math.inf)
    criterion = Criterion.of(["a"], [], [same, broken], [same, near, broken])
    assert criterion.value(same) < criterion.value(near) < criterion.value(broken) == math.inf


def test_without_qualities_the_divergence_decides() -> None:
    assert Criterion().value(measured("x", mean=0.25, a=7.0)) == 0.25


# --- limits as texts -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("accuracy >= 0.99", Limit("accuracy", ">=", 0.99)),
        ("ssim<=2e-2", Limit("ssim", "<=", 0.02)),
        (" top 1 accuracy >= -3 ", Limit("top 1 accuracy", ">=", -3.0)),
    ],
)
def test_a_limit_is_read(text: str, limit: Limit) -> None:
    assert Limit.parse(text) == limit
    assert Limit.parse(str(limit)) == limit


@pytest.mark.parametrize(
    "text",
    ["accuracy", "accuracy > 0.9", "accuracy >= 99%", ">= 1", "a >= nan", "a >= 1e999", "a = 1", 3],
)
def test_what_is_no_limit_is_one_line(text: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"cannot read limit .*write a metric, <= or >="):
        Limit.parse(text)


def test_nan_meets_no_limit() -> None:
    assert not Limit.parse("a >= 0").met(math.nan)
    assert not Limit.parse("a <= 0").met(math.nan)
    assert Limit.parse("a <= 0").met(0.0)


# --- whole searches --------------------------------------------------------------------------


def test_a_search_with_qualities_proposes_splits_and_is_never_worse_than_uniform(
    store: Store,
) -> None:
    held = batches(1, seed=9)
    result = search(store, quality_groups=GROUPS, held_out=held, budgets=["memory <= 25%"])
    found = on_calibration(result)
    splits = [e for name, e in found.items() if name.startswith("decoupled K=")]
    assert len(splits) > 3
    problem = result.problem.with_budgets(result.solution.budgets)
    assert all(problem.fits(e.allocation) for e in splits)
    fitting = [e for name, e in found.items() if problem.fits(e.allocation) and name != CHOSEN]
    uniform = [e for e in fitting if e.candidate.startswith("uniform ")]
    criterion = Criterion.of(QUALITY, [], uniform, fitting)
    assert criterion.value(found[CHOSEN]) == min(criterion.value(e) for e in fitting)
    assert criterion.value(found[CHOSEN]) < min(criterion.value(e) for e in uniform)
    (note,) = [e.message for e in store.events(result.run_id) if e.kind == "decoupled"]
    assert note.startswith("17 splits of memory between layout (2 units), texture (2 units): ")
    (held_out,) = [e for e in result.evaluation if e.split == "held_out" and e.candidate == CHOSEN]
    assert set(held_out.metrics) == set(QUALITY)
    assert SearchResult(store, result.run_id).problem.sensitivity.metric == "gauss_newton"


@pytest.mark.parametrize("budget", ["memory <= 21%", "memory <= 23%", "memory <= 25%"])
def test_the_choice_is_nearly_the_best_of_all_allocations(store: Store, budget: str) -> None:
    """All 625 allocations are run: by the divergence alone the choice is far from the best."""
    result = search(store, quality_groups=GROUPS, budgets=[budget])
    problem = result.problem.with_budgets(result.solution.budgets)
    found = on_calibration(result)
    fitting = [e for e in found.values() if problem.fits(e.allocation)]
    uniform = [e for e in fitting if e.candidate.startswith("uniform ")]
    criterion = Criterion.of(QUALITY, [], uniform, fitting)
    model = make_picture()
    best = math.inf
    with torch.no_grad():
        before = [model(b) for b in batches()]
        for choice in every_choice(problem):
            allocation = Allocation.from_choice(problem.cells, choice)
            if not problem.fits(allocation):
                continue
            with quantized(model, allocation):
                after = [model(b) for b in batches()]
            metrics = {
                name: float(
                    torch.cat([f(z, y, None) for z, y in zip(before, after, strict=True)]).mean()
                )
                for name, f in QUALITY.items()
            }
            best = min(best, criterion.value(measured("any", **metrics)))
    chosen = criterion.value(found[CHOSEN])
    assert best * (1 - 1e-9) <= chosen <= 1.01 * best
    if budget != "memory <= 25%":
        assert criterion.value(found["additive"]) > 2 * best
    split = min(criterion.value(e) for n, e in found.items() if n.startswith("decoupled"))
    assert split < criterion.value(found["additive"])


def test_measured_qualities_are_those_of_the_quantized_network(store: Store) -> None:
    result = search(store, budgets=["memory <= 40%"])
    model = make_picture()
    with torch.no_grad():
        before = [model(b) for b in batches()]
        with result.apply(model) as borrowed:
            after = [borrowed(b) for b in batches()]
    chosen = on_calibration(result)[CHOSEN]
    for name, quality in QUALITY.items():
        mean = torch.cat([quality(z, y, None) for z, y in zip(before, after, strict=True)]).mean()
        assert chosen.metrics[name] == pytest.approx(float(mean), rel=1e-9)


def test_each_cell_alone_has_its_measured_quality(store: Store) -> None:
    result = search(store)
    model = make_picture()
    found = store.sensitivity(result.run_id, "quality texture")
    with torch.no_grad():
        before = [model(b) for b in batches()]
        for (unit, scheme), value in zip(found.cells, found.values, strict=True):
            with quantized(model, {unit: scheme}):
                after = [model(b) for b in batches()]
            each = torch.cat([texture(z, y, None) for z, y in zip(before, after, strict=True)])
            assert value == pytest.approx(float(each.mean()), rel=1e-9, abs=1e-15)


def test_qualities_are_scored_and_measured_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = search(store)

    def never(*_: object) -> None:
        raise AssertionError("again")

    monkeypatch.setattr("mpq.evaluate.run_candidate", never)
    monkeypatch.setattr("mpq.quality_tables.run_qualities", never)
    assert search(store).allocation == first.allocation
    with pytest.raises(mpq.RunFailedError, match="again"):
        search(store, quality={"layout": texture, "texture": layout})


def quadratic(z: torch.Tensor, y: torch.Tensor, batch: object) -> torch.Tensor:
    return (z - y).double().square().flatten(1).mean(1)


def test_named_qualities_and_entry_points_are_those_of_a_job(store: Store) -> None:
    quality = {"content": "ssim", "fidelity": "tests.test_quality_search:quadratic"}
    result = search(
        store, quality=quality, quality_groups={"content": ["layout.*"], "fidelity": ["*"]}
    )
    assert store.run(result.run_id).spec.quality == quality
    assert set(on_calibration(result)[CHOSEN].metrics) == {"content", "fidelity"}


def accuracy_like(model: nn.Module) -> dict[str, float]:
    """A score of the user's own that falls with the error of the picture's layout."""
    with torch.no_grad():
        output = model(batches()[0])
        exact = make_picture()(batches()[0])
    return {"accuracy": 1.0 - float((output - exact).square().mean() / exact.square().mean())}


@pytest.mark.parametrize("quality", [None, QUALITY], ids=["divergence", "qualities"])
def test_a_candidate_that_breaks_a_limit_is_never_chosen(
    store: Store, quality: dict[str, Any] | None
) -> None:
    options = {"quality": quality, "evaluate": accuracy_like}
    free = search(store, **options, limits=["accuracy >= -1e9"])
    found = on_calibration(free)
    problem = free.problem.with_budgets(free.solution.budgets)
    reached = {
        name: e.metrics["accuracy"]
        for name, e in found.items()
        if name not in (CHOSEN, "unquantized") and problem.fits(e.allocation)
    }
    best = max(reached.values())
    asked = f"accuracy >= {best!r}"
    limited = search(store, **options, limits=[asked])
    chosen = on_calibration(limited)[CHOSEN]
    assert chosen.metrics["accuracy"] == best
    assert store.run(limited.run_id).spec.limits == (asked,)
    (note,) = [e.message for e in store.events(limited.run_id) if e.kind == "limit"]
    assert "accuracy >= " in note
    assert f"has {best:.6g}" in note


def test_a_limit_may_name_a_quality_function_that_scores_nothing(store: Store) -> None:
    result = search(store, quality=None, limits=["sqnr <= 0.5"])
    assert on_calibration(result)[CHOSEN].metrics["sqnr"] <= 0.5
    assert not [e for e in result.evaluation if e.candidate.startswith("decoupled")]


def test_an_unreachable_limit_is_one_line_and_nothing_is_lost(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InfeasibleError) as caught:
        search(store, limits=["sqnr <= 1e-9", "layout <= 1e9"])
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith("no candidate meets sqnr <= 1e-09 and layout <= 1e+09: the best sqnr is")
    (record,) = store.runs()
    assert record.state == RunState.FAILED
    assert record.error_message == said
    evaluations = store.evaluations(record.id)
    problem = store.problem(record.id)
    fits = Budget("memory", record_limit(problem))
    fitting = [e for e in evaluations if problem.with_budgets([fits]).fits(e.allocation)]
    assert len(fitting) > 3
    best = min(fitting, key=lambda e: e.metrics["sqnr"])
    assert f"the best sqnr is {best.metrics['sqnr']:.6g} ({best.candidate})" in said

    def never(*_: object) -> None:
        raise AssertionError("again")

    monkeypatch.setattr("mpq.quality_tables.run_qualities", never)
    monkeypatch.setattr("sensitivity.gauss_newton.GaussNewton.run", never)
    assert search(store, limits=["sqnr <= 0.9"]).run_id != record.id


def record_limit(problem: Problem) -> float:
    int4 = {str(scheme): a for scheme, a in problem.uniform().items()}["int4"]
    return problem.total("memory", int4.choice(problem.cells))


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"quality": {"a": "sim"}}, r"unknown quality 'sim': did you mean 'ssim'"),
        ({"quality": ["ssim"]}, r"quality is \{name: function\}, got \['ssim'\]"),
        ({"quality": {"a": None}}, r"unknown quality None"),
        (
            {"quality": {"a": "tests.test_quality_search:nothing"}},
            r"quality 'a' .*unknown name 'nothing'",
        ),
        (
            {"quality": {"a": lambda z, y, b: (z - y).mean()}},
            r"quality 'a' must return a tensor of",
        ),
        (
            {"quality": {"a": lambda z, y, b: torch.ones(len(z))}},
            r"quality 'a' of an output and itself is 1: it must be 0 for equal outputs",
        ),
        ({"quality": None, "quality_groups": {"a": ["*"]}}, r"unknown quality 'a'"),
        ({"quality_groups": {"layout": ["lay*"]}}, r"match no pattern of quality_groups"),
        ({"limits": "ssim <= 1"}, r"limits is a list"),
        ({"limits": ["ssim < 1"]}, r"cannot read limit 'ssim < 1'"),
        ({"limits": ["sim <= 1"]}, r"limit 'sim <= 1': unknown metric 'sim': did you mean 'ssim'"),
        (
            {"limits": ["acuracy >= 1"], "evaluate": accuracy_like},
            r"unknown limit metric 'acuracy': did you mean 'accuracy'",
        ),
        (
            {"evaluate": lambda model: {"layout": 1.0}, "limits": ["layout <= 9", "b <= 1"]},
            r"evaluate returns 'layout', which is the name of a quality as well: rename one",
        ),
    ],
)
def test_bad_input_is_one_line(store: Store, options: dict[str, Any], line: str) -> None:
    with pytest.raises(InvalidInputError, match=line) as caught:
        search(store, **options)
    assert "\n" not in str(caught.value)


def test_a_function_that_breaks_on_some_outputs_is_one_line(store: Store) -> None:
    def fragile(z: torch.Tensor, y: torch.Tensor, batch: object) -> torch.Tensor:
        return torch.full((len(z),), math.nan) if not torch.equal(z, y) else torch.zeros(len(z))

    with pytest.raises(InvalidInputError, match="quality 'a' is nan for sample 0 although"):
        search(store, quality={"a": fragile})


def test_the_metric_that_auto_picks_is_found_beside_the_tables_of_qualities(store: Store) -> None:
    result = search(store, metric="auto")
    metric = result.problem.sensitivity.metric
    assert metric != "auto"
    assert not metric.startswith("quality ")
