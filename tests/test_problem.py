from __future__ import annotations

import dataclasses
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq.core.errors import InvalidInputError
from mpq.core.formats import Scheme, parse_scheme
from mpq.core.problem import Allocation, Budget, BudgetText, Problem, budget_text
from mpq.core.quantities import quantity
from mpq.core.tables import Cells, CostTable, Responses
from tests.builders import cells, cost, problem, schemes, sensitivity

INT2, INT4, INT8 = schemes("int2", "int4", "int8")
TWO = Cells(units=("a", "b"), schemes=((INT4, INT8), (INT4, INT8)))
COSTS = {
    "memory": CostTable.exact(
        "memory", "bytes", TWO, [40, 80, 4, 8], fixed=16, baseline=400, weights=88
    ),
    "latency": CostTable.exact("latency", "s", TWO, [4e-3, 2e-3, 1e-3, 1e-3], baseline=8e-3),
    "bops": CostTable.exact("bops", "bitops", TWO, [1e9, 2e9, 3e9, 4e9], baseline=1e10),
    "energy": CostTable.exact("energy", "J", TWO, [1, 2, 3, 4]),
}


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("memory <= 100 B", 100),
        ("memory <= 100 bytes", 100),
        ("memory <= 6kB", 6_000),
        ("memory <= 8.5 MB", 8_500_000),
        ("memory <= 6GB", 6_000_000_000),
        ("memory <= 6KiB", 6 * 1024),
        ("memory <= 8.5 MiB", 8.5 * 2**20),
        ("memory <= 6GiB", 6 * 2**30),
        ("memory<=.5MB", 500_000),
        ("  memory  <=  5.e-1   MB  ", 500_000),
        ("memory <= 60%", 240),
        ("memory <= 150 %", 600),
        ("memory <= 4 bpw", 16 + 44),
        ("memory <= uniform int4", 16 + 44),
        ("memory <= uniform  int8", 16 + 88),
        ("latency <= 3 s", 3),
        ("latency <= 3 ms", 3e-3),
        ("latency <= 3.5us", 3.5e-6),
        ("latency <= 50%", 4e-3),
        ("latency <= uniform int8", 3e-3),
        ("bops <= 50%", 5e9),
        ("bops <= 7 bitops", 7),
        ("bops <= 7 MBOPs", 7e6),
        ("bops <= 7 GBOPs", 7e9),
        ("bops <= 7 TBOPs", 7e12),
        ("energy <= 3 mJ", 3e-3),
    ],
)
def test_a_budget_text_is_a_limit_in_the_unit_of_its_cost(text: str, limit: float) -> None:
    budget = BudgetText.parse(text).resolve(COSTS)
    assert budget.limit == pytest.approx(limit, rel=1e-15)
    assert (budget.cost, budget.text) == (text.split("<=")[0].strip(), text)


def test_decimal_and_binary_units_differ() -> None:
    decimal = BudgetText.parse("memory <= 6GB").resolve(COSTS).limit
    binary = BudgetText.parse("memory <= 6GiB").resolve(COSTS).limit
    assert binary / decimal == pytest.approx(1.0737, abs=1e-4)


def test_the_uniform_scheme_meets_its_own_budget_exactly() -> None:
    tables = {"memory": cost(cells(50), fixed=0.1)}
    asked = Problem(sensitivity=sensitivity(cells(50)), costs=tables, budgets=())
    limit = BudgetText.parse("memory <= uniform int4").resolve(tables)
    chosen = asked.uniform()[INT4]
    assert asked.total("memory", chosen.choice(asked.cells)) == limit.limit
    assert asked.with_budgets([limit]).fits(chosen)


@pytest.mark.parametrize("amount", ["0", "-3", "nan", "inf", "1e999", "0.0", "1e-999"])
@pytest.mark.parametrize("unit", ["MB", "%", "bpw"])
def test_a_budget_is_positive_and_finite(amount: str, unit: str) -> None:
    with pytest.raises(InvalidInputError, match="is a positive finite number, got") as caught:
        BudgetText.parse(f"memory <= {amount} {unit}")
    assert amount in str(caught.value)


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, math.inf])
def test_a_limit_is_positive_and_finite(limit: float) -> None:
    with pytest.raises(InvalidInputError, match="positive finite"):
        Budget("memory", limit)


GARBAGE = [
    "",
    "memory",
    "memory 60%",
    "memory < 60%",
    "memory >= 60%",
    "memory <= ",
    "memory <= much",
    "memory <= 1.2.3 MB",
    "memory <= . MB",
    "memory <= 1,5 MB",
    "memory <= 5 MB 6",
    "<= 5 MB",
    "memory <= 5 MB; latency <= 3 ms",
    "memory <= 60%\nlatency",
    "memory <= " + "1" * 5000 + "x y",
]


@pytest.mark.parametrize("text", GARBAGE)
def test_garbage_is_refused_in_one_line_with_what_was_given(text: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        BudgetText.parse(text)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=20) | st.from_regex(r"memory <= [\d.eE+\-%a-zA-Z ]{0,12}", fullmatch=True))
def test_any_text_is_a_budget_or_refused_in_one_line(text: str) -> None:
    message = ""
    try:
        BudgetText.parse(text)
    except InvalidInputError as error:
        message = str(error)
    assert "\n" not in message


@pytest.mark.parametrize("value", [60, 0.6, None, ("memory", 3)])
def test_a_budget_that_is_no_text_is_refused(value: object) -> None:
    with pytest.raises(InvalidInputError, match="a budget is a text such as"):
        BudgetText.parse(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("unit", "near"), [("GIB", "GiB"), ("Mb", "MB"), ("", None), ("bit", None)]
)
def test_an_unknown_unit_lists_the_known_ones(unit: str, near: str | None) -> None:
    with pytest.raises(InvalidInputError, match=f"unknown budget unit '{unit}'") as caught:
        BudgetText.parse(f"memory <= 6{unit}")
    assert "Known: %, B, " in str(caught.value)
    assert near is None or f"did you mean '{near}'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latency <= 8 MB", "latency is counted in s, so write it in s or ms or us or %"),
        ("memory <= 8 ms", "memory is counted in bytes"),
        ("bops <= 8 GB", "bops is counted in bitops"),
        ("latency <= 4 bpw", "latency is counted in s"),
        ("energy <= 50%", "needs a known baseline of cost 'energy'"),
        ("memory <= uniform int3", "unit 'a': unknown scheme 'int3': did you mean"),
        ("memroy <= 8 MB", "unknown cost 'memroy': did you mean 'memory'"),
    ],
)
def test_a_budget_that_does_not_suit_its_cost_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        BudgetText.parse(text).resolve(COSTS)


def test_a_cost_in_a_unit_of_its_own_takes_percentages() -> None:
    tables = {"area": CostTable.exact("area", "mm2", TWO, [1, 2, 3, 4], baseline=10)}
    assert BudgetText.parse("area <= 50%").resolve(tables).limit == 5
    with pytest.raises(InvalidInputError, match="area is counted in mm2, so write it in %"):
        BudgetText.parse("area <= 8 MB").resolve(tables)


@given(
    st.sampled_from(["memory", "latency", "bops", "energy"]),
    st.floats(min_value=1e-300, max_value=1e300),
    st.sampled_from([float, np.float64]),
)
def test_a_budget_reads_back_from_its_text(cost_name: str, limit: float, kind: type) -> None:
    text = budget_text(Budget(cost_name, kind(limit)))
    assert BudgetText.parse(text).resolve(COSTS).limit == limit


@given(st.floats(min_value=1e-5, max_value=1e14), st.sampled_from(["bytes", "s", "bitops", "J"]))
def test_a_printed_limit_can_be_written_as_a_budget_and_suffices(value: float, unit: str) -> None:
    name = {"bytes": "memory", "s": "latency", "bitops": "bops", "J": "energy"}[unit]
    printed = quantity(value, unit, up=True)
    limit = BudgetText.parse(f"{name} <= {printed}").resolve(COSTS).limit
    assert limit >= value * (1 - 1e-15)
    assert limit <= max(value * 1.002, 1.0 if unit in ("bytes", "bitops") else 0.0)


def test_only_known_costs_have_a_text() -> None:
    with pytest.raises(InvalidInputError, match="unknown cost 'area'"):
        budget_text(Budget("area", 3.0))


def test_totals_are_the_fixed_part_and_the_chosen_cells() -> None:
    asked = problem(cells(3))
    choice = np.array([0, 4, 8])
    assert asked.total("memory", choice) == 10 + 1 + 5 + 9
    assert asked.totals(choice) == {"memory": 25.0, "latency": 15.0}
    assert asked.score(choice) == 9 + 5 + 1


def test_a_budget_is_met_up_to_and_including_its_limit() -> None:
    chosen = Allocation.from_choice(cells(3), np.array([0, 4, 8]))
    assert problem(cells(3), {"memory": 25.0}).fits(chosen)
    assert not problem(cells(3), {"memory": np.nextafter(25.0, 0)}).fits(chosen)


def test_every_budget_counts() -> None:
    chosen = Allocation.from_choice(cells(3), np.array([0, 4, 8]))
    assert not problem(cells(3), {"memory": 25.0, "latency": 14.0}).fits(chosen)
    assert problem(cells(3), {}).fits(chosen)


def test_pinned_units_keep_only_what_is_allowed_in_every_table() -> None:
    asked = dataclasses.replace(
        problem(cells(2)),
        responses=Responses(cells=cells(2), vectors=np.arange(6.0).reshape(6, 1, 1)),
    )
    fewer = asked.pinned({"unit1": [INT8]})
    assert fewer.cells.schemes == ((INT2, INT4, INT8), (INT8,))
    for table in (fewer.sensitivity, *fewer.costs.values()):
        assert table.cells is fewer.cells
    assert fewer.costs["memory"][("unit1", INT8)] == asked.costs["memory"][("unit1", INT8)]
    assert fewer.responses is not None
    assert fewer.responses.vectors.reshape(-1).tolist() == [0, 1, 2, 5]
    assert fewer.budgets == asked.budgets


def test_uniform_allocations_leave_pinned_units_alone() -> None:
    found = problem(cells(3)).pinned({"unit1": [INT8]}).uniform()
    assert list(found) == [INT2, INT4, INT8]
    assert found[INT2] == {"unit0": INT2, "unit1": INT8, "unit2": INT2}


def test_a_scheme_that_a_free_unit_may_not_take_is_no_uniform_one() -> None:
    found = problem(cells(3)).pinned({"unit1": [INT4, INT8]}).uniform()
    assert list(found) == [INT4, INT8]


def test_without_a_free_unit_nothing_is_uniform() -> None:
    assert problem(cells(1, ("int4",))).uniform() == {}


def test_tables_over_other_cells_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="different cells"):
        Problem(sensitivity=sensitivity(cells(2)), costs={"memory": cost(cells(3))}, budgets=())


def test_responses_over_other_cells_are_refused() -> None:
    vectors = np.zeros((9, 1, 1), np.float32)
    with pytest.raises(InvalidInputError, match="different cells"):
        dataclasses.replace(problem(cells(2)), responses=Responses(cells=cells(3), vectors=vectors))


def test_a_budget_on_an_unknown_cost_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="unknown cost 'memroy': did you mean 'memory'"):
        problem(cells(2), {"memroy": 3.0})


def chosen() -> Allocation:
    return Allocation({"a.q-proj": INT4, "b c": parse_scheme("int4g64a:int8s"), "é": INT8})


def test_an_allocation_reads_back_from_its_text() -> None:
    assert Allocation.from_text(chosen().text()) == chosen()
    assert chosen().text()["b c"] == "int4g64a:int8s"


@given(st.lists(st.integers(0, 2), min_size=4, max_size=4))
def test_a_choice_and_its_allocation_are_one(places: list[int]) -> None:
    of = cells(4)
    choice = of.offsets[:-1] + np.array(places)
    assert Allocation.from_choice(of, choice).choice(of).tolist() == choice.tolist()


def test_equal_allocations_have_one_hash_in_any_order() -> None:
    other = Allocation(dict(reversed(list(chosen().items()))))
    assert other == chosen()
    assert hash(other) == hash(chosen())
    assert len({other, chosen()}) == 1


def test_an_allocation_cannot_change() -> None:
    given: dict[str, Scheme] = {"a": INT4}
    allocation = Allocation(given)
    given["a"] = INT8
    assert allocation["a"] == INT4
    with pytest.raises(TypeError):
        allocation["a"] = INT8  # type: ignore[index]
    with pytest.raises(AttributeError):
        allocation.name = "x"  # type: ignore[attr-defined]


def test_an_allocation_survives_pickle() -> None:
    assert pickle.loads(pickle.dumps(chosen())) == chosen()


def test_a_unit_without_a_scheme_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        chosen()["nobody"]
