"""What an allocation took where, and the optimum of each family beside the mixed one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mpq.core.formats import parse_format
from mpq.core.problem import Allocation, Budget, Problem
from mpq.core.tables import Cells, CostTable, SensitivityTable
from mpq.families import family_name, within_families
from mpq.format_shares import format_shares
from mpq.nn.graph import build_graph
from tests.builders import Block, mlp, schemes

TEXTS = ("int3", "int8", "fp4_e2m1", "fp6_e3m2", "int3@gptq", "int4@gptq", "fp32")


def mixed_problem(seed: int, limit: float) -> Problem:
    """Three units with every format; random losses, memory as bits."""
    rng = np.random.default_rng(seed)
    cells = Cells(units=("a", "b", "c"), schemes=(schemes(*TEXTS),) * 3)
    bits = [float(scheme.weights.bits) for _, scheme in cells]
    losses = [rng.uniform(0.5, 2.0) * 4.0**-b for b in bits]
    return Problem(
        sensitivity=SensitivityTable(
            metric="m", cells=cells, values=np.array(losses), stderr=np.zeros(len(cells))
        ),
        costs={"memory": CostTable.exact("memory", "bytes", cells, bits)},
        budgets=(Budget("memory", limit),),
    )


@pytest.mark.parametrize("seed", range(10))
def test_each_family_alone_is_solved_to_its_optimum(seed: int) -> None:
    problem = mixed_problem(seed, 14.0)
    found = within_families(problem)
    assert set(found) == {"only int", "only float", "only int@gptq"}
    for name, allocation in found.items():
        family = name.removeprefix("only ")
        own = [s for s in schemes(*TEXTS) if str(s) == "fp32" or family_name(s.weights) == family]
        choices = (
            Allocation(dict(zip("abc", mix, strict=True)))
            for mix in itertools.product(own, repeat=3)
        )
        best = min(problem.score(a.choice(problem.cells)) for a in choices if problem.fits(a))
        assert problem.score(allocation.choice(problem.cells)) == pytest.approx(best)


def test_a_family_that_does_not_fit_is_left_out() -> None:
    assert set(within_families(mixed_problem(0, 11.0))) == {"only int", "only int@gptq"}


def test_one_family_is_no_choice_of_families() -> None:
    problem = mixed_problem(0, 14.0)
    own = schemes("int3", "int8", "fp32")
    assert within_families(problem.pinned(dict.fromkeys("abc", own))) == {}


def test_a_unit_without_the_family_keeps_its_own_choices() -> None:
    problem = mixed_problem(1, 20.0).pinned({"a": schemes("fp6_e3m2")})
    for name, allocation in within_families(problem).items():
        assert str(allocation["a"]) == "fp6_e3m2", name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("int4g64", "int"),
        ("int4g64@gptq", "int@gptq"),
        ("int4+r4", "int+branch"),
        ("int4+10%int8", "mixed"),
        ("mxfp4", "mx"),
        ("bf16", "bf16"),
    ],
)
def test_a_family_is_called_by_its_numbers_and_its_rounding(text: str, name: str) -> None:
    assert family_name(parse_format(text)) == name


def test_shares_add_up_and_say_where() -> None:
    graph = build_graph(Block(), torch.randn(2, 5, 8))
    narrow, wide = schemes("int4", "int8")
    names = [unit.name for unit in graph.units]
    allocation = Allocation({name: wide if name == names[0] else narrow for name in names})
    found = format_shares(graph, allocation)
    assert sum(one.share for one in found) == pytest.approx(1.0)
    assert sum(one.units for one in found) == len(names)
    counted = {la.name for unit in graph.units for la in map(graph.by_name.get, unit.layers) if la}
    assert sum(count for one in found for _, count in one.roles) == len(counted)
    for one in found:
        weights = [
            layer
            for unit in graph.units
            if allocation[unit.name] == one.scheme
            for layer in graph.stored_layers(unit)
        ]
        total = sum(layer.num_weights for layer in weights)
        bits = sum(one.scheme.weights.storage_bits(layer.weight_shape) for layer in weights)
        assert one.share == pytest.approx(total / graph.searched_weights)
        assert one.bits == pytest.approx(bits / total)


def test_the_line_of_a_share_is_for_people() -> None:
    graph = build_graph(mlp(), torch.randn(2, 6))
    (int4,) = schemes("int4")
    (one,) = format_shares(graph, Allocation(dict.fromkeys(("0", "2"), int4)))
    assert one.told() == "int4: 2 units, 100.0% of the weights, 6.44 bits each: 0, 2"
