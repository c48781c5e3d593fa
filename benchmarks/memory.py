"""Are predicted bytes the bytes of the written file, to the last one?

For each network random allocations of what each target runs, written as real files: our packed
checkpoint, a compressed-tensors checkpoint (safetensors) and GGUF. Bytes are those of all tensors;
a file has its header (and GGUF a padding to 32 bytes, which is checked) on top. The Python of gguf
quantizes no K type: their blocks are written as zeros, as many as the library says.
Run: python -m benchmarks.memory [minilm digits_vit llama] [--allocations 20]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mpq.core.chosen import Chosen
from mpq.core.layers import LayerGraph
from mpq.core.problem import Allocation
from mpq.core.protocols import Exporter
from mpq.export import get_exporter, predicted_bytes
from mpq.export.compressed_weights import write_compressed
from mpq.export.gguf import TYPES
from mpq.export.packed import write_packed
from mpq.export.rules import runnable
from mpq.nn.graph import build_graph
from mpq.nn.quantizers import WeightQuantizer

TARGETS = ("mpq", "compressed-tensors-hf", "gguf")
ALIGNMENT = 32  # of every tensor in a GGUF file


def network(name: str) -> tuple[nn.Module, object]:
    """Return a network and one sample; "llama" has random weights and columns for K types."""
    if name == "minilm":
        from examples import minilm

        return minilm.make_model(), minilm.calibration_batches()[0]
    if name == "digits_vit":
        from examples import digits_vit

        return digits_vit.make_model(), digits_vit.calibration_batches()[0]
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval(), {"input_ids": torch.arange(8).reshape(1, 8)}


def random_allocation(exporter: Exporter, graph: LayerGraph, draw: random.Random) -> Chosen:
    """Give every unit any weight format that the target runs all its layers in."""
    layers = graph.by_name
    schemes = {}
    for unit in graph.units:
        every = [set(runnable(exporter, layers[name])) for name in unit.layers]
        shared = sorted(set.intersection(*every), key=str)
        schemes |= dict.fromkeys(unit.layers, draw.choice(shared))
    return Chosen(graph=graph, schemes=schemes)


def written_bytes(target: str, path: Path, model: nn.Module, chosen: Chosen) -> int:
    """Write the network for a target and return the bytes of its tensors as the file has them."""
    if target == "gguf":
        return _gguf_bytes(path, model, chosen)
    if target == "mpq":
        units = {unit.name: chosen.schemes[unit.layers[0]] for unit in chosen.graph.units}
        write_packed(path, model, chosen.graph, Allocation(units))
    else:
        write_compressed(path, model, chosen, WeightQuantizer(), target)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    return path.stat().st_size - header


def _gguf_bytes(path: Path, model: nn.Module, chosen: Chosen) -> int:
    import gguf

    kinds = {la.weight_id: TYPES[str(scheme)].name for la, scheme in chosen.searched}
    stored = {part.name for part in chosen.graph.unsearched} | kinds.keys()
    writer = gguf.GGUFWriter(path, "llama")
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in stored:
            values = tensor.detach().numpy()
            kind = kinds.get(name)
            if kind is None or kind == "f32":
                writer.add_tensor(name, values)
                continue
            number = gguf.GGMLQuantizationType[kind.upper()]
            try:
                blocks = gguf.quantize(values, number)
            except NotImplementedError:
                shape = gguf.quant_shape_to_byte_shape(values.shape, number)
                blocks = np.zeros(shape, np.uint8)
            writer.add_tensor(name, blocks, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = gguf.GGUFReader(path)
    sizes = [int(tensor.n_bytes) for tensor in reader.tensors]
    padded = sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
    assert path.stat().st_size - reader.data_offset == padded
    return sum(sizes)


def compare(name: str, allocations: int) -> list[str]:
    """Return a row for each target."""
    model, sample = network(name)
    graph = build_graph(model, sample, embeddings=True)
    rows = []
    for target in TARGETS:
        exporter, draw = get_exporter(target), random.Random(0)
        sizes, off = [], []
        for _ in range(allocations):
            chosen = random_allocation(exporter, graph, draw)
            predicted = predicted_bytes(target, chosen)
            with tempfile.TemporaryDirectory() as folder:
                written = written_bytes(target, Path(folder) / "file", model, chosen)
            sizes.append(written)
            off.append(abs(written - (predicted or 0)))
        exact = sum(difference == 0 for difference in off)
        rows.append(
            f"{name:12} {target:22} {graph.native_bytes:10} {min(sizes):10} {max(sizes):10} "
            f"{exact:6} of {allocations:<3} {max(off):8}"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=["minilm", "digits_vit", "llama"])
    parser.add_argument("--allocations", type=int, default=20)
    given = parser.parse_args()
    print(
        "network      target                   as it is   smallest    largest  exact     most off"
    )
    for name in given.networks:
        for row in compare(name, given.allocations):
            print(row, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
