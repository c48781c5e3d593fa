from __future__ import annotations

import pickle
import time
from collections.abc import Callable

import numpy as np
import pytest

from mpq.core.errors import InvalidInputError
from mpq.core.formats import parse_scheme
from mpq.core.tables import Cells, CostTable, Responses, SensitivityTable
from tests.builders import cells, cost, schemes, sensitivity
from tests.oracles import slow_interactions, slow_own_scores

INT4, INT8 = schemes("int4", "int8")


def uneven() -> Cells:
    return Cells(units=("a", "b", "c"), schemes=((INT4,), (INT8, INT4), (INT4, INT8)))


def test_cells_are_numbered_unit_by_unit() -> None:
    found = uneven()
    assert [found.index(cell) for cell in found] == list(range(5)) == list(range(len(found)))
    assert found.offsets.tolist() == [0, 1, 3, 5]


def test_an_unknown_unit_gets_the_nearest_one() -> None:
    with pytest.raises(InvalidInputError, match="unknown unit 'unit22': did you mean 'unit2'"):
        cells().index(("unit22", INT4))


def test_an_unknown_scheme_of_a_unit_names_both() -> None:
    with pytest.raises(InvalidInputError, match="unit 'a': unknown scheme 'int8'") as caught:
        uneven().index(("a", INT8))
    assert caught.value.code == "unknown_scheme"


@pytest.mark.parametrize(
    ("units", "choices", "message"),
    [
        (("a",), ((INT4,), (INT4,)), "1 units but 2 lists"),
        (("a", "b", "a"), ((INT4,),) * 3, "unit names appear twice: a"),
        (("a", "b"), ((INT4,), ()), "unit 'b' has no scheme"),
        (("a", "b"), ((INT4,), (INT8, INT8)), "unit 'b' lists a scheme twice"),
    ],
)
def test_incomplete_cells_are_refused(units: tuple, choices: tuple, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Cells(units=units, schemes=choices)


def test_restrict_keeps_order_and_tells_old_numbers() -> None:
    fewer, numbers = uneven().restrict({"b": [INT4], "c": [INT8, INT4]})
    assert fewer.schemes == ((INT4,), (INT4,), (INT4, INT8))
    assert numbers.tolist() == [0, 2, 3, 4]
    old = list(uneven())
    assert [old[n] for n in numbers] == list(fewer)


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        ({"x": [INT4]}, "unknown unit 'x'"),
        ({"a": [INT8]}, "unit 'a': unknown scheme 'int8'"),
        ({"b": []}, "unit 'b' has no scheme"),
    ],
)
def test_restrict_refuses_what_is_not_there(allowed: dict, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        uneven().restrict(allowed)


@pytest.mark.parametrize("make", [sensitivity, cost])
def test_tables_restrict_their_values_with_the_cells(make: Callable[[Cells], CostTable]) -> None:
    table = make(uneven())
    fewer, numbers = uneven().restrict({"b": [INT4]})
    part = table.restrict(fewer, numbers)
    assert all(part[cell] == table[cell] for cell in fewer)


def test_a_cost_table_restricts_error_bars_and_keeps_the_rest() -> None:
    full = uneven()
    values = np.arange(5.0)
    table = CostTable(
        name="latency",
        unit="s",
        cells=full,
        values=values,
        low=values / 2,
        high=values * 2,
        fixed=3.0,
        baseline=9.0,
        weights=7,
        provenance="measured here",
    )
    part = table.restrict(*full.restrict({"c": [INT8]}))
    assert (part.low.tolist(), part.high.tolist()) == ([0.0, 0.5, 1.0, 2.0], [0.0, 2.0, 4.0, 8.0])
    assert (part.fixed, part.baseline, part.weights) == (3.0, 9.0, 7)
    assert part.provenance == "measured here"


def test_a_table_from_cells_follows_the_first_appearance_of_units() -> None:
    values = {("b", INT4): 1.0, ("a", INT8): 2.0, ("b", INT8): 3.0}
    table = SensitivityTable.from_cells("mine", values)
    assert list(table.cells) == [("b", INT4), ("b", INT8), ("a", INT8)]
    assert all(table[cell] == value for cell, value in values.items())
    assert table.stderr.tolist() == [0.0, 0.0, 0.0]


def test_standard_errors_from_cells_follow_their_cells() -> None:
    values = {("b", INT4): 1.0, ("a", INT8): 2.0, ("b", INT8): 3.0}
    table = SensitivityTable.from_cells("mine", values, {c: v / 10 for c, v in values.items()})
    np.testing.assert_allclose(table.stderr, table.values / 10)


def test_a_missing_standard_error_is_named() -> None:
    values = {("a", INT4): 1.0, ("a", INT8): 2.0}
    with pytest.raises(InvalidInputError, match="no standard error of unit 'a' in int8"):
        SensitivityTable.from_cells("mine", values, {("a", INT4): 0.0})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_value_that_is_not_finite_is_named(bad: float, place: int) -> None:
    values = np.ones(5)
    values[place] = bad
    unit, scheme = list(uneven())[place]
    for make in (
        lambda: sensitivity(uneven(), values),
        lambda: CostTable.exact("memory", "bytes", uneven(), values),
        lambda: Responses(cells=uneven(), vectors=values.reshape(5, 1, 1).astype(np.float32)),
    ):
        with pytest.raises(InvalidInputError, match=f"unit '{unit}' in {scheme}") as caught:
            make()
        assert caught.value.code == "table_not_finite"


@pytest.mark.parametrize("shape", [(4,), (6,), (5, 1), ()])
def test_a_table_has_one_value_for_each_cell(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError, match="for 5 cells"):
        sensitivity(uneven(), np.zeros(shape))


@pytest.mark.parametrize("shape", [(4, 2, 2), (5, 2), (5,)])
def test_responses_have_three_axes_and_one_row_for_each_cell(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError, match="for 5 cells"):
        Responses(cells=uneven(), vectors=np.zeros(shape, np.float32))


def test_a_negative_cost_is_named() -> None:
    with pytest.raises(InvalidInputError, match=r"'energy' of unit 'b' in int4 is negative: -2\."):
        CostTable.exact("energy", "J", uneven(), [1.0, 1.0, -2.0, 1.0, 1.0])


@pytest.mark.parametrize("fixed", [-1.0, np.nan, np.inf])
def test_the_fixed_part_of_a_cost_is_finite_and_not_negative(fixed: float) -> None:
    with pytest.raises(InvalidInputError, match="the fixed part of cost 'memory' is"):
        cost(uneven(), fixed=fixed)


def test_a_negative_sensitivity_is_allowed_but_a_negative_error_bar_is_not() -> None:
    assert sensitivity(uneven(), -np.ones(5))[("a", INT4)] == -1.0
    with pytest.raises(InvalidInputError, match="negative standard error"):
        SensitivityTable(metric="m", cells=uneven(), values=np.ones(5), stderr=-np.ones(5))


def test_a_table_keeps_its_own_read_only_values() -> None:
    given = np.ones(5)
    table = sensitivity(uneven(), given)
    given[0] = 7.0
    assert table.values[0] == 1.0
    with pytest.raises(ValueError, match="read-only"):
        table.values[0] = 2.0


def test_tables_survive_pickle() -> None:
    table = cost(uneven(), fixed=2.0)
    again = pickle.loads(pickle.dumps(table))
    assert again.cells == table.cells
    np.testing.assert_array_equal(again.values, table.values)


def test_a_million_units_build_and_restrict_in_seconds() -> None:
    number = 1_000_000
    names = tuple(f"layers.{i}.mlp" for i in range(number))
    started = time.process_time()
    full = Cells(units=names, schemes=(schemes("int4", "int8"),) * number)
    table = sensitivity(full)
    part = table.restrict(*full.restrict({"layers.5.mlp": [INT8]}))
    assert time.process_time() - started < 10
    assert len(part.values) == 2 * number - 1
    assert part[("layers.5.mlp", INT8)] == table[("layers.5.mlp", INT8)]


def responses(vectors: np.ndarray) -> Responses:
    names = tuple(f"u{i}" for i in range(len(vectors)))
    return Responses(
        cells=Cells(units=names, schemes=((INT4,),) * len(names)),
        vectors=vectors.astype(np.float32),
    )


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_own_scores_equal_slow_loops(samples: int) -> None:
    vectors = noise(4, samples, 3)
    for fast, slow in zip(responses(vectors).own_scores(), slow_own_scores(vectors), strict=True):
        np.testing.assert_allclose(fast, slow, rtol=1e-12)


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_interactions_equal_slow_loops(samples: int) -> None:
    vectors = noise(5, samples, 3)
    vectors[1] = 2 * vectors[0]
    fast = responses(vectors).interactions()
    np.testing.assert_allclose(fast, slow_interactions(vectors), rtol=1e-9, atol=1e-12)


def test_shrinking_keeps_the_diagonal() -> None:
    found = responses(noise(6, 9, 2))
    np.testing.assert_allclose(np.diag(found.interactions()), found.own_scores()[0], rtol=1e-12)


def test_one_sample_tells_no_interactions() -> None:
    found = responses(noise(4, 1, 8)).interactions()
    assert np.count_nonzero(found - np.diag(np.diag(found))) == 0


def test_most_interactions_of_pure_noise_are_dropped() -> None:
    found = responses(noise(40, 100, 1)).interactions()
    pairs = found[np.triu_indices(40, 1)]
    # A term is dropped where it is within one standard error of zero: 68 % of normal noise.
    dropped, error = np.mean(pairs == 0), np.sqrt(0.68 * 0.32 / len(pairs))
    assert abs(dropped - 0.68) < 5 * error


def test_a_strong_interaction_is_kept_for_three_quarters() -> None:
    vectors = noise(2, 400, 1)
    vectors[1] = vectors[0]
    found = responses(vectors).interactions()
    # With u_i = u_j the product is chi-squared: stderr^2 / mean^2 = 2 / samples.
    assert found[0, 1] == pytest.approx(0.75 * found[0, 0], rel=4 * 2 / 400)
    assert found[0, 1] < 0.75 * found[0, 0]


def test_without_sampling_error_three_quarters_are_the_square_of_the_sum() -> None:
    sample = noise(6, 1, 4)
    vectors = np.repeat(sample, 10, axis=1)  # every sample says the same
    found = responses(vectors).interactions()
    chosen = np.array([1.0, 0, 1, 1, 0, 1])
    total = np.einsum("c,cnk->nk", chosen, vectors.astype(np.float64))
    together = 0.5 * np.mean(total**2)
    alone = chosen @ (0.5 * np.mean(vectors.astype(np.float64) ** 2, axis=(1, 2)))
    assert chosen @ found @ chosen == pytest.approx(0.75 * together + 0.25 * alone, rel=1e-9)


def test_unshrunk_interactions_are_the_square_of_the_sum_for_any_allocation() -> None:
    vectors = noise(6, 5, 3)
    chosen = np.array([0.0, 1, 1, 0, 1, 0])
    total = np.einsum("c,cnk->nk", chosen, vectors.astype(np.float64))
    found = chosen @ slow_interactions(vectors, shrunk=False) @ chosen
    assert found == pytest.approx(0.5 * np.mean(total**2))


def test_responses_restrict_with_the_cells() -> None:
    full = Cells(units=("a", "b"), schemes=((INT4, INT8),) * 2)
    found = Responses(cells=full, vectors=noise(4, 2, 2))
    part = found.restrict(*full.restrict({"a": [parse_scheme("int8")]}))
    np.testing.assert_array_equal(part.vectors, found.vectors[[1, 2, 3]])


def test_a_clamped_table_has_no_negative_values_and_the_same_errors() -> None:
    of = cells(2)
    table = sensitivity(of, np.array([-1.0, 0.5, 0.0, 2.0, -3.0, 1.0]))
    found = table.clamped()
    np.testing.assert_array_equal(found.values, [0, 0.5, 0, 2, 0, 1])
    np.testing.assert_array_equal(found.stderr, table.stderr)
    assert (found.metric, found.cells) == (table.metric, table.cells)
    assert table.values[0] == -1
