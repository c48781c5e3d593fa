"""Formats that a kernel, a file or a cost does not know are refused by name, others are costed."""

from __future__ import annotations

from pathlib import Path

import pytest

from hw_cost_models import get_cost_model
from hw_cost_models.bitplanes import BitPlanes
from hw_cost_models.energy import Energy
from hw_cost_models.luts import Luts, element_of
from hw_cost_models.measured import capability, torch_capability
from hw_cost_models.measured.cuda import _decide
from hw_cost_models.roofline import Roofline, computes_in
from hw_cost_models.table import read_table
from mpq.core.chosen import Chosen
from mpq.core.errors import InvalidInputError
from mpq.core.formats import parse_format, parse_scheme
from mpq.core.latency import KernelCase
from mpq.core.layers import LayerGraph, Unit
from mpq.core.tables import Cells
from mpq.export import EXPORTERS, export_allocation, import_allocation
from tests.builders import layer

LINEAR = layer(
    "blocks.0.fc1",
    (128, 256),
    input_shape=(1, 32, 256),
    output_shape=(1, 32, 128),
    macs=32 * 128 * 256,
)
GRAPH = LayerGraph(
    layers=(LINEAR,),
    units=(Unit(name=LINEAR.name, layers=(LINEAR.name,)),),
    unsearched=(),
    sample="made",
)
OTHERS = [
    "fp8_e4m3",
    "mxfp4",
    "nvfp4",
    "nf4g64d",
    "bfp4g16",
    "ternary",
    "binary",
    "partial_binary10%",
    "kmeans4o0.45%",
    "bipolar4",
    "fixed(8,2)",
    "int4g64+r16",
    "int4g64+10%int8g64",
    "int8:fp8_e4m3",
    "int8:log2_4",
    "mxfp8_e4m3:mxfp8_e4m3",
]
KERNELS = {
    "onnxruntime": capability.why_no_kernel,
    "torch_cpu": torch_capability.why_not,
    "cuda": lambda la, scheme: str(_decide(la, scheme, (9, 0))),
}


@pytest.mark.parametrize("text", OTHERS)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_kernel_that_is_not_there_is_refused_by_the_name_of_the_format(
    backend: str, text: str
) -> None:
    reason = KERNELS[backend](LINEAR, parse_scheme(text))
    weights, _, activations = text.partition(":")
    beginning, _, told = reason.partition(": ")
    assert beginning == text
    assert "kernel" in told
    assert (weights in told) or (activations in told)


@pytest.mark.parametrize("text", ["int4g64", "int8:int8", "int2g32a"])
@pytest.mark.parametrize("rounding", ["gptq", "adaround", "flexround"])
def test_a_rounding_has_the_kernel_of_what_it_stores(text: str, rounding: str) -> None:
    weights, _, activations = text.partition(":")
    rounded = parse_scheme(f"{weights}@{rounding}{':' if activations else ''}{activations}")
    found = capability.kernel_for(LINEAR, rounded)
    assert isinstance(found, KernelCase)
    assert found == capability.kernel_for(LINEAR, parse_scheme(text))


@pytest.mark.parametrize("text", ["fp8_e4m3:fp8_e4m3", "int4:fp8_e4m3", "ternary:int8", "int4"])
def test_bit_planes_refuse_what_is_no_integer(text: str) -> None:
    reason = BitPlanes(a=1e-6, c=1e-16).why_not(LINEAR, parse_scheme(text))
    assert reason == f"{text}: bit planes need integers on both sides"


@pytest.mark.parametrize("text", ["int3:int4", "bipolar3:bipolar4", "uint2:uint4"])
def test_bit_planes_take_bipolar_and_unsigned_integers(text: str) -> None:
    model, scheme = BitPlanes(a=0.0, c=1.0), parse_scheme(text)
    assert model.why_not(LINEAR, scheme) == ""
    planes = scheme.weights.bits * scheme.activations.bits
    assert model.seconds(LINEAR, scheme) == planes * LINEAR.macs


@pytest.mark.parametrize("text", OTHERS)
@pytest.mark.parametrize("target", [t for t in EXPORTERS if t != "mpq"])
def test_a_file_without_the_format_is_refused_before_it_is_written(
    target: str, text: str, tmp_path: Path
) -> None:
    chosen = Chosen(graph=GRAPH, schemes={LINEAR.name: parse_scheme(text)})
    with pytest.raises(InvalidInputError, match=r"blocks\.0\.fc1") as caught:
        export_allocation(target, chosen, tmp_path / "file")
    assert text in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", [*OTHERS, "int4g64@gptq", "int4@adaround"])
def test_the_allocation_file_names_every_format(text: str, tmp_path: Path) -> None:
    chosen = Chosen(graph=GRAPH, schemes={LINEAR.name: parse_scheme(text)})
    path = export_allocation("mpq", chosen, tmp_path / "file")
    assert import_allocation("mpq", path, GRAPH) == {LINEAR.name: parse_scheme(text)}


def test_a_rounding_is_exported_as_what_it_stores(tmp_path: Path) -> None:
    chosen = Chosen(graph=GRAPH, schemes={LINEAR.name: parse_scheme("int4g128@gptq")})
    path = export_allocation("compressed-tensors", chosen, tmp_path / "file")
    found = import_allocation("compressed-tensors", path, GRAPH)
    assert found == {LINEAR.name: parse_scheme("int4g128")}


def test_a_table_has_the_time_of_what_a_rounding_stores(tmp_path: Path) -> None:
    path = tmp_path / "times.csv"
    path.write_text("layer,scheme,latency_ms\nblocks.0.fc1,int4g64,2\n")
    table = read_table(path)
    cells = Cells(units=(LINEAR.name,), schemes=((parse_scheme("int4g64@gptq"),),))
    assert table.table(GRAPH, cells).values.tolist() == [0.002]


def bops(text: str) -> float:
    cells = Cells(units=(LINEAR.name,), schemes=((parse_scheme(text),),))
    return float(get_cost_model("bops").table(GRAPH, cells).values[0])


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("fp6_e3m2:int8", 6 * 8),
        ("mxfp4:mxfp8_e4m3", 4 * 8),
        ("int4+25%int8:int8", (4 + 0.25 * 4) * 8),
        ("partial_binary10%:int8", (1 + 0.1 * 7) * 8),
    ],
)
def test_bit_operations_count_the_bits_of_codes(text: str, bits: float) -> None:
    assert bops(text) == pytest.approx(bits * LINEAR.macs)


def test_a_branch_multiplies_in_16_bits() -> None:
    branch = 32 * 8 * (128 + 256)  # rows, rank, both factors
    assert bops("int4+r8:int8") == pytest.approx(4 * 8 * LINEAR.macs + 256 * branch)
    energy = Energy()
    alone, beside = (energy.joules(LINEAR, parse_scheme(t)) for t in ("int4", "int4+r8"))
    moved = 2 * 8 * (128 + 256) * 162.5e-12
    assert beside - alone == pytest.approx(branch * 1.5e-12 + moved)
    roof = Roofline(machine="H100")
    assert roof.seconds(LINEAR, parse_scheme("int4+r8")) > roof.seconds(
        LINEAR, parse_scheme("int4")
    )
    luts = Luts(cycles=1)
    assert luts.luts(LINEAR, parse_scheme("int4+r8")) > luts.luts(LINEAR, parse_scheme("int4"))


@pytest.mark.parametrize(
    ("text", "peak"),
    [
        ("fp8_e4m3:fp8_e4m3", "fp8"),
        ("mxfp4:mxfp8_e4m3", "fp8"),
        ("int8:fp8_e4m3", "fp16"),
        ("int4:int8", "int8"),
        ("int4+10%int8:int4", "int8"),
        ("nf4g64:int8", "fp16"),
        ("ternary:int8", "int8"),
    ],
)
def test_a_roofline_multiplies_in_what_holds_both_sides(text: str, peak: str) -> None:
    peaks = {"fp32": 1.0, "fp16": 2.0, "fp8": 4.0, "int8": 4.0}
    assert computes_in(peaks, LINEAR, parse_scheme(text)) == peak


@pytest.mark.parametrize(
    ("text", "element"),
    [
        ("fp6_e3m2", (3, 2)),
        ("mxfp8_e5m2", (5, 2)),
        ("int5", (0, 4)),
        ("nf4g64", (5, 10)),
        ("int4+10%int8", (0, 7)),
    ],
)
def test_look_up_tables_are_those_of_the_element(text: str, element: tuple[int, int]) -> None:
    assert element_of(parse_format(text), "fp16") == element
