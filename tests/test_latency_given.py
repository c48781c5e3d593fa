"""Times that the user gives: look-up tables and bit planes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from hw_cost_models import get_hardware
from hw_cost_models.bitplanes import BitPlanes
from hw_cost_models.table import LatencyTable, read_table
from mpq.core.errors import InvalidInputError
from mpq.core.formats import parse_scheme
from mpq.core.provenance import cost_label, is_modelled, modelled_note
from tests.test_costs import cells_of, graph_of_three, linear

HEADER = "layer,scheme,latency_ms\n"
COMPLETE = HEADER + "".join(
    f"{layer},{scheme},{ms}\n"
    for layer, times in {"a": (3, 2), "twin": (3, 2), "b": (5, 4), "head": (1, 0.5)}.items()
    for scheme, ms in zip(("fp32", "int8"), times, strict=True)
)


def written(path: Path, text: str, name: str = "times.csv") -> str:
    (path / name).write_text(text)
    return str(path / name)


def test_a_table_of_layers_sums_its_entries(tmp_path: Path) -> None:
    model = get_hardware(f"table:{written(tmp_path, COMPLETE)}")
    table = model.table(graph_of_three(), cells_of("fp32", "int8"))
    assert table.values.tolist() == pytest.approx([6e-3, 4e-3, 5e-3, 4e-3])
    assert table.fixed == pytest.approx(1e-3)
    assert table.baseline == pytest.approx(12e-3)
    assert table.provenance == "table times.csv"
    assert cost_label(table) == "latency (given)"
    assert [str(s) for s in model.schemes(linear("a", 8, 16))] == ["fp32", "int8"]


def test_a_table_of_shapes_counts_every_call_and_layers_come_first(tmp_path: Path) -> None:
    rows = [
        {"shape": "linear 7x16->8", "scheme": "int8", "latency_us": 10},
        {"shape": "linear 7x32->5", "scheme": "int8", "latency_us": 7},
        {"layer": "twin", "scheme": "int8", "latency_s": "1e-6"},
    ]
    model = read_table(written(tmp_path, json.dumps(rows), "t.json"))
    table = model.table(graph_of_three(), cells_of("int8"))
    assert table.values.tolist() == pytest.approx([11e-6, 14e-6])  # b is called twice
    assert table.fixed == 0
    assert math.isnan(table.baseline)


def test_what_is_missing_is_named_and_never_made_up(tmp_path: Path) -> None:
    model = read_table(written(tmp_path, COMPLETE))
    with pytest.raises(InvalidInputError, match=r"int4: .* no entry for layer 'a'") as caught:
        model.table(graph_of_three(), cells_of("int8", "int4"))
    assert "\n" not in str(caught.value)
    assert "did you mean 'head'" in model.why_not(linear("heat", 3, 5), parse_scheme("int8"))
    assert model.why_not(linear("heat", 3, 5, calls=0), parse_scheme("int8")) == ""
    assert isinstance(model, LatencyTable)
    assert model.schemes(linear("heat", 3, 5)) == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (HEADER + "a,int8,0\n", "line 2: latency_ms is a positive finite number, got '0'"),
        (HEADER + "a,int8,-1\n", "got '-1'"),
        (HEADER + "a,int8,nan\n", "got 'nan'"),
        (HEADER + "a,int8,inf\n", "got 'inf'"),
        (HEADER + "a,int8,fast\n", "got 'fast'"),
        (HEADER + "a,int8,\n", "give the time in one of"),
        (HEADER + ",int8,1\n", "give a layer or a shape, got 0"),
        (HEADER + "a,int9,1\n", "line 2: integer formats have 1 to 8 bits"),
        (HEADER + "a,int8,1\na,int8,2\n", "line 3: layer 'a' in int8 appears twice"),
        (HEADER, "no rows"),
        ("", "no rows"),
        ("layer,scheme,latency\na,int8,1\n", "latency_s, latency_ms, latency_us"),
        ("layer,scheme,latency_ms,latency_s\na,int8,1,1\n", "got 2"),
    ],
)
def test_a_bad_csv_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        read_table(written(tmp_path, text))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "{}", "[1]", '[{"layer": "a", "latency_s": true}]'])
def test_a_bad_json_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        read_table(written(tmp_path, text, "t.json"))
    assert "\n" not in str(caught.value)
    assert "t.json" in str(caught.value)


@pytest.mark.parametrize("bad", ["true", "NaN", "Infinity", "null", "[]"])
def test_a_bad_time_in_json_is_refused(tmp_path: Path, bad: str) -> None:
    rows = f'[{{"layer": "a", "scheme": "int8", "latency_s": {bad}}}]'
    with pytest.raises(InvalidInputError, match="row 1"):
        read_table(written(tmp_path, rows, "t.json"))


def test_a_table_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    for text in (f"table:{tmp_path / 'no.csv'}", "table:", f"table:{tmp_path}"):
        with pytest.raises(InvalidInputError) as caught:
            get_hardware(text)
        assert "\n" not in str(caught.value)


def test_bit_planes_by_hand() -> None:
    model = get_hardware("bitplanes:a=2e-6,c=1e-9")
    table = model.table(graph_of_three(), cells_of("int4:int8", "int2:int2"))
    macs_ab, macs_b = 2 * 7 * 8 * 16, 2 * 7 * 5 * 32
    expected = [4e-6 + 1e-9 * bits * macs for macs in (macs_ab, macs_b) for bits in (32, 4)]
    assert table.values.tolist() == pytest.approx(expected)
    assert table.fixed == 0
    assert math.isnan(table.baseline)
    assert is_modelled(table)
    assert modelled_note([table]) == "latency is modelled (bit planes a=2e-06 s, c=1e-09 s)"


def test_bit_planes_grow_with_either_width() -> None:
    model, layer = BitPlanes(a=1e-6, c=1e-12), linear("a", 8, 16)
    times = [
        [model.seconds(layer, parse_scheme(f"int{p}:int{q}")) for p in range(1, 9)]
        for q in range(1, 9)
    ]
    assert all(row == sorted(row) for row in (*times, *map(list, zip(*times, strict=True))))


def test_bit_planes_refuse_what_they_do_not_run() -> None:
    model, layer = BitPlanes(a=0.0, c=1e-12), linear("a", 8, 16)
    assert "integers on both sides" in model.why_not(layer, parse_scheme("int4"))
    assert "integers on both sides" in model.why_not(layer, parse_scheme("fp32"))
    words = linear("w", 50, 8, kind="embedding")
    assert "reads indices" in model.why_not(words, parse_scheme("int4:int8"))
    with pytest.raises(InvalidInputError, match="layer 'a': int4"):
        model.table(graph_of_three(), cells_of("int4"))
    for text in ("", "a=1", "a=x,c=1", "a=1,c=1,d=2", "a=-1,c=1", "a=1,c=0", "a=nan,c=1"):
        with pytest.raises(InvalidInputError) as caught:
            get_hardware(f"bitplanes:{text}")
        assert "\n" not in str(caught.value)
