"""Schemes that people fix or rule out, by names."""

from __future__ import annotations

import pytest

from mpq.core.errors import InvalidInputError
from mpq.core.formats import parse_scheme
from mpq.nn.graph import build_graph
from mpq.pins import parse_forbidden, resolve_forbidden
from mpq.stated import stated
from solvers import solve
from tests.builders import case
from tests.test_solvers import drawn

MODEL, SAMPLE = case("decoder")
GRAPH = build_graph(MODEL, SAMPLE)


def test_a_layer_stands_for_its_unit() -> None:
    unit = next(unit for unit in GRAPH.units if len(unit.layers) > 1)
    other = GRAPH.units[-1]
    pair = ((unit.layers[1], "int2"), (other.name, parse_scheme("int4")))
    assert resolve_forbidden(GRAPH, [pair]) == [
        ((unit.name, parse_scheme("int2")), (other.name, parse_scheme("int4")))
    ]


@pytest.mark.parametrize("text", ["a=int2", "a=int2,b", "=int2,b=int2", "a=int2,b=int2,c=int2"])
def test_what_is_no_pair_is_told_how_to_write_one(text: str) -> None:
    with pytest.raises(InvalidInputError, match="NAME=SCHEME,NAME=SCHEME"):
        parse_forbidden([text])


def test_a_pair_as_it_is_typed() -> None:
    assert parse_forbidden(["a.b=int2, c=int4g64"]) == [(("a.b", "int2"), ("c", "int4g64"))]
    fixed = parse_forbidden(["a=fixed(8,2),b=int4+10%int8"])
    assert fixed == [(("a", "fixed(8,2)"), ("b", "int4+10%int8"))]


def test_unknown_names_and_odd_pairs_are_refused() -> None:
    name = GRAPH.units[0].name
    with pytest.raises(InvalidInputError, match="unknown layer"):
        resolve_forbidden(GRAPH, [(("no such layer", "int2"), (name, "int2"))])
    with pytest.raises(InvalidInputError, match="a forbidden pair is"):
        resolve_forbidden(GRAPH, ["ab"])  # type: ignore[list-item]


def test_a_forbidden_pair_is_not_taken_and_not_both_given_up() -> None:
    problem = drawn(8, 4, tight=0.3)
    budgets = list(problem.budgets)
    free = solve(stated(problem, budgets))
    assert free.allocation is not None
    first, second = list(free.allocation.items())[:2]
    kept = solve(stated(problem, budgets, forbidden=[(first, second)]))
    assert kept.allocation is not None
    assert not (kept.allocation[first[0]] == first[1] and kept.allocation[second[0]] == second[1])
    assert kept.score >= free.score
    pinned = solve(stated(problem, budgets, {first[0]: first[1]}, [(first, second)]))
    if pinned.allocation is not None:
        assert pinned.allocation[second[0]] != second[1]
