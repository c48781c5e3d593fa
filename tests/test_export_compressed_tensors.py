"""Files for compressed-tensors, read by compressed-tensors itself (slow to import)."""

from __future__ import annotations

import json
import logging
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from mpq.core.chosen import Chosen
from mpq.core.formats import parse_scheme
from mpq.export import export_allocation, get_exporter
from mpq.export.compressed_weights import pack_words, write_compressed
from mpq.export.rules import runnable
from mpq.nn.graph import build_graph
from mpq.nn.quantizers import WeightQuantizer
from tests.builders import mlp

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def library() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            import compressed_tensors.compressors
            import compressed_tensors.quantization
        finally:
            logging.disable(logging.NOTSET)
    return compressed_tensors


def alternating(model: nn.Module, *texts: str) -> Chosen:
    graph = build_graph(model, torch.randn(2, 128))
    names = [name for unit in graph.units for name in unit.layers]
    pairs = zip(names, texts, strict=True)
    return Chosen(graph=graph, schemes={name: parse_scheme(text) for name, text in pairs})


def network() -> nn.Sequential:
    return mlp(inputs=128, hidden=64, outputs=32)


def config_of(library: Any, folder: Path, target: str, chosen: Chosen) -> Any:
    path = export_allocation(target, chosen, folder / "config.json")
    config = json.loads(path.read_text())["quantization_config"]
    return library.quantization.QuantizationConfig.model_validate(config)


@pytest.mark.parametrize("target", ["compressed-tensors", "compressed-tensors-hf"])
def test_the_library_reads_what_was_chosen(library: Any, tmp_path: Path, target: str) -> None:
    exporter, draw = get_exporter(target), random.Random(0)
    graph = build_graph(network(), torch.randn(2, 128))
    for _ in range(30):
        schemes = {la.name: draw.choice(runnable(exporter, la)) for la in graph.layers}
        chosen = Chosen(graph=graph, schemes=schemes)
        config = config_of(library, tmp_path, target, chosen)
        assert config.quant_method == "compressed-tensors"
        assert set(config.ignore) == {n for n, s in schemes.items() if s.is_native}
        read = {target: g for g in config.config_groups.values() for target in g.targets}
        assert set(read) | set(config.ignore) == set(schemes)
        assert not set(read) & set(config.ignore)
        formats = {str(group.format) for group in config.config_groups.values()}
        if len(formats) == 1:
            assert config.format == formats.pop()
        elif formats:
            assert config.format == "mixed-precision"
        for name, group in read.items():
            wanted = schemes[name]
            assert group.weights.num_bits == wanted.weights.bits
            assert group.weights.symmetric == wanted.weights.symmetric
            assert group.weights.type == "int"
            per_group = getattr(wanted.weights.granularity, "size", None)
            assert group.weights.group_size == per_group
            if wanted.activations.is_native:
                assert group.input_activations is None
            else:
                inputs = group.input_activations
                assert (inputs.strategy, inputs.dynamic) == ("token", True)
                assert inputs.num_bits == wanted.activations.bits
                assert inputs.symmetric == wanted.activations.symmetric


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize(
    "texts",
    [
        ("int4g32", "int4"),
        ("int4g32a", "int8"),
        ("int3", "int5g64a"),
        ("int2g16", "int6a"),
        ("int7g32", "int3t"),
        ("int8:int8", "int8g32a:int8"),
        ("int4:int8s", "int8t:int8s"),
        ("fp32", "int8a"),
    ],
)
def test_the_library_unpacks_the_weights_that_were_scored(
    library: Any, tmp_path: Path, texts: tuple[str, str], clip: str
) -> None:
    model, quantizer = network(), WeightQuantizer(clip)  # type: ignore[arg-type]
    chosen = alternating(model, *texts)
    config = config_of(library, tmp_path, "compressed-tensors-hf", chosen)
    path = tmp_path / "model.safetensors"
    write_compressed(path, model, chosen, quantizer, "compressed-tensors-hf")
    with safe_open(path, framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    groups = {target: g for g in config.config_groups.values() for target in g.targets}
    for layer, scheme in chosen.searched:
        weight = model.get_submodule(layer.name).weight
        if scheme.is_native:
            assert torch.equal(stored[layer.weight_id], weight)
            continue
        group, prefix = groups[layer.name], f"{layer.name}."
        compressor = library.compressors.BaseCompressor.get_value_from_registry(group.format)
        own = {
            name.removeprefix(prefix): tensor
            for name, tensor in stored.items()
            if name.startswith(prefix) and not name.endswith("bias")
        }
        assert set(own) == set(compressor.compression_param_names(group))
        own["weight_scale"] = own["weight_scale"].float()
        expected = quantizer.fake_quantize(layer.weight_id, weight.detach(), scheme.weights)
        assert torch.equal(compressor.decompress(own, group)["weight"], expected)


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_are_those_of_the_library(library: Any, bits: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(0, 2**bits, (5, 37))
    signed = (codes - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack_words(codes, bits), pack_to_int32(signed, bits))
