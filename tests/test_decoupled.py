"""Groups of units with their own qualities, splits of the budget between them, and limits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpq
from mpq.core.errors import InfeasibleError, InvalidInputError
from mpq.core.evaluation import CHOSEN, Evaluation
from mpq.core.jobs import JobSpec, RunState
from mpq.core.limits import Limit
from mpq.core.problem import Allocation, Budget, Problem
from mpq.core.tables import Cells, SensitivityTable
from mpq.criterion import Criterion
from mpq.decoupled import (
    check_groups,
    given_groups,
    groups_by_effect,
    groups_by_pattern,
    joint_scores,
    scan_splits,
)
from mpq.nn.graph import build_graph
from mpq.nn.patch import quantized
from mpq.result import SearchResult
from mpq.store.store import Store, open_store
from tests.builders import cells, cost
from tests.oracles import every_choice

# --- a network of which it is known what each layer moves ------------------------------------


class Picture(nn.Module):
    """8x8 images: `layout` makes the mean of each 4x4 block, `texture` what has no such mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layout = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
        self.texture = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks = F.interpolate(self.layout(x).reshape(-1, 1, 2, 2), scale_factor=4)
        fine = self.texture(x).reshape(-1, 1, 8, 8)
        return 30.0 * blocks + fine - F.interpolate(F.avg_pool2d(fine, 4), scale_factor=4)


def layout(z: torch.Tensor, y: torch.Tensor, batch: object) -> torch.Tensor:
    return (F.avg_pool2d(z, 4) - F.avg_pool2d(y, 4)).double().square().flatten(1).mean(1)


def texture(z: torch.Tensor, y: torch.Tensor, batch: object) -> torch.Tensor:
    change = (y - z).double()
    rest = change - F.interpolate(F.avg_pool2d(change, 4), scale_factor=4)
    return rest.square().flatten(1).mean(1)


QUALITY = {"layout": layout, "texture": texture}
GROUPS = {"layout": ["layout.*"], "texture": ["*"]}


def make_picture() -> nn.Module:
    torch.manual_seed(0)
    return Picture().eval()


def batches(count: int = 2, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 6, generator=generator) for _ in range(count)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "runs.db")) as opened:
        yield opened


def search(store: Store, **options: Any) -> SearchResult:
    settings: dict[str, Any] = {
        "budgets": ["memory <= uniform int4"],
        "schemes": ["int2", "int3", "int4", "int6", "int8"],
        "executor": "serial",
        "quality": QUALITY,
        "refine": 0,
    }
    return mpq.search(make_picture(), batches(), storage=store, **(settings | options))


def spec(**options: Any) -> JobSpec:
    given: dict[str, Any] = {"model": "a:b", "calibration": "a:c", "budgets": ("memory <= 1 MB",)}
    return JobSpec(**(given | {"quality": {"layout": "mse", "texture": "sqnr"}} | options))


def on_calibration(result: SearchResult) -> dict[str, Evaluation]:
    return {e.candidate: e for e in result.evaluation if e.split == "calibration"}


# --- groups ----------------------------------------------------------------------------------


def test_the_first_pattern_that_matches_wins() -> None:
    graph = build_graph(make_picture(), batches()[0])
    asked = {"texture": ["texture.2"], "layout": ["layout.*", "texture.*"]}
    groups = groups_by_pattern(graph, asked)
    assert groups == {"texture": ["texture.2"], "layout": ["layout.0", "layout.2", "texture.0"]}


def test_a_pattern_may_name_a_layer_of_a_unit() -> None:
    graph = build_graph(make_picture(), batches()[0], groups=[["layout.0", "texture.0"]])
    groups = groups_by_pattern(graph, {"layout": ["texture.0"], "texture": ["*"]})
    (together,) = [unit for unit in graph.units if len(unit.layers) == 2]
    assert groups["layout"] == [together.name]


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"layout": ["layout.*"]}, r"unit 'texture.0' and 1 more units match no pattern"),
        ({"layout": ["*"], "texture": ["texture.*"]}, r"quality group 'texture' has no unit left"),
        ({"layout": ["layot.0"], "texture": ["*"]}, r"did you mean 'layout.0'\?"),
        ({"texure": ["*"]}, r"unknown quality 'texure': did you mean 'texture'\?"),
        ({}, r"give 1 to 3 quality groups, got 0"),
    ],
    ids=["unit left over", "empty group", "pattern of nothing", "unknown quality", "none"],
)
def test_groups_that_are_no_partition_are_one_line(
    asked: dict[str, tuple[str, ...]], line: str
) -> None:
    graph = build_graph(make_picture(), batches()[0])
    with pytest.raises(InvalidInputError, match=line) as caught:
        check_groups(spec(quality_groups=asked), graph)
    assert "\n" not in str(caught.value)


def test_more_than_three_groups_are_refused() -> None:
    graph = build_graph(make_picture(), batches()[0])
    four = dict.fromkeys("abcd", "mse")
    with pytest.raises(InvalidInputError, match="4 qualities cannot all have a group, 3 can"):
        check_groups(spec(quality=four), graph)
    with pytest.raises(InvalidInputError, match="give 1 to 3 quality groups, got 4"):
        check_groups(spec(quality=four, quality_groups={n: (n,) for n in four}), graph)


@pytest.mark.parametrize("asked", [["*"], {"layout": "*"}, "pattern", None])
def test_groups_of_another_form_are_refused(asked: object) -> None:
    with pytest.raises(InvalidInputError, match=r"quality_groups is 'auto' or \{quality"):
        given_groups(asked)


def test_auto_groups_find_the_quality_that_each_unit_moves(store: Store) -> None:
    result = search(store)
    tables = {name: store.sensitivity(result.run_id, f"quality {name}") for name in QUALITY}
    assert tables["layout"].values.max() > 10 * tables["texture"].values.max()
    assert groups_by_effect(tables) == {
        "layout": ["layout.0", "layout.2"],
        "texture": ["texture.0", "texture.2"],
    }


def test_auto_groups_see_neither_the_unit_of_a_quality_nor_one_huge_layer() -> None:
    of = cells(5)
    of_a = 1e4 * np.array([9.0, 8.0, 1.0, 2.0, 1e6]).repeat(3)
    of_b = np.array([1.0, 2.0, 7.0, 9.0, 3.0]).repeat(3)
    assert groups_by_effect({"a": table(of, of_a), "b": table(of, of_b)}) == {
        "a": ["unit0", "unit1", "unit4"],
        "b": ["unit2", "unit3"],
    }


def test_auto_groups_leave_out_a_quality_that_nothing_prefers() -> None:
    of = cells(2)
    strong, none = np.arange(1.0, 7.0), np.zeros(6)
    assert groups_by_effect({"a": table(of, none), "b": table(of, strong)}) == {
        "b": ["unit0", "unit1"]
    }


# --- splits ----------------------------------------------------------------------------------


def table(of: Cells, values: np.ndarray) -> SensitivityTable:
    return SensitivityTable(metric="made", cells=of, values=values, stderr=np.zeros(len(of)))


def made_problem(seed: int, units: int, two_budgets: bool) -> Problem:
    random = np.random.default_rng(seed)
    of = cells(units)
    sizes = random.uniform(1, 5, units).repeat(3)
    memory = cost(of, fixed=7.0)
    bytes_of = np.tile([2.0, 4.0, 8.0], units) * sizes
    memory = type(memory).exact("memory", "bytes", of, bytes_of, fixed=7.0)
    bops = type(memory).exact(
        "bops", "bitops", of, random.permuted(bytes_of.reshape(-1, 3), axis=1).ravel()
    )
    budgets = [Budget("memory", 7.0 + bytes_of.reshape(-1, 3)[:, 1].sum())]
    if two_budgets:
        budgets.append(Budget("bops", 0.9 * bops.values.reshape(-1, 3).mean(1).sum()))
    return Problem(
        sensitivity=table(of, np.zeros(len(of))),
        costs={"memory": memory, "bops": bops},
        budgets=tuple(budgets),
    )


def made_tables(seed: int, of: Cells, names: tuple[str, ...]) -> dict[str, SensitivityTable]:
    random = np.random.default_rng(seed + 1000)
    falling = np.tile([1.0, 0.1, 0.01], len(of.units))
    return {
        name: table(of, scale * falling * random.uniform(0.1, 3, len(of.units)).repeat(3))
        for name, scale in zip(names, (1.0, 1e4, 1e-5), strict=False)
    }


def brute_force_split(
    problem: Problem,
    own: Mapping[str, SensitivityTable],
    groups: Mapping[str, list[str]],
    limits: Mapping[str, float],
    scales: Mapping[str, float],
) -> float:
    """Return the least scaled score over all allocations in which each group keeps its share."""
    best = math.inf
    number = {unit: u for u, unit in enumerate(problem.cells.units)}
    for choice in every_choice(problem):
        if any(problem.total(b.cost, choice) > b.limit for b in problem.budgets):
            continue
        mine = {name: choice[[number[u] for u in units]] for name, units in groups.items()}
        memory = problem.costs["memory"].values
        if all(memory[mine[n]].sum() <= limits[n] * (1 + 1e-12) for n in groups):
            score = sum(own[n].values[mine[n]].sum() / scales[n] for n in groups)
            best = min(best, score)
    return best


@pytest.mark.parametrize("two_budgets", [False, True])
@pytest.mark.parametrize(("names", "count"), [(("a", "b"), 17), (("a", "b", "c"), 19)])
def test_each_split_is_solved_exactly(
    names: tuple[str, ...], count: int, two_budgets: bool
) -> None:
    """Each candidate has the least score that its own split allows, by brute force."""
    compared = 0
    for seed in range(3):
        problem = made_problem(seed, 6, two_budgets)
        own = made_tables(seed, problem.cells, names)
        groups = {n: list(problem.cells.units[i :: len(names)]) for i, n in enumerate(names)}
        splits = scan_splits(problem, own, groups)
        assert splits.tried == count
        assert splits.cost == "memory"
        memory = problem.costs["memory"]
        uniform = [a.choice(problem.cells) for a in problem.uniform().values() if problem.fits(a)]
        scales = {
            n: min(own[n].values[c].sum() for c in uniform)
            if uniform
            else own[n].values.mean() * len(problem.cells.units)
            for n in names
        }
        mean = {
            n: sum(memory[u, s] for u in groups[n] for s in problem.cells.schemes[0]) / 3
            for n in names
        }
        for name, allocation in splits.allocations.items():
            assert problem.fits(allocation)
            k = [*map(float, name.removeprefix("decoupled K=").split(":")), 1.0]
            weights = [mean[n] * factor for n, factor in zip(names, k, strict=True)]
            score = sum(
                own[n][unit, allocation[unit]] / scales[n] for n in names for unit in groups[n]
            )
            # K is rounded to two digits in the name: look a little below and above the shares
            left = problem.budgets[0].limit - 7.0
            shares = {n: left * w / sum(weights) for n, w in zip(names, weights, strict=True)}
            less, more = ({n: f * share for n, share in shares.items()} for f in (0.98, 1.02))
            assert score >= (1 - 1e-9) * brute_force_split(problem, own, groups, more, scales)
            assert score <= (1 + 1e-9) * brute_force_split(problem, own, groups, less, scales)
            compared += 1
    assert compared >= 12


def test_the_scan_finds_the_split_that_is_known_to_be_best() -> None:
    """One group does not mind 2 bits and the other needs 8: exactly one allocation does it."""
    of = cells(6)
    memory = cost(of)
    memory = type(memory).exact("memory", "bytes", of, np.tile([2.0, 4.0, 8.0], 6), fixed=3.0)
    problem = Problem(
        sensitivity=table(of, np.zeros(len(of))),
        costs={"memory": memory},
        budgets=(Budget("memory", 3.0 + 3 * 2 + 3 * 8),),
    )
    own = {
        "robust": table(of, np.tile([1e-6, 1e-7, 0.0], 6)),
        "fragile": table(of, np.tile([9.0, 3.0, 0.0], 6)),
    }
    groups = {"robust": list(of.units[::2]), "fragile": list(of.units[1::2])}
    truth = {
        tuple(choice): sum(own[n].values[choice].sum() for n in own)
        for choice in every_choice(problem)
        if problem.total("memory", choice) <= problem.budgets[0].limit
    }

    def both(choice: np.ndarray) -> float:
        return float(
            own["robust"].values[choice[::2]].sum() + own["fragile"].values[choice[1::2]].sum()
        )

    least = min(both(np.array(choice)) for choice in truth)
    splits = scan_splits(problem, own, groups)
    scores = {n: both(a.choice(of)) for n, a in splits.allocations.items()}
    assert min(scores.values()) == pytest.approx(least)
    assert scores["decoupled K=1.00"] > least + 1  # proportional shares are not enough
    assert min(scores, key=lambda n: scores[n]) == "decoupled K=0.25"


def test_proportional_shares_come_first_and_equal_allocations_once() -> None:
    problem = made_problem(0, 6, False)
    own = made_tables(0, problem.cells, ("a", "b"))
    groups = {"a": list(problem.cells.units[:3]), "b": list(problem.cells.units[3:])}
    splits = scan_splits(problem, own, groups)
    assert next(iter(splits.allocations)) == "decoupled K=1.00"
    assert len(set(splits.allocations.values())) == len(splits.allocations)
    assert len(splits.allocations) + splits.infeasible <= splits.tried == 17


def test_splits_that_starve_a_group_are_counted() -> None:
    problem = made_problem(1, 4, False)
    least = problem.costs["memory"].values.reshape(-1, 3)[:, 0].sum()
    tight = problem.with_budgets([Budget("memory", 7.0 + 1.02 * least)])
    own = made_tables(1, problem.cells, ("a", "b"))
    groups = {"a": list(problem.cells.units[:2]), "b": list(problem.cells.units[2:])}
    splits = scan_splits(tight, own, groups)
    assert splits.infeasible > splits.tried / 2
    assert all(tight.fits(a) for a in splits.allocations.values())


def test_one_group_is_the_plain_optimum_of_its_quality() -> None:
    problem = made_problem(2, 5, False)
    own = made_tables(2, problem.cells, ("a",))
    splits = scan_splits(problem, own, {"a": list(problem.cells.units)})
    (allocation,) = splits.allocations.values()
    scored = Problem(sensitivity=own["a"], costs=problem.costs, budgets=problem.budgets)
    least = min(
        scored.score(choice)
        for choice in every_choice(scored)
        if scored.total("memory", choice) <= scored.budgets[0].limit
    )
    assert scored.score(allocation.choice(problem.cells)) == pytest.approx(least)


def test_without_a_memory_budget_the_first_budget_is_split() -> None:
    problem = made_problem(3, 4, True)
    problem = problem.with_budgets(problem.budgets[1:])
    own = made_tables(3, problem.cells, ("a", "b"))
    groups = {"a": list(problem.cells.units[:2]), "b": list(problem.cells.units[2:])}
    splits = scan_splits(problem, own, groups)
    assert splits.cost == "bops"
    assert all(problem.fits(a) for a in splits.allocations.values())


def test_summed_qualities_count_alike_whatever_their_unit() -> None:
    problem = made_problem(4, 4, False)
    own = made_tables(4, problem.cells, ("a", "b"))
    values = joint_scores(problem, own).sensitivity.values
    million = {"a": own["a"], "b": table(problem.cells, 1e6 * own["b"].values)}
    np.testing.assert_allclose(joint_scores(problem, million).sensitivity.values, values)


# --- the criterion ---------------------------------------------------------------------------


def measured(name: str, mean: float = 1.0, **metrics: float) -> Evaluation:
    return Evaluation(
        candidate=name,
        split="calibration",
        allocation=Allocation({}),
        divergence="kl",
        mean=mean,
        stderr=0.0,
        metrics=metrics,
    )


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
    quality = {"content": "ssim", "fidelity": "tests.test_decoupled:quadratic"}
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
            {"quality": {"a": "tests.test_decoupled:nothing"}},
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
