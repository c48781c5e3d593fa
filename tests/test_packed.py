from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from hw_cost_models import get_cost_model
from mpq.core.errors import InvalidInputError
from mpq.core.formats import PerGroup, parse_scheme
from mpq.core.layers import LayerGraph
from mpq.core.problem import Allocation
from mpq.core.tables import Cells
from mpq.export.packed import PackedFile, read_packed, write_packed
from mpq.nn.graph import build_graph
from mpq.nn.patch import quantized
from mpq.nn.quantizers import WeightQuantizer
from mpq.nn.quantizers.bit_streams import pack_bits, unpack_bits
from tests.builders import CASES, Decoder, case, mlp, tokens
from tests.oracles import slow_storage_bits

INTEGERS = [
    f"int{bits}{where}{a}" for bits in range(1, 9) for where in ("", "t", "g4") for a in ("", "a")
]


@given(st.integers(1, 8), st.data())
def test_packed_bits_unpack_to_what_was_packed(bits: int, data: st.DataObject) -> None:
    elements = st.integers(0, 2**bits - 1)
    values = data.draw(arrays.arrays(np.uint8, st.integers(0, 50), elements=elements))
    stream = pack_bits(values, bits)
    assert len(stream) == math.ceil(len(values) * bits / 8)
    np.testing.assert_array_equal(unpack_bits(stream, bits, len(values)), values)


def test_bits_are_packed_from_the_lowest_up() -> None:
    assert pack_bits(np.array([0b101, 0b011, 0b1], np.uint8), 3).tolist() == [0b01_011_101, 0b0]


def uniform(graph: LayerGraph, text: str) -> Allocation:
    return Allocation({unit.name: parse_scheme(text) for unit in graph.units})


def written(
    path: Path, model: nn.Module, sample: object, text: str, clip: str = "minmax"
) -> tuple[PackedFile, LayerGraph, Allocation, WeightQuantizer]:
    graph = build_graph(model, sample, embeddings=True)
    quantizer = WeightQuantizer(clip)  # type: ignore[arg-type]
    allocation = uniform(graph, text)
    packed = write_packed(path / "net.safetensors", model, graph, allocation, quantizer)
    return packed, graph, allocation, quantizer


def slow_bytes(graph: LayerGraph, text: str) -> int:
    """Round codes, scales and zero points of each weight up to bytes, and add the rest."""
    fmt = parse_scheme(text).weights
    total = sum(part.bytes for part in graph.unsearched)
    for unit in graph.units:
        for layer in graph.stored_layers(unit):
            codes = layer.num_weights * fmt.bits
            bits = slow_storage_bits(fmt, layer.weight_shape, layer.channel_axis)
            scales = (bits - codes) // (16 + (0 if fmt.symmetric else fmt.bits))
            zero_points = 0 if fmt.symmetric else scales * fmt.bits
            total += math.ceil(codes / 8) + 2 * scales + math.ceil(zero_points / 8)
    return total


def header_bytes(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("text", INTEGERS)
def test_a_file_holds_exactly_the_bits_of_its_formats(tmp_path: Path, text: str) -> None:
    packed, graph, _, _ = written(tmp_path, mlp(inputs=12), torch.randn(2, 12), text)
    assert packed.tensor_bytes == slow_bytes(graph, text)
    assert packed.file_bytes == packed.path.stat().st_size
    assert packed.file_bytes == packed.tensor_bytes + header_bytes(packed.path)


@pytest.mark.parametrize("text", ["int8", "int3", "int4a", "int5ta", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_the_memory_cost_is_the_size_of_the_file(tmp_path: Path, name: str, text: str) -> None:
    packed, graph, allocation, _ = written(tmp_path, *case(name), text)
    names = tuple(unit.name for unit in graph.units)
    cells = Cells(units=names, schemes=((parse_scheme(text),),) * len(names))
    table = get_cost_model("memory").table(graph, cells)
    total = table.fixed + sum(table.values[allocation.choice(cells)])
    assert packed.tensor_bytes == total


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("text", [*INTEGERS, "fp16", "bf16", "fp32"])
def test_weights_read_back_as_they_were_evaluated(tmp_path: Path, text: str, clip: str) -> None:
    model = mlp(inputs=12)
    packed, graph, _, quantizer = written(tmp_path, model, torch.randn(2, 12), text, clip)
    back = read_packed(packed.path, graph)
    with quantized(model, dict.fromkeys(("0", "2"), parse_scheme(text)), quantizer=quantizer):
        for name, parameter in model.named_parameters():
            assert torch.equal(back[name].float(), parameter)
    assert back.keys() == model.state_dict().keys()


@pytest.mark.parametrize("text", ["int8", "int3a", "int4t", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_whole_networks_read_back(tmp_path: Path, name: str, text: str) -> None:
    model, sample = case(name)
    packed, graph, allocation, _ = written(tmp_path, model, sample, text)
    back = read_packed(packed.path, graph)
    layers = {layer: allocation[unit.name] for unit in graph.units for layer in unit.layers}
    with quantized(model, layers):
        stored = {part.name for part in graph.unsearched}
        stored |= {la.weight_id for u in graph.units for la in graph.stored_layers(u)}
        assert back.keys() == stored
        for key, tensor in model.state_dict().items():
            if key in stored:
                assert torch.equal(back[key].to(tensor.dtype), tensor)


def test_a_mixed_allocation_reads_back(tmp_path: Path) -> None:
    model = mlp(inputs=12)
    graph = build_graph(model, torch.randn(2, 12))
    allocation = Allocation({"0": parse_scheme("int3g4a:int8"), "2": parse_scheme("fp32")})
    packed = write_packed(tmp_path / "net.safetensors", model, graph, allocation)
    back = read_packed(packed.path, graph)
    assert torch.equal(back["2.weight"], model[2].weight)
    with safe_open(packed.path, framework="pt") as file:
        assert json.loads(file.metadata()["allocation"]) == allocation.text()
        assert file.metadata()["format"] == "mpq-packed-1"


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    packed, _, _, _ = written(tmp_path, Decoder(), tokens(), "int4")
    with safe_open(packed.path, framework="pt") as file:
        names = [name for name in file.keys() if "embed" in name or "head" in name]  # noqa: SIM118
    assert sorted(names) == ["embed.weight.codes", "embed.weight.scales"]


def test_buffers_are_kept_unless_they_are_not_persistent(tmp_path: Path) -> None:
    packed, graph, _, _ = written(tmp_path, Decoder(), tokens(), "int4")
    back = read_packed(packed.path, graph)
    assert torch.equal(back["scale"], Decoder().scale)
    assert "scratch" not in back


def test_writing_leaves_the_model_alone(tmp_path: Path) -> None:
    model = mlp(inputs=12)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    written(tmp_path, model, torch.randn(2, 12), "int2")
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_every_group_has_a_scale(tmp_path: Path) -> None:
    packed, graph, _, _ = written(tmp_path, mlp(inputs=12), torch.randn(2, 12), "int4g4")
    assert parse_scheme("int4g4").weights.granularity == PerGroup(4)
    with safe_open(packed.path, framework="pt") as file:
        assert file.get_tensor("0.weight.scales").shape == (8 * 3,)
    assert graph.by_name["0"].weight_shape == (8, 12)


def other_tensors(path: Path) -> None:
    save_file({"a": torch.ones(2)}, path)


def no_metadata(path: Path) -> None:
    save_file({"a": torch.ones(2)}, path, {"format": "pt"})


def garbage(path: Path) -> None:
    path.write_bytes(b"\xff" * 40)


def truncated(path: Path) -> None:
    model = mlp(inputs=12)
    written(path.parent, model, torch.randn(2, 12), "int4")
    path.write_bytes((path.parent / "net.safetensors").read_bytes()[:-10])


def absent(path: Path) -> None:
    pass


@pytest.mark.parametrize("make", [other_tensors, no_metadata, garbage, truncated, absent])
def test_a_file_that_is_no_packed_checkpoint_is_named(tmp_path: Path, make: object) -> None:
    path = tmp_path / "other.safetensors"
    make(path)  # type: ignore[operator]
    graph = build_graph(mlp(inputs=12), torch.randn(2, 12))
    with pytest.raises(InvalidInputError, match=r"other\.safetensors is not a packed checkpoint"):
        read_packed(path, graph)


@pytest.mark.parametrize("text", ["int4+r4", "int4g16+r4", "int4+10%int8", "mxfp4", "ternary"])
def test_formats_of_more_than_codes_are_written(tmp_path: Path, text: str) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
    packed, graph, allocation, _ = written(tmp_path, model, torch.randn(2, 64), text)
    names = tuple(unit.name for unit in graph.units)
    cells = Cells(units=names, schemes=((parse_scheme(text),),) * len(names))
    table = get_cost_model("memory").table(graph, cells)
    assert packed.tensor_bytes == table.fixed + sum(table.values[allocation.choice(cells)])
