"""Groups of units with their own qualities, and splits of the budget between them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpq.core.errors import InvalidInputError
from mpq.core.jobs import JobSpec, given_groups
from mpq.core.problem import Budget, Problem
from mpq.core.tables import Cells, SensitivityTable
from mpq.decoupled import (
    check_groups,
    groups_by_effect,
    groups_by_pattern,
    joint_scores,
    scan_splits,
)
from mpq.nn.graph import build_graph
from mpq.store.store import Store, open_store
from tests.builders import cells, cost
from tests.oracles import every_choice
from tests.pictures import QUALITY, batches, make_picture, search


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "runs.db")) as opened:
        yield opened


def spec(**options: Any) -> JobSpec:
    given: dict[str, Any] = {"model": "a:b", "calibration": "a:c", "budgets": ("memory <= 1 MB",)}
    return JobSpec(**(given | {"quality": {"layout": "mse", "texture": "sqnr"}} | options))


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
