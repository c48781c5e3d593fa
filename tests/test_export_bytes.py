"""Predicted bytes in the formats of targets against files that are really written."""

from __future__ import annotations

import random
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import safe_open
from torch import nn

from benchmarks.memory import TARGETS, random_allocation, written_bytes
from hw_cost_models import get_cost_model
from mpq.core.chosen import Chosen
from mpq.core.errors import InvalidInputError
from mpq.core.formats import parse_scheme
from mpq.core.tables import Cells
from mpq.export import get_exporter, predicted_bytes
from mpq.export.compressed_weights import pack_words, write_compressed
from mpq.export.gguf import TYPES
from mpq.nn.graph import build_graph
from tests.builders import Decoder, layer, mlp, tokens


def uniform(model: nn.Module, sample: object, text: str) -> Chosen:
    graph = build_graph(model, sample)
    names = [name for unit in graph.units for name in unit.layers]
    return Chosen(graph=graph, schemes=dict.fromkeys(names, parse_scheme(text)))


@pytest.mark.parametrize("target", TARGETS)
def test_predicted_bytes_are_those_of_the_file(tmp_path: Path, target: str) -> None:
    model = Decoder(words=64, width=256, tied=False)
    graph = build_graph(model, tokens(), embeddings=True)
    draw = random.Random(1)
    for number in range(2):
        chosen = random_allocation(get_exporter(target), graph, draw)
        written = written_bytes(target, tmp_path / f"{number}", model, chosen)
        assert written == predicted_bytes(target, chosen)


@pytest.mark.parametrize("text", ["int3", "int5a", "int4g4a", "int2t", "int8:int8", "int8g4a:int8"])
def test_rows_that_fill_no_word_are_padded(tmp_path: Path, text: str) -> None:
    model, path = mlp(inputs=20, hidden=12), tmp_path / "w"
    chosen = uniform(model, torch.randn(2, 20), text)
    packed = write_compressed(path, model, chosen, target="compressed-tensors-hf")
    assert packed.tensor_bytes == predicted_bytes("compressed-tensors-hf", chosen)


def test_our_bytes_are_those_of_the_memory_budget() -> None:
    chosen = uniform(Decoder(tied=False), tokens(), "int3a")
    units = tuple(unit.name for unit in chosen.graph.units)
    cells = Cells(units=units, schemes=((parse_scheme("int3a"),),) * len(units))
    table = get_cost_model("memory").table(chosen.graph, cells)
    assert predicted_bytes("mpq", chosen) == table.fixed + table.values.sum()


def test_a_target_without_a_file_of_its_own_has_no_bytes() -> None:
    assert predicted_bytes("nncf", uniform(mlp(), torch.randn(2, 6), "int8")) is None


def test_blocks_are_those_of_gguf() -> None:
    for block in TYPES.values():
        number = gguf.GGMLQuantizationType[block.name.upper()]
        assert gguf.GGML_QUANT_SIZES[number] == (block.elements, block.bytes)


def test_a_type_is_never_larger_than_its_scheme() -> None:
    one, exporter = layer("fc", (64, 512)), get_exporter("gguf")
    for text, block in TYPES.items():
        scheme = parse_scheme(text)
        bits = scheme.weights.storage_bits(one.weight_shape)
        assert exporter.stored_bytes(one, scheme) == 64 * 512 * block.bytes // block.elements
        assert exporter.stored_bytes(one, scheme) <= bits / 8


def test_words_are_filled_from_the_lowest_bit() -> None:
    values = torch.tensor([[1, 2, 3, 7, 0, 0, 0, 0, 0, 0, 5]])  # the last one crosses a word
    ((first, second),) = pack_words(values, 3).tolist()
    expected = sum(value << (3 * place) for place, value in enumerate(values[0].tolist()))
    assert (first & 0xFFFFFFFF) | (second & 0xFFFFFFFF) << 32 == expected


def test_names_and_shapes_are_those_that_vllm_loads(tmp_path: Path) -> None:
    model, path = mlp(inputs=64, hidden=32), tmp_path / "model.safetensors"
    schemes = {"0": parse_scheme("int4g32a"), "2": parse_scheme("int8:int8")}
    graph = build_graph(model, torch.randn(2, 64))
    write_compressed(path, model, Chosen(graph=graph, schemes=schemes))
    with safe_open(path, framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {name: (tuple(t.shape), t.dtype) for name, t in found.items()} == {
        "0.weight_packed": ((32, 8), torch.int32),
        "0.weight_scale": ((32, 2), torch.float16),
        "0.weight_zero_point": ((4, 2), torch.int32),
        "0.weight_shape": ((2,), torch.int64),
        "0.bias": ((32,), torch.float32),
        "2.weight": ((3, 32), torch.int8),
        "2.weight_scale": ((3, 1), torch.float16),
        "2.bias": ((3,), torch.float32),
    }


def test_weights_that_cannot_run_are_not_written(tmp_path: Path) -> None:
    chosen = uniform(mlp(), torch.randn(2, 6), "int3")
    with pytest.raises(InvalidInputError, match="layer '0' is int3: compressed-tensors"):
        write_compressed(tmp_path / "w", mlp(), chosen)
    assert list(tmp_path.iterdir()) == []
