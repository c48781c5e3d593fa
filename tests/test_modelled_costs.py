"""Energy, MACs and LUTs by hand; searches on machines that are not here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import mpq
from hw_cost_models import get_cost_model
from hw_cost_models.energy import mac_joules
from hw_cost_models.luts import dsps_per_mac, luts_per_mac
from hw_cost_models.roofline import Roofline
from mpq.core.errors import InfeasibleError, InvalidInputError
from mpq.core.formats import parse_scheme
from mpq.jobfile import parse_job
from mpq.store.store import Store, open_store
from mpq.terminal import print_run, print_solution
from tests.builders import mlp
from tests.test_costs import cells_of, graph_of_three, linear


def test_energy_of_a_mac_is_that_of_the_source() -> None:
    layer = linear("a", 8, 16)
    picojoules = {
        "fp32": 3.7 + 0.9,
        "fp16": 1.1 + 0.4,
        "int4": 1.1 + 0.4,  # expanded to fp16
        "int8:int8": 0.2 + 0.1,
        "int4:int8": 0.1 + 0.1,
        "int2:int2": 0.2 * 4 / 64 + 0.1,
    }
    for text, expected in picojoules.items():
        assert mac_joules(layer, parse_scheme(text)) == pytest.approx(expected * 1e-12)


def test_energy_of_a_layer_by_hand() -> None:
    table = get_cost_model("energy").table(graph_of_three(), cells_of("fp32", "int8:int8"))
    a_fp32 = 7 * 128 * 4.6e-12 + 4 * (128 + 112 + 56) * 162.5e-12
    a_int8 = 7 * 128 * 0.3e-12 + (128 + 16 + 112 + 2 * 56) * 162.5e-12
    assert table["ab", parse_scheme("fp32")] == pytest.approx(2 * a_fp32)
    assert table["ab", parse_scheme("int8:int8")] == pytest.approx(2 * a_int8)
    head = 7 * 15 * 4.6e-12 + 4 * (15 + 35 + 21) * 162.5e-12
    assert table.fixed == pytest.approx(head)
    everything = table.fixed + sum(table[unit, parse_scheme("fp32")] for unit in ("ab", "b"))
    assert table.baseline == pytest.approx(everything)
    assert (table.unit, table.provenance) == ("J", "model of Horowitz 2014, 45 nm")


def test_macs_are_the_same_in_every_scheme() -> None:
    table = get_cost_model("macs").table(graph_of_three(), cells_of("fp32", "int8:int8"))
    assert table.values.tolist() == [2 * 7 * 128] * 2 + [2 * 7 * 160] * 2
    assert (table.fixed, table.baseline) == (105, 1792 + 2240 + 105)


def test_luts_of_a_mac_by_hand() -> None:
    int8, int4, e4m3, e2m1 = (0, 7), (0, 3), (4, 3), (2, 1)
    # integers: the product of the bits, and an accumulator of 8 + 8 + log2 16 bits
    assert luts_per_mac(int8, int8, 16) == 64 + 20
    assert luts_per_mac(int4, int8, 16) == 32 + 16
    # E4M3: 16 + (5 of exponents) + width 16 + 16 + 6 + 4 = 42, shifted in ceil(5 / 2) rows
    assert luts_per_mac(e4m3, e4m3, 16) == 16 + 5 + 42 + 3 * 42
    assert luts_per_mac(e2m1, e2m1, 1) == 4 + 3 + 10 + 2 * 10
    assert luts_per_mac(int4, e4m3, 1) == luts_per_mac(e4m3, int4, 1)


def test_luts_grow_with_every_bit() -> None:
    sizes = [[luts_per_mac((e, m), (4, 3), 64) for m in range(8)] for e in range(6)]
    assert all(row == sorted(row) for row in (*sizes, *map(list, zip(*sizes, strict=True))))


def test_dsp_slices_are_shared_by_narrow_integers() -> None:
    found = [dsps_per_mac((0, b - 1), (0, b - 1)) for b in (4, 5, 8, 9, 18)]
    assert found == [0.25, 0.5, 0.5, 1.0, 1.0]
    assert dsps_per_mac((8, 23), (8, 23)) == 2.0  # 24 x 24 bits


def test_luts_of_a_stream_by_hand() -> None:
    model = get_cost_model("luts", cycles=1000)
    table = model.table(graph_of_three(), cells_of("int4:int8"))
    # 896 MACs of a and twin take one unit each, 2240 of b three; sums of 16 and 32 terms
    assert table.values.tolist() == [2 * (32 + 16), 3 * (32 + 17)]
    assert table.unit == "LUTs"


# --- searches -------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "runs.db")) as opened:
        yield opened


def search(
    store: Store, model: nn.Module | None = None, width: int = 6, **options: object
) -> mpq.SearchResult:
    settings = {
        "budgets": ["memory <= 60%"],
        "executor": "serial",
        "refine": 0,
        "held_out": [torch.randn(4, width)],
    }
    batches = [torch.randn(4, width) for _ in range(2)]
    return mpq.search(model or mlp(), batches, storage=store, **(settings | options))  # type: ignore[arg-type]


def test_a_search_on_a_machine_that_is_not_here(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = search(
        store,
        model=mlp(64, 128),
        width=64,
        hardware="roofline:RaspberryPi5",
        budgets=["latency <= 90%", "memory <= 60%"],
    )
    latency = result.problem.costs["latency"]
    assert latency.provenance == "roofline RaspberryPi5"
    assert result.solution.totals is not None
    assert result.solution.totals["latency"] <= 0.9 * latency.baseline
    layers = result.graph.by_name
    model = Roofline(machine="RaspberryPi5")
    for (unit, scheme), value in zip(result.problem.cells, latency.values, strict=True):
        assert value == pytest.approx(model.seconds(layers[unit], scheme))
    print_run(store, result.run_id)
    print_solution(result.graph, result.problem, result.solution)
    shown = capsys.readouterr().out
    assert shown.count("latency (modelled)") == 4  # two tables of two prints
    assert shown.count("latency is modelled") == 4
    assert "latency is modelled (roofline RaspberryPi5)" in " ".join(shown.split())
    print_run(store, result.run_id, as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert shown["costs_from"]["latency"] == "roofline RaspberryPi5"
    assert store.run(result.run_id).device == "roofline RaspberryPi5"
    page = result.report(tmp_path / "page.html").read_text()
    assert "latency (modelled)" in page
    assert "roofline RaspberryPi5" in page


def test_energy_is_a_budget(store: Store) -> None:
    result = search(store, budgets=["energy <= 50%"], schemes=["fp32", "int8:int8", "int4"])
    energy = result.problem.costs["energy"]
    assert result.solution.totals is not None
    assert result.solution.totals["energy"] <= 0.5 * energy.baseline
    assert "latency" not in result.problem.costs


def test_modelled_costs_are_minimised(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    result = search(
        store,
        budgets=None,
        minimise={"energy": 1e6, "latency": 1.0},
        limits=["kl <= 10"],
        hardware="roofline:T4",
        schemes=["fp32", "int8:int8"],
    )
    assert set(map(str, result.allocation.values())) == {"int8:int8"}
    print_run(store, result.run_id)
    shown = capsys.readouterr().out
    assert "measured along energy (modelled) and latency (modelled)" in " ".join(shown.split())


def test_luts_and_macs_are_budgets(store: Store) -> None:
    result = search(
        store, budgets=["luts <= 20%", "macs <= 100%"], schemes=["int8:int8", "int4:int8"]
    )
    assert {"luts", "macs"} <= result.problem.costs.keys()
    with pytest.raises(InvalidInputError, match="luts is counted in LUTs, so write it in LUTs"):
        search(store, budgets=["luts <= 3 ms"])


def test_an_impossible_modelled_budget_says_that_it_is_modelled(store: Store) -> None:
    with pytest.raises(InfeasibleError, match=r"latency is modelled \(roofline T4\)") as caught:
        search(store, hardware="roofline:T4", budgets=["latency <= 1 us"])
    assert "\n" not in str(caught.value)


def test_a_table_leaves_schemes_out_with_their_reason(store: Store, tmp_path: Path) -> None:
    rows = [
        {"layer": layer, "scheme": scheme, "latency_ms": 1 + int(scheme[3:] or 0) / 8}
        for layer in ("0", "2")
        for scheme in ("int4", "int8")
    ]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    hardware = f"table:{tmp_path / 't.json'}"
    result = search(store, hardware=hardware, budgets=["latency <= 3.6 ms"])
    assert {str(s) for schemes in result.problem.cells.schemes for s in schemes} == {"int4", "int8"}
    result = search(store, hardware=hardware, schemes=["int4", "int2"])
    told = [e.message for e in store.events(result.run_id) if e.kind == "left out"]
    assert len(told) == 2
    assert "int2: table t.json has no entry for layer '0'" in told[0]
    with pytest.raises(InvalidInputError, match=r"on table t\.json layer '0' needs a scheme"):
        search(store, hardware=hardware, schemes=["int2"])


def test_bit_planes_take_a_search(store: Store) -> None:
    result = search(
        store, hardware="bitplanes:a=1e-6,c=1e-12", budgets=["memory <= uniform int4:int8"]
    )
    assert result.problem.costs["latency"].provenance.startswith("bit planes")
    with pytest.raises(InvalidInputError, match="known baseline"):
        search(store, hardware="bitplanes:a=1e-6,c=1e-12", budgets=["latency <= 50%"])


def test_hardware_that_is_not_known_is_refused_before_anything_runs(store: Store) -> None:
    with pytest.raises(InvalidInputError, match="did you mean 'roofline:H100'"):
        search(store, hardware="rooflin:H100")
    assert store.runs() == []
    spec = parse_job(
        {"model": "a:b", "calibration": "a:c", "budgets": ["memory <= 60%"], "hardware": "local"}
    )
    assert spec.hardware == "local"
